"""Going on with the work of an earlier run: its solvers and its checkpoint, if the training is the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..generalized_solver import GeneralizedSolver
from ..pipelines.driving import scheduler_config
from ..schedulers.scheduling_gas import GASScheduler
from ..utils.files import load_state


# What may differ when a fit is continued: the number of teacher samples and the versions of packages.
MAY_CHANGE = ("num_teacher_samples", "versions")


class SolverFolder:
    """A folder of a scheduler that fills with solvers of one `provenance`; solvers of other step counts stay.

    Raises:
        ValueError: If the folder has solvers that were made otherwise.
    """

    def __init__(self, path: Path, pipe: DiffusionPipeline, provenance: Mapping[str, Any], writable: bool):
        self.path, self.provenance, self.writable = path, dict(provenance), writable
        self.fixed = {name: value for name, value in self.provenance.items() if name not in MAY_CHANGE}
        if not (path / GASScheduler.config_name).exists():
            self.scheduler = GASScheduler.from_config(scheduler_config(pipe))
            return
        self.scheduler = GASScheduler.from_pretrained(path)
        for n, solver in self.scheduler.solvers.items():
            found = {name: solver.provenance.get(name) for name in self.fixed}
            if found != self.fixed:
                raise ValueError(
                    f"{path} holds a {n}-step solver made with {found}, not {self.fixed}. Choose another --output_dir or "
                    "remove that one."
                )

    def add(self, solver: GeneralizedSolver, **measured: Any) -> None:
        solver.provenance = {**self.provenance, **measured}
        self.scheduler.add_solver(solver)
        self.save()

    def save(self) -> None:
        if self.writable:
            self.scheduler.save_pretrained(self.path)


def load_checkpoint(path: Path, fixed: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state in a checkpoint, `None` if there is none.

    Raises:
        ValueError: If it is damaged, none, or of a training that differs in one of the `fixed` settings.
    """
    if not path.exists():
        return None
    state = load_state(path)
    if not (isinstance(state, dict) and {"solver_config", "provenance"} <= state.keys()):
        raise ValueError(f"{path} is not a checkpoint of a training. Remove it to begin anew.")
    # Earlier versions recorded less.
    before = {**fixed, "num_inference_steps": state["solver_config"]["num_inference_steps"], **state["provenance"]}
    before["detail"] = state.get("num_phases", 1) == 2
    changed = [f"{name} was {before[name]}, is {fixed[name]}" for name in fixed if before[name] != fixed[name]]
    if changed:
        raise ValueError(
            f"The checkpoint {path} was made with other arguments: {', '.join(changed)}. Go on with the same, choose another "
            "--output_dir, or remove the checkpoint."
        )
    return state
