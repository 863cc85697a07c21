"""Shows a saved scheduler: where its solvers evaluate the network, what they add up, and what made them.

    python -m diffusers_gas.inspect examples/solvers/text-to-digits/gs
    python -m diffusers_gas.inspect you/some-model-gas --num_inference_steps 4 --output solver.png

Tables go to the terminal. The picture, for which matplotlib is needed, shows a solver's times and coefficients beside those of
DPM-Solver++ 2M; for SDM the noise levels of its plans, and what was measured along them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.utils import is_matplotlib_available

from ..pipelines.named_schedulers import load_saved_scheduler
from ..schedulers.model_card import provenance_table
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_sdm import SDMScheduler
from ..schedulers.solver_files import scheduler_folder
from ..schedulers.time_grids import SOME_SHIFT, TimeGrid


# Of an untrained scheduler, unless another is asked for.
UNTRAINED_STEPS = 6

# Coefficients that fit beside each other in 100 characters.
MOST_COLUMNS = 12

# What the record of a plan has for every step.
ALONG_STEPS = ("eta", "curvature", "karras_sigmas", "karras_eta")


def load(path: str) -> GASScheduler | SDMScheduler:
    """The scheduler in a folder (or its sub-folder `scheduler`) or Hub repository.

    Raises:
        ValueError: If that is another scheduler or damaged.
        OSError: If there is none.
    """
    if Path(path).exists():
        path = str(scheduler_folder(path, "scheduler"))
    elif path.count("/") != 1:
        raise OSError(f"{path} is neither a folder nor a Hub repository, user/name.")
    scheduler = load_saved_scheduler(path)
    if not isinstance(scheduler, GASScheduler | SDMScheduler):
        raise ValueError(
            f"{path} holds a {type(scheduler).__name__}: only GASScheduler and SDMScheduler have solvers."
        )
    return scheduler


def available_steps(scheduler: GASScheduler | SDMScheduler, wanted: Sequence[int] | None) -> list[int]:
    """The step counts to show; a `ValueError` if the scheduler has others only."""
    trained = sorted(scheduler.solvers if isinstance(scheduler, GASScheduler) else scheduler.plans)
    missing = sorted(set(wanted or ()) - set(trained))
    if trained and missing and not scheduler.config.use_theory_for_untrained_steps:
        raise ValueError(f"There is no solver for {missing} steps: this scheduler has {trained}.")
    return sorted(set(wanted)) if wanted else trained or [UNTRAINED_STEPS]


def describe(scheduler: GASScheduler | SDMScheduler, step_counts: Sequence[int]) -> str:
    """Tables of a scheduler's solvers or plans, with what made them; 100 characters wide."""
    gas = isinstance(scheduler, GASScheduler)
    learned = scheduler.solvers if gas else scheduler.plans
    made_by = _made_by({n: learned[n].provenance for n in step_counts if n in learned})
    sections = [f"Made by\n\n{made_by}"] if made_by else []
    if scheduler.config.use_dynamic_shifting:
        sections.append(f"Times depend on the resolution; these are those of the shift mu = {SOME_SHIFT}.")
    sections += [_solver(scheduler, n) if gas else _plan(scheduler, n) for n in step_counts]
    return "\n\n".join(sections)


def _made_by(provenances: dict[int, dict[str, Any]]) -> str:
    """What made the solvers, by step count where they differ."""
    records = {
        n: {name: value for name, value in provenance.items() if name not in ALONG_STEPS}
        for n, provenance in provenances.items()
    }
    lines = []
    for name, values in provenance_table(records).items():
        several = ", ".join(f"{value or '-'} ({n})" for n, value in zip(records, values))
        lines.append(f"{name:<36}{values[0] if len(set(values)) == 1 else several}")
    return "\n".join(lines)


