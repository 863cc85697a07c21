"""Curvature of trajectories of the probability-flow ODE: finite differences for free, and the exact second derivative.

The exact derivative is for analysis, not for sampling. It differentiates the network twice backwards
(`torch.autograd.functional.jvp`), because forward-mode differentiation fails in the group normalization of Diffusers' networks.
A network with fused attention needs `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around the call.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.functional import jvp

from ..utils.tensors import FLOAT64
from .probability_flow import Coefficients, Denoiser, ProbabilityFlow, TrajectoryPoint


def sample_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample: `(B, ...)` to `(B,)`."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def sample_rms(x: Tensor) -> Tensor:
    """Root mean square of each sample's elements, which does not grow with the dimension: `(B, ...)` to `(B,)`."""
    return x.flatten(1).square().mean(1).clamp(min=1e-12).sqrt()


def absolute_curvature(drift: Tensor, earlier_drift: Tensor, dt: float) -> Tensor:
    """||f_i - f_{i-1}|| / dt of each sample, shape `(B,)`; dt > 0 in the units of the ODE's time.

    Source: SDM, arXiv 2602.12624, the absolute form of the curvature proxy.
    """
    return sample_norm(drift - earlier_drift) / dt


def relative_curvature(drift: Tensor, earlier_drift: Tensor, dt: float) -> Tensor:
    """||f_i - f_{i-1}|| / (dt ||f_{i-1}||) of each sample, shape `(B,)`, in units of 1 / time.

    Source: SDM, arXiv 2602.12624, the curvature proxy kappa that decides the solver's order.
    """
    # A sample that does not move must not turn the batch mean into NaN.
    speed = sample_norm(earlier_drift).clamp(min=torch.finfo(earlier_drift.dtype).tiny)
    return absolute_curvature(drift, earlier_drift, dt) / speed


@dataclass(frozen=True)
class CurvatureTerms:
    """Directional derivatives of the denoiser at one point of a trajectory; tensors of shape `(B, ...)`."""

    coefficients: Coefficients
    point: TrajectoryPoint
    denoised_along_noise: Tensor
    """Derivative of D(x) along e = (x - D) / sigma, the direction in which the unscaled state moves."""
    denoised_along_denoised: Tensor
    """Derivative of D(x) along D / scale."""
    denoised_by_sigma: Tensor
    """dD/dsigma at fixed x."""

    @property
    def noise(self) -> Tensor:
        """scale (x - D) / sigma, the noise prediction times the scale."""
        return self.coefficients.scale * (self.point.x - self.point.denoised) / self.point.sigma

    def second_derivative(self, published: bool = False) -> Tensor:
        """Second time derivative of the scaled state along the ODE.

        With s = scale and e = (x - D) / sigma it is s'' x + (s sigma'' + 2 s' sigma') e - (s sigma'^2 / sigma)
        (J e + dD/dsigma). In sigma time it is -(J e + dD/dsigma) / sigma.

        Args:
            published (`bool`): Use the closed form of SDM's code. It neglects that the argument x / s(t) of the denoiser
                depends on time through s. Both forms agree wherever s is constant.
        """
        c = self.coefficients
        sigma_rate_relative = c.sigma_rate / c.sigma
        result = (
            c.scale_acceleration * self.point.x
            + (c.sigma_acceleration + 2 * c.sigma_rate * c.scale_rate / c.scale) * self.noise
            - c.sigma_rate * sigma_rate_relative * c.scale * (self.denoised_along_noise + self.denoised_by_sigma)
        )
        if published:
            missing = self.denoised_along_noise + c.scale / c.sigma * self.denoised_along_denoised
            result = result - c.sigma_rate * c.scale_rate * missing
        return result


def curvature_terms(denoiser: Denoiser, flow: ProbabilityFlow, x: Tensor, t: float) -> CurvatureTerms:
    """Differentiates the denoiser at one point. The cost is one evaluation and three directional derivatives.

    Args:
        denoiser: D(x; sigma), twice differentiable in both arguments.
        flow (`ProbabilityFlow`): Time and scaling.
        x (`Tensor` of shape `(B, ...)`): Unscaled state x0 + sigma * noise.
        t (`float`): The time of `flow`; in sigma time the noise level.
    """
    sigma = torch.tensor(flow.noise_level(t), **FLOAT64)
    denoised = denoiser(x, sigma).detach()
    coefficients = flow.coefficients(t)

    def along(direction: Tensor) -> Tensor:
        return jvp(lambda x: denoiser(x, sigma), x, direction)[1]

    return CurvatureTerms(
        coefficients,
        flow.point(x, t, denoised),
        denoised_along_noise=along((x - denoised) / sigma.item()),
        denoised_along_denoised=along(denoised / coefficients.scale),
        denoised_by_sigma=jvp(lambda sigma: denoiser(x, sigma), sigma, torch.ones_like(sigma))[1],
    )
