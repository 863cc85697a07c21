"""The exact second derivative of trajectories of the probability-flow ODE.

It is for analysis, not for sampling. It differentiates the network twice backwards (`torch.autograd.functional.jvp`), because
forward-mode differentiation fails in the group normalization of Diffusers' networks. A network with fused attention needs
`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around the call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.functional import jvp

from ..utils.tensors import FLOAT64
from .solvers import Denoiser, ProbabilityFlow, TrajectoryPoint, value_and_rate


class Coefficients(NamedTuple):
    """Values and time derivatives of scale and sigma at one time."""

    scale: float
    scale_rate: float
    scale_acceleration: float
    sigma: float
    sigma_rate: float
    sigma_acceleration: float


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
    coefficients = Coefficients(*_taylor(flow.scale, t), *_taylor(flow.sigma, t))

    def along(direction: Tensor) -> Tensor:
        return jvp(lambda x: denoiser(x, sigma), x, direction)[1]

    return CurvatureTerms(
        coefficients,
        flow.point(x, t, denoised),
        denoised_along_noise=along((x - denoised) / sigma.item()),
        denoised_along_denoised=along(denoised / coefficients.scale),
        denoised_by_sigma=jvp(lambda sigma: denoiser(x, sigma), sigma, torch.ones_like(sigma))[1],
    )


def _taylor(function: Callable[[Tensor], Tensor], t: float) -> tuple[float, float, float]:
    """Value, first and second derivative of a scalar function."""
    at = torch.tensor(t, **FLOAT64)
    value, rate = value_and_rate(function, at)
    _, acceleration = value_and_rate(lambda t: value_and_rate(function, t)[1], at)
    return value.item(), rate.item(), acceleration.item()