def _solver(scheduler: GASScheduler, num_inference_steps: int) -> str:
    n, noise_schedule = num_inference_steps, scheduler.noise_schedule(SOME_SHIFT)
    learned = scheduler.solvers.get(n)
    what = "untrained, DPM-Solver++ theory" if learned is None else f"{learned.num_learned} learned numbers"
    grid = TimeGrid.of(scheduler, n, noise_schedule)
    rows = [["k", "t", "evaluation t", "model timestep", "sigma", "log-SNR"]]
    for k in range(n + 1):
        told = [f"{grid.evaluation_times[k]:.4f}", f"{grid.timesteps[k]:.5g}"] if k < n else ["", ""]
        rows.append([f"{k}", f"{grid.times[k]:.4f}", *told, f"{grid.sigmas[k]:.4g}", f"{grid.log_snr[k]:.2f}"])
    parts = [f"{n} steps: {what}", _aligned(rows, gap=3), "x[k+1] = a[k] x[k] + u[k] x[0] + sum_j U[k,j] D[j]"]

    weights = (learned or scheduler.theory_solver(n, SOME_SHIFT)).table(noise_schedule).folded().tolist()
    names = ["a[k]", "u[k]", *(f"U[k,{j}]" for j in range(n))]
    for start in range(0, n + 2, MOST_COLUMNS):
        columns = range(n + 2)[start : start + MOST_COLUMNS]
        rows = [["k", *(names[column] for column in columns)]]
        rows += [
            [f"{k}", *(f"{weights[k][column]:.4f}" if column < 3 + k else "" for column in columns)] for k in range(n)
        ]
        parts.append(_aligned(rows))
    return "\n\n".join(parts)


def _plan(scheduler: SDMScheduler, num_inference_steps: int) -> str:
    noise_schedule = scheduler.noise_schedule(SOME_SHIFT)
    calibrated = scheduler.plans.get(num_inference_steps)
    plan = calibrated or scheduler.published_plan(num_inference_steps, SOME_SHIFT)
    times = plan.times(noise_schedule)
    columns = {
        "step": [f"{i}" for i in range(plan.num_steps)],
        "t": [f"{t:.4f}" for t in times.tolist()],
        "model timestep": [f"{timestep:.5g}" for timestep in noise_schedule.timestep(times).tolist()],
        "sigma": [f"{sigma:.4g}" for sigma in plan.sigmas.tolist()[:-1]],
        "log-SNR": [f"{value:.2f}" for value in (2 * noise_schedule.lambda_(times)).tolist()],
        "order": [f"{order}" for order in plan.orders],
    }
    if "eta" in plan.provenance:
        # The last step has none, and there is no curvature before the first.
        columns["eta"] = [*(f"{value:.3g}" for value in plan.provenance["eta"][:-1]), "-"]
    if "curvature" in plan.provenance:
        columns["curvature"] = ["-", *(f"{value:.3g}" for value in plan.provenance["curvature"][1:])]
    switch = f"of second order from step {plan.switch_index}" if 2 in plan.orders else "all of first order"
    what = "" if calibrated else "uncalibrated, "
    title = f"{num_inference_steps} evaluations: {what}{plan.num_steps} steps to sigma = 0, {plan.solver}, {switch}"
    rows = [list(columns), *map(list, zip(*columns.values()))]
    return f"{title}\n\n{_aligned(rows, gap=3)}"


def _aligned(rows: Sequence[Sequence[str]], gap: int = 1) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [(" " * gap).join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def draw(scheduler: GASScheduler | SDMScheduler, step_counts: Sequence[int], path: Path) -> None:
    """Draws a scheduler's solvers or plans."""
    from ..figures import draw_plans, draw_solvers

    if isinstance(scheduler, GASScheduler):
        draw_solvers(scheduler, step_counts, path)
    else:
        plans = [scheduler.plans.get(n) or scheduler.published_plan(n, SOME_SHIFT) for n in step_counts]
        draw_plans(plans, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m diffusers_gas.inspect", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("path", help="a scheduler's folder, or a Hub id")
    add("--num_inference_steps", type=int, nargs="+", help=f"all that it has; {UNTRAINED_STEPS} of an untrained one")
    add("--output", type=Path, help="a file for the picture, .png, .svg or .pdf; without it there is none")
    args = parser.parse_args(arguments)
    try:
        scheduler = load(args.path)
        step_counts = available_steps(scheduler, args.num_inference_steps)
        print(f"{type(scheduler).__name__} in {args.path}\n\n{describe(scheduler, step_counts)}")
        if args.output is None:
            return
        if not is_matplotlib_available():
            sys.exit("No picture without matplotlib: pip install 'diffusers-gas[train]'")
        draw(scheduler, step_counts, args.output)
        print(f"\nPicture: {args.output}")
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()


if __name__ == "__main__":
    main()
