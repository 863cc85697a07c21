"""Solvers that others have published, by name.

The figures are in the folder `published_tables`, a JSON file for every source with its paper, address and licence. Those of Align Your
Steps are in Diffusers. The rules that make solvers of them are here. DyWeight's converter is in `papers`: its files have no licence.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..generalized_solver import GeneralizedSolver, weights_of_coefficients, weights_of_velocities
from ..noise_schedules import NoiseSchedule, VPLinearSchedule
from ..solver_table import SolverTable
from ..utils.diffusers_hooks import AysSchedules
from ..utils.tensors import FLOAT64
from .configs import current_settings


FOLDER = Path(__file__).parent / "published_tables"

# Settings of the schedulers that these solvers are for. Noise levels are as published, whatever the resolution.
SETTINGS: dict[str, Any] = {"t_end": 1e-3, "solver_order": 2, "lower_order_final": True, "use_dynamic_shifting": False}

# Of a first state of flow matching.
HIGHEST_SIGMA = 1 - 1e-4


@dataclass(frozen=True)
class PublishedSolver:
    """What is known of solvers for several step counts.

    Attributes:
        name: By which `GASScheduler.from_published` knows it.
        model: The models with which its authors used it.
        rule: Which of `RULES` the figures are for.
        config: What the config of a network must say for the solver to be valid.
        tables: Figures, by step count.
        paper, source, licence: Where the figures come from.
    """

    name: str
    model: str
    rule: str
    config: Mapping[str, Any]
    tables: Mapping[int, Mapping[str, Any]]
    paper: str
    source: str
    licence: str

    @property
    def method(self) -> str:
        """What the solver does with the network's outputs."""
        return RULES[self.rule][0]

    @property
    def any_steps(self) -> bool:
        """Whether there is a rule for step counts without figures."""
        return self.rule == "levels"

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raises a `ValueError` for the config of a network with another noise schedule or prediction."""
        theirs = current_settings(config, self.config)
        differing = [name for name, value in self.config.items() if theirs.get(name) != value]
        if differing:
            ours, theirs = ({name: found.get(name) for name in differing} for found in (self.config, theirs))
            raise ValueError(f"'{self.name}' is for {self.model}, with {ours}; the config given has {theirs}.")

    def solver(self, num_inference_steps: int, noise_schedule: NoiseSchedule) -> GeneralizedSolver:
        """The solver that samples as published.

        Raises:
            ValueError: If nothing is published for this number of steps.
        """
        if num_inference_steps < 1 or not (self.any_steps or num_inference_steps in self.tables):
            raise ValueError(f"'{self.name}' has solvers for {list(self.tables)} steps, not {num_inference_steps}.")
        figures = self.tables.get(num_inference_steps, next(iter(self.tables.values())))
        solver = RULES[self.rule][1](figures, num_inference_steps, noise_schedule)
        solver.provenance = {name: getattr(self, name) for name in ("method", "model", "paper", "source", "licence")}
        solver.provenance["published_as"] = self.name
        return solver


@cache
def published_solvers() -> dict[str, PublishedSolver]:
    """All published solvers, by name."""
    found = {}
    for path in sorted(FOLDER.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        origin = {name: content[name] for name in ("paper", "source", "licence")}
        for name, entry in content["solvers"].items():
            entry["tables"] = {int(n): table for n, table in entry["tables"].items()}
            found[name] = PublishedSolver(name, **entry, **origin)
    return found


def published_solver(name: str) -> PublishedSolver:
    """The published solver of a name; a `ValueError` lists the names if there is none."""
    if name not in published_solvers():
        raise ValueError(f"There is no published solver '{name}'; choose one of {', '.join(published_solvers())}.")
    return published_solvers()[name]


def _on_levels(figures: Mapping[str, Any], n: int, noise_schedule: NoiseSchedule) -> GeneralizedSolver:
    """DPM-Solver++ 2M on noise levels sigma / alpha, whose logarithms are interpolated for other step counts.

    The list ends at the lowest noise level of the network, rounded (arXiv 2404.14507).
    """
    levels = np.log([*AysSchedules[figures["name"]][:-1], figures["end"]])
    levels = np.exp(np.interp(np.linspace(0, len(levels) - 1, n + 1), np.arange(len(levels)), levels))
    times = noise_schedule.inverse_diffusers_sigma(torch.from_numpy(levels)).clamp(max=1)
    times[-1] = noise_schedule.t_min
    return GeneralizedSolver(n, theory_order=2, t_start=times[0].item(), t_end=times[-1].item(), times=times)


def _of_velocities(figures: Mapping[str, Any], n: int, noise_schedule: NoiseSchedule) -> GeneralizedSolver:
    """NeuralSolver (arXiv 2505.21114) for flow matching: `x[k+1] = x[k] - delta[k] sum_j w[k, j] v[j]`, from sigma = 1.

    The deltas are rounded and add up to 1 but for that. The last state is at sigma = 0 by its name, the first one a little below
    sigma = 1: where the log-SNR is infinite, the theory has no differences of predictions, and its corrections would be large.
    """
    deltas = _deltas(figures)
    evaluated = 1 - deltas.cumsum(0) + deltas
    levels = torch.cat([evaluated.clamp(max=HIGHEST_SIGMA), evaluated.new_zeros(1)])
    times, evaluation_times = (noise_schedule.inverse_diffusers_sigma(sigmas) for sigmas in (levels, evaluated))
    weights = weights_of_velocities(-deltas, _multistep_weights(figures), levels[:-1])
    return GeneralizedSolver.from_table(SolverTable(times, evaluation_times, weights), noise_schedule)


def _of_predictions(figures: Mapping[str, Any], n: int, noise_schedule: NoiseSchedule) -> GeneralizedSolver:
    """NeuralSolver for variance-preserving networks, `x' = sigma'/sigma x + sigma' (r' - r) sum_j w[k, j] D[j]`, r = alpha/sigma.

    alpha and sigma are those of the schedule with beta linear in t, at times down from 0.999, at least 0.001. The network is told
    whole timesteps, rounded down.
    """
    deltas, schedule = _deltas(figures), VPLinearSchedule()
    t = (0.999 - torch.cat([deltas.new_zeros(1), deltas.cumsum(0)])).clamp(min=1e-3)
    sigma, ratio = schedule.sigma(t), schedule.lambda_(t).exp()
    evaluation_times = noise_schedule.inverse_timestep((1000 * t[:-1] + 1e-3).floor())
    weights = weights_of_coefficients(
        torch.diag(sigma[1:] / sigma[:-1]), (sigma[1:] * ratio.diff())[:, None] * _multistep_weights(figures)
    )
    table = SolverTable(noise_schedule.inverse_lambda(schedule.lambda_(t)), evaluation_times, weights)
    return GeneralizedSolver.from_table(table, noise_schedule)


def _deltas(figures: Mapping[str, Any]) -> Tensor:
    return torch.tensor(figures["deltas"], **FLOAT64)


def _multistep_weights(figures: Mapping[str, Any]) -> Tensor:
    """Weights `(n, n)` of the network's outputs: the given ones of past outputs, and for the newest what is left to 1."""
    n = len(figures["deltas"])
    rows = [[*row, 1 - sum(row), *[0.0] * (n - 1 - k)] for k, row in enumerate(figures["coefficients"])]
    return torch.tensor(rows, **FLOAT64)


RULES: dict[str, tuple[str, Callable[[Mapping[str, Any], int, NoiseSchedule], GeneralizedSolver]]] = {
    "levels": ("DPM-Solver++ 2M on published noise levels", _on_levels),
    "velocities": ("published noise levels and weights of velocities", _of_velocities),
    "predictions": ("published noise levels and weights of data predictions", _of_predictions),
}
