"""Local Wasserstein error of an Euler step, estimated from the drift at both of its ends, and its tolerance."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .curvature import sample_norm, sample_rms
from .probability_flow import Evaluation


NORMS = {"l2": sample_norm, "rms": sample_rms}


@dataclass(frozen=True)
class Tolerance:
    """Largest error of a step: eta(sigma) = eta_min + (eta_max - eta_min) (sigma / sigma_max)^p.

    Source: SDM, arXiv 2602.12624; published values: EDM pixel models 0.01 to 0.40 or 0.02 to 0.20, p = 1. Errors in
    the L2 norm grow with the square root of the dimension, so these do, too.

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
    """How the change of the drift over a step is measured; the batch mean of the per-sample norms is taken.

    Args:
        norm (`str`): `"l2"` as published for EDM models, or `"rms"`, which does not depend on the dimension, as
            published for latent models.
        vp_scaled_drift (`bool`): Replace the drift by (x / sqrt(1 + sigma^2) - D) / sigma, as the published
            text-to-image code does. It is the derivative of the state in no frame; for comparison with that code only.
    """

    norm: Literal["l2", "rms"] = "l2"
    vp_scaled_drift: bool = False

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"`norm` = {self.norm!r} is unknown; choose one of {', '.join(NORMS)}.")

    def slope(self, start: Evaluation, end: Evaluation, dt: float) -> float:
        """S = ||f_end - f_start|| / dt, the secant estimate of sup ||df/dt|| over the step.

        Raises:
            ValueError: if a prediction was NaN or infinite.
        """
        change = self._drift(end) - self._drift(start)
        slope = NORMS[self.norm](change).mean().item() / dt
        if not math.isfinite(slope):
            raise ValueError(
                f"The prediction at sigma = {start.sigma} or {end.sigma} is not finite; check the network."
            )
        return slope

    def _drift(self, at: Evaluation) -> Tensor:
        if self.vp_scaled_drift:
            return (at.x / math.sqrt(1 + at.sigma**2) - at.denoised) / at.sigma
        return at.drift


L2_ERROR = ErrorMeasure()


def step_error(slope: float, dt: float) -> float:
    """eta = dt^2 S / 2: the bound dt^2 / 2 sup ||df/dt|| on a step's Wasserstein error, with S for the supremum."""
    return 0.5 * dt**2 * slope


def step_length(slope: float, tolerance: float) -> float:
    """The dt at which `step_error` is the tolerance."""
    return math.sqrt(2 * tolerance / max(slope, 1e-30))
