"""One solver for a range of guidance scales: the parameters of a [`GeneralizedSolver`] as functions of the scale."""

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .generalized_solver import GeneralizedSolver
from .noise_schedules import NoiseSchedule
from .solver_table import SolverTable
from .utils.tensors import FLOAT64


class GuidedSolver(nn.Module):
    """A [`GeneralizedSolver`] for every guidance scale of a range.

    Its parameters are those of a solver at each of K scales, the knots. Between these every parameter is the polynomial in the
    logarithm of the scale that passes through its values at the knots. Outside the range the solver is that of the nearest end.

    Args:
        knots (`Sequence[GeneralizedSolver]`): The solvers at the knots, alike but for their parameters.
        scales (`Sequence[float]`): The K guidance scales, ascending and positive.
        argument (`str`, defaults to `"guidance_scale"`): The argument of the pipeline's call that is the scale.
        usual_scale (`float`, *optional*): The scale where none is known; the highest of the range by default.

    `provenance` is a JSON-like record of what trained the solver, kept in its file.
    """

    def __init__(
        self,
        knots: Sequence[GeneralizedSolver],
        scales: Sequence[float],
        argument: str = "guidance_scale",
        usual_scale: float | None = None,
    ):
        super().__init__()
        scales = [float(scale) for scale in scales]
        ascending = all(0 < low < high < math.inf for low, high in pairwise(scales))
        if len(scales) != len(knots) or len(scales) < 2 or not ascending:
            raise ValueError(f"A range needs 2 or more guidance scales, positive and ascending, got {scales}.")
        kinds = {repr(knot.config()) + repr(knot.theory_orders.tolist()) for knot in knots}
        if len(kinds) > 1:
            raise ValueError("The knots must be solvers that differ in their parameters only.")
        self.knots: Any = nn.ModuleList(knots)
        self.scales, self.argument = scales, str(argument)
        self.usual_scale = self.nearest(self.scales[-1] if usual_scale is None else float(usual_scale))
        self.num_inference_steps, self.t_end = knots[0].num_inference_steps, knots[0].t_end
        self.num_learned = sum(knot.num_learned for knot in knots)
        self.provenance: dict[str, Any] = {}

    @classmethod
    def through(
        cls, solver: "GeneralizedSolver | GuidedSolver", scales: Sequence[float], *settings: Any
    ) -> "GuidedSolver":
        """A solver that is at each of the scales what another one is there, for a fit to start from."""
        return cls([copy.deepcopy(solver.at(scale)) for scale in scales], scales, *settings)

    def config(self) -> dict[str, Any]:
        """What, beside the tensors of `state_dict`, makes the solver; see [`from_tensors`]."""
        own = {name: getattr(self, name) for name in ("scales", "argument", "usual_scale")}
        return {**self.knots[0].config(), **own}

    def clamp_offsets(self) -> None:
        """See [`GeneralizedSolver.clamp_offsets`]."""
        for knot in self.knots:
            knot.clamp_offsets()

    def content(self) -> tuple[bytes, ...]:
        """Config and parameters as bytes: equal for solvers with equal tables."""
        return repr(self.config()).encode(), *(part for knot in self.knots for part in knot.content())

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], **config: Any) -> "GuidedSolver":
        """The solver of a `state_dict` and a `config`; a `ValueError` names what is missing, extra or misshapen."""
        scales, argument, usual_scale = (config.pop(name) for name in ("scales", "argument", "usual_scale"))
        prefixes = [f"knots.{k}." for k in range(len(scales))]
        found = [
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in prefixes
        ]
        if sum(map(len, found)) != len(tensors):
            raise ValueError(f"expected the tensors of {len(scales)} knots, got {sorted(tensors)}")
        knots = [GeneralizedSolver.from_tensors(some, **config) for some in found]
        return cls(knots, scales, argument, usual_scale)

    def nearest(self, scale: float) -> float:
        """The scale within the range that is nearest to another."""
        return min(max(scale, self.scales[0]), self.scales[-1])

    def basis(self, scale: float) -> Tensor:
        """Weights `(K,)` of the knots' parameters in those at a scale: Lagrange's polynomials in the scale's logarithm."""
        knots = torch.tensor([math.log(knot) for knot in self.scales], **FLOAT64)
        differences = (math.log(self.nearest(scale)) - knots).expand(len(knots), -1)
        denominators = knots[:, None] - knots
        return (differences / denominators).fill_diagonal_(1).prod(dim=1)

    @torch.no_grad()
    def at(self, scale: float | None = None) -> GeneralizedSolver:
        """The solver for a scale, the usual one by default; a copy."""
        weights = self.basis(self.usual_scale if scale is None else scale)
        solver: GeneralizedSolver = copy.deepcopy(self.knots[0])
        for parameter, *values in zip(solver.parameters(), *(knot.parameters() for knot in self.knots)):
            parameter.copy_(sum(weight * value for weight, value in zip(weights, values)))
        solver.provenance = self.provenance
        return solver

    def table(self, noise_schedule: NoiseSchedule, begin: int = 0) -> SolverTable:
        """The table for the usual scale; see [`GeneralizedSolver.table`]."""
        return self.at().table(noise_schedule, begin)

    def with_one_more_step(self) -> "GuidedSolver":
        """A warm start; see [`GeneralizedSolver.with_one_more_step`]."""
        knots = [knot.with_one_more_step() for knot in self.knots]
        return GuidedSolver(knots, self.scales, self.argument, self.usual_scale)
