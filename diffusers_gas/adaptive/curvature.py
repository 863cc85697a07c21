"""How much a trajectory of the probability-flow ODE bends: free finite differences and the exact second derivative.

The exact derivative differentiates the network forwards (`torch.func.jvp`); a network with fused attention needs
`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around the call. It is meant for analysis, not for sampling.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .evaluation import Denoiser
from .interpolation import pchip
from .probability_flow import Coefficients, Evaluation, ProbabilityFlow


def sample_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample: `(B, ...)` to `(B,)`."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def sample_rms(x: Tensor) -> Tensor:
    """Root mean square of each sample's elements, which does not grow with the dimension: `(B, ...)` to `(B,)`."""
    return x.flatten(1).square().mean(1).clamp(min=1e-12).sqrt()


def second_derivative_estimate(drift: Tensor, earlier_drift: Tensor, t: float, earlier_t: float) -> Tensor:
    """Finite-difference estimate of x'' from the drifts at two times, with its proper sign although time runs down.

    The published diagnostic divides by |t - earlier_t| instead and so estimates -x''.
    """
    return (drift - earlier_drift) / (t - earlier_t)


def absolute_curvature(drift: Tensor, earlier_drift: Tensor, dt: float) -> Tensor:
    """||f_i - f_{i-1}|| / dt of each sample, shape `(B,)`; dt > 0 in the units of the ODE's time.

    Source: SDM, arXiv 2602.12624: the absolute form of the curvature proxy.
    """
    return sample_norm(drift - earlier_drift) / dt


def relative_curvature(drift: Tensor, earlier_drift: Tensor, dt: float) -> Tensor:
    """||f_i - f_{i-1}|| / (dt ||f_{i-1}||) of each sample, shape `(B,)`, in units of 1 / time.

    Source: SDM, arXiv 2602.12624: the curvature proxy kappa that decides the solver's order.
    """
    # A sample that does not move at all must not turn the batch mean into NaN.
    speed = sample_norm(earlier_drift).clamp(min=torch.finfo(earlier_drift.dtype).tiny)
    return absolute_curvature(drift, earlier_drift, dt) / speed


@dataclass(frozen=True)
class CurvatureTerms:
    """Directional derivatives of the denoiser at one point of a trajectory; tensors of shape `(B, ...)`."""

    coefficients: Coefficients
    evaluation: Evaluation
    denoised_along_noise: Tensor
    """Derivative of D(x) along e = (x - D)/sigma, the direction in which the unscaled state moves."""
    denoised_along_denoised: Tensor
    """Derivative of D(x) along D/scale."""
    denoised_by_sigma: Tensor
    """dD/dsigma at fixed x."""

    @property
    def noise(self) -> Tensor:
        """scale (x - D) / sigma, the noise prediction times the scale."""
        return self.coefficients.scale * (self.evaluation.x - self.evaluation.denoised) / self.evaluation.sigma

    def second_derivative(self, published: bool = False) -> Tensor:
        """Second time derivative of the scaled state along the ODE, with s = scale and e the noise / scale:

        (s''/s) s x + (s sigma'' + 2 s' sigma') e - (s sigma'^2 / sigma) (J e + dD/dsigma), in sigma time
        -(J e + dD/dsigma) / sigma.

        Args:
            published (`bool`): Use the closed form of SDM's code, which forgets that the argument x/s(t) of the
                denoiser depends on time through s. The same wherever s is constant.
        """
        c = self.coefficients
        sigma_rate_relative = c.sigma_rate / c.sigma
        result = (
            c.scale_acceleration * self.evaluation.x
            + (c.sigma_acceleration + 2 * c.sigma_rate * c.scale_rate / c.scale) * self.noise
            - c.sigma_rate * sigma_rate_relative * c.scale * (self.denoised_along_noise + self.denoised_by_sigma)
        )
        if published:
            missing = self.denoised_along_noise + c.scale / c.sigma * self.denoised_along_denoised
            result = result - c.sigma_rate * c.scale_rate * missing
        return result


def curvature_terms(denoiser: Denoiser, flow: ProbabilityFlow, x: Tensor, t: float) -> CurvatureTerms:
    """Differentiate the denoiser at the unscaled state x of shape `(B, ...)` and the time t of `flow`.

    `denoiser` must be differentiable in both arguments by forward-mode differentiation. Costs one evaluation and three
    directional derivatives.
    """
    sigma = torch.tensor(flow.noise_level(t), dtype=torch.float64)
    denoised = denoiser(x, sigma)
    coefficients = flow.coefficients(t)

    def along(direction: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: denoiser(x, sigma), (x,), (direction,))[1]

    return CurvatureTerms(
        coefficients,
        Evaluation(x, sigma.item(), denoised, flow.drift(x, t, denoised)),
        denoised_along_noise=along((x - denoised) / sigma.item()),
        denoised_along_denoised=along(denoised / coefficients.scale),
        denoised_by_sigma=torch.func.jvp(lambda sigma: denoiser(x, sigma), (sigma,), (torch.ones_like(sigma),))[1],
    )


def normalized_time(sigmas: Tensor, knot_sigmas: Tensor, cumulative_cost: Tensor, rho: float = 7.0) -> Tensor:
    """u-hat: share of the cumulative score-difference cost that lies below each noise level, from 1 down to 0.

    A criterion for the switch that depends on the noise level only: pass the first index where it is below a cut to
    `step_weights`. Source: SDM, arXiv 2602.12624, the `uhat` metric.

    Args:
        sigmas (`Tensor` of shape `(N,)`): Descending, positive noise levels; u-hat is 1 at the first and 0 at the
            last.
        knot_sigmas (`Tensor` of shape `(K,)`): Where the cost is known, strictly ascending.
        cumulative_cost (`Tensor` of shape `(K,)`): As `score_difference_costs` returns it.
        rho (`float`): The cost is interpolated over sigma^(1/rho).
    """
    cost = pchip(knot_sigmas ** (1 / rho), cumulative_cost, sigmas ** (1 / rho))
    return (cost - cost[-1]) / (cost[0] - cost[-1])
