"""Local Wasserstein error of an Euler step, estimated from the drift at both of its ends, and its tolerance."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..time_grids import check_choice, check_sigmas
from ..utils.tensors import FLOAT64
from .curvature import sample_norm, sample_rms
from .probability_flow import SIGMA_TIME, DenoiserRequests, ProbabilityFlow, TrajectoryPoint
from .stepping import Watch, follow, multistep_table, single_step_table, step_weights


Number = TypeVar("Number", float, Tensor)
Norm: TypeAlias = Literal["l2", "rms"]
ProfiledSolver: TypeAlias = Literal["euler", "heun", "dpmsolver++"]


@dataclass(frozen=True)
class Tolerance:
    """Largest error of a step: eta(sigma) = eta_min + (eta_max - eta_min) (sigma / sigma_max)^p.

    Source: SDM, arXiv 2602.12624; published values: EDM pixel models 0.01 to 0.40 or 0.02 to 0.20, p = 1. Errors in the L2
    norm, and so their tolerances, grow with the square root of the dimension.

    Args:
        eta_min (`float`): Tolerance at low noise, positive.
        eta_max (`float`): Tolerance at the highest noise level, at least `eta_min`.
        p (`float`): Exponent, not negative.
    """

    eta_min: float
    eta_max: float
    p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.eta_min <= self.eta_max < math.inf:
            raise ValueError(
                f"0 < eta_min <= eta_max must hold, got eta_min = {self.eta_min}, eta_max = {self.eta_max}; "
                "for a constant tolerance give the same value twice."
            )
        if not 0 <= self.p < math.inf:
            raise ValueError(f"`p` must be finite and not negative, got {self.p}.")

    def __call__(self, sigma: float, sigma_max: float) -> float:
        return self.eta_min + (self.eta_max - self.eta_min) * min(max(sigma / sigma_max, 0.0), 1.0) ** self.p


@dataclass(frozen=True)
class ErrorMeasure:
    """How the change of the drift over a step is measured: as the batch mean of a norm of each sample.

    Args:
        norm (`str`): `"l2"` as published for EDM models, or `"rms"`, which does not depend on the dimension, as published
            for latent models.
        vp_scaled_drift (`bool`): Replace the drift by (x / sqrt(1 + sigma^2) - D) / sigma, as the published text-to-image
            code does. It is not the derivative of the state in any scaling; it is for comparison with that code only.
    """

    norm: Norm = "l2"
    vp_scaled_drift: bool = False

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, Norm)

    def slope(self, start: TrajectoryPoint, end: TrajectoryPoint) -> float:
        """S = ||f_end - f_start|| / |change of time|, the secant estimate of sup ||df/dt|| over the step.

        Raises:
            ValueError: If a prediction was NaN or infinite.
        """
        norm = sample_rms if self.norm == "rms" else sample_norm
        slope = norm(self._drift(end) - self._drift(start)).mean().item() / abs(end.t - start.t)
        if not math.isfinite(slope):
            raise ValueError(
                f"The prediction at sigma = {start.sigma} or {end.sigma} is not finite; check the network."
            )
        return slope

    def _drift(self, at: TrajectoryPoint) -> Tensor:
        if self.vp_scaled_drift:
            return (at.x / math.sqrt(1 + at.sigma**2) - at.denoised) / at.sigma
        return at.drift


L2_ERROR = ErrorMeasure()


def step_error(slope: Number, dt: Number) -> Number:
    """eta = dt^2 S / 2: the bound dt^2 / 2 sup ||df/dt|| on a step's Wasserstein error, with S for the supremum."""
    return 0.5 * dt**2 * slope


def step_length(slope: float, tolerance: float) -> float:
    """The dt at which `step_error` is the tolerance."""
    return math.sqrt(2 * tolerance / max(slope, 1e-30))


@dataclass(frozen=True)
class EtaProfile:
    """Result of `eta_profile`, one entry for each of N steps."""

    eta: Tensor
    """Estimated error dt^2 S / 2, float64 of shape `(N,)`; 0 for a step to sigma = 0, where there is no drift."""
    slope: Tensor
    """S, change of the drift per unit of time, shape `(N,)`; 0 for a step to sigma = 0."""
    dt: Tensor
    """|change of time|, shape `(N,)`."""
    sample: Tensor
    """Final unscaled state, shape `(B, ...)`."""
    num_evaluations: int


def eta_profile(
    x: Tensor,
    sigmas: Tensor,
    *,
    solver: ProfiledSolver = "euler",
    measure: ErrorMeasure = L2_ERROR,
    flow: ProbabilityFlow = SIGMA_TIME,
) -> DenoiserRequests[EtaProfile]:
    """Measures the estimated Wasserstein error of each step along a list of noise levels.

    For Euler, the evaluation at a step's end begins the next step: one evaluation a step. The published code repeats it.
    With `"dpmsolver++"` the drift is compared along a DPM-Solver++(2M) trajectory, as in SDM's text-to-image code.

    Source: SDM, arXiv 2602.12624, the error log that N-step resampling starts from.

    Args:
        x (`Tensor` of shape `(B, ...)`): x0 + sigmas[0] * noise.
        sigmas (`Tensor` of shape `(N + 1,)`): Descending noise levels, the last is 0.
        solver (`str`): How the trajectories advance: `"euler"`, `"heun"` or `"dpmsolver++"`.
        measure (`ErrorMeasure`): Norm of the error.
        flow (`ProbabilityFlow`): Time and scaling; only sigma time with `"dpmsolver++"`.
    """
    levels = check_sigmas(sigmas)
    check_choice("solver", solver, ProfiledSolver)
    if levels[-1] > 0 or (solver == "dpmsolver++" and flow is not SIGMA_TIME):
        raise ValueError(
            'Noise levels must end with 0, and `solver="dpmsolver++"` works in sigma time, without `flow`; got '
            f"{levels.tolist()} for '{solver}'."
        )
    times = flow.inverse_sigma(levels)
    make_table = partial(single_step_table, starts=times[:-1], ends=times[1:], flow=flow)
    if solver == "dpmsolver++":
        make_table = partial(multistep_table, levels=levels)
    watch = Watch(compare=measure.slope, looks_ahead=True)
    order_weights = step_weights(len(levels) - 1, None if solver == "euler" else 0)
    sample, table, _ = yield from follow(x, levels[:-1], make_table, order_weights, watch, flow)
    slope = torch.tensor([*(watch.records[i] for i in range(len(levels) - 2)), 0.0], **FLOAT64)
    dt = -times.diff()
    return EtaProfile(step_error(slope, dt), slope, dt, sample, len(table.times))
