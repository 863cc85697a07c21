"""The probability-flow ODE in a chosen time and scaling, and how a method asks for network evaluations."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..noise_schedules import NoiseSchedule
from ..utils.tensors import FLOAT64


T = TypeVar("T")

DenoiserRequests: TypeAlias = Generator[tuple[Tensor, Tensor], Tensor, T]
"""Yields `x = x0 + sigma * noise`, shape `(B, ...)`, and `sigma`, a 0-dim float64 tensor; is sent `D(x; sigma)`."""

Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`D(x; sigma)`: the prediction of x0 for `x = x0 + sigma * noise`, of x's shape."""


def run(requests: DenoiserRequests[T], denoiser: Denoiser) -> T:
    """Answers all requests of a method with `denoiser(x, sigma)` and returns the method's result."""
    try:
        request = next(requests)
        while True:
            request = requests.send(denoiser(*request))
    except StopIteration as stop:
        return stop.value


class TrajectoryPoint(NamedTuple):
    """One point of a trajectory, after one network evaluation; tensors have shape `(B, ...)`."""

    x: Tensor
    """Unscaled state x0 + sigma * noise."""
    sigma: float
    denoised: Tensor
    """Data prediction D(x; sigma)."""
    drift: Tensor
    """d(scale * x)/dt, the right-hand side of the ODE."""
    t: float
    """The time of the ODE."""


class Coefficients(NamedTuple):
    """Values and time derivatives of scale and sigma at one time."""

    scale: float
    scale_rate: float
    scale_acceleration: float
    sigma: float
    sigma_rate: float
    sigma_acceleration: float


@dataclass(frozen=True)
class ProbabilityFlow:
    """The ODE whose solution is distributed like scale(t) (x0 + sigma(t) noise) (EDM, arXiv 2206.00364, eq. 4).

    All states that enter or leave a method are unscaled, x = x0 + sigma * noise. The scaling and the time decide which
    quantity moves along straight lines within a step. Curvature and errors are measured in `t`. They mean "bending of the
    trajectory" in sigma time only; elsewhere the change of variables bends, too.

    Args:
        scale (`Callable`): s(t), float64 tensor to tensor.
        sigma (`Callable`): Noise level sigma(t) at unit signal, increasing.
        inverse_sigma (`Callable`): The time of a noise level.
    """

    scale: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    inverse_sigma: Callable[[Tensor], Tensor]

    @classmethod
    def from_noise_schedule(cls, schedule: NoiseSchedule) -> "ProbabilityFlow":
        """The ODE of alpha(t) x0 + sigma(t) noise in the schedule's own t: VP, EDM's ramp, or flow matching.

        Flow matching ends in pure noise at t = 1, where the unscaled state is infinite. Start slightly below, e.g. at
        sigma / alpha = 1e4.
        """
        return cls(
            scale=schedule.alpha,
            sigma=lambda t: schedule.sigma(t) / schedule.alpha(t),
            inverse_sigma=lambda sigma: schedule.inverse_lambda(-sigma.log()),
        )

    def time(self, sigma: float) -> float:
        return self.inverse_sigma(_scalar(sigma)).item()

    def noise_level(self, t: float) -> float:
        return self.sigma(_scalar(t)).item()

    def coefficients(self, t: float) -> Coefficients:
        return Coefficients(*_taylor(self.scale, t), *_taylor(self.sigma, t))

    def drift_weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of x and D in the drift at times `t`; with the amplitude b = scale sigma: (b'/b) scale and scale' - scale b'/b.

        This form has no cancelling terms where scale tends to 0, as it does at the noise end of flow matching.
        """
        if (
            self is SIGMA_TIME
        ):  # PyTorch's forward derivatives take turns in one process: threads that sample would not be free
            return 1 / t, -1 / t
        scale, scale_rate = _value_and_rate(self.scale, t)
        amplitude, amplitude_rate = _value_and_rate(lambda t: self.scale(t) * self.sigma(t), t)
        growth = scale * amplitude_rate / amplitude
        return growth, scale_rate - growth

    def drift(self, x: Tensor, t: float, denoised: Tensor) -> Tensor:
        """Right-hand side of the ODE, d(scale x)/dt."""
        of_x, of_denoised = self.drift_weights(_scalar(t))
        return of_x.item() * x + of_denoised.item() * denoised

    def point(self, x: Tensor, t: float, denoised: Tensor) -> TrajectoryPoint:
        """The point (x, t) with its data prediction."""
        return TrajectoryPoint(x, self.noise_level(t), denoised, self.drift(x, t, denoised), t)

    def evaluate(self, x: Tensor, t: float) -> DenoiserRequests[TrajectoryPoint]:
        """Requests the data prediction at (x, t)."""
        denoised = yield x, self.sigma(_scalar(t))
        return self.point(x, t, denoised)

    def move(self, x: Tensor, drift: Tensor, t: float, t_next: float) -> Tensor:
        """The unscaled state at `t_next` after a straight line of slope `drift` from (x, t)."""
        scale, scale_next = self.scale(_scalar(t)).item(), self.scale(_scalar(t_next)).item()
        return (scale * x + (t_next - t) * drift) / scale_next


SIGMA_TIME = ProbabilityFlow(torch.ones_like, torch.clone, torch.clone)
"""EDM: t = sigma, no scaling. The published results and thresholds of SDM refer to this time."""

VE_TIME = ProbabilityFlow(torch.ones_like, torch.sqrt, torch.square)
"""VE: sigma = sqrt(t), no scaling (Song et al., arXiv 2011.13456)."""


def _scalar(value: float) -> Tensor:
    return torch.tensor(float(value), **FLOAT64)


def _value_and_rate(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    result = torch.func.jvp(function, (t,), (torch.ones_like(t),))
    return result[0], result[1]


def _taylor(function: Callable[[Tensor], Tensor], t: float) -> tuple[float, float, float]:
    """Value, first and second derivative of a scalar function."""
    value, rate = _value_and_rate(function, _scalar(t))
    _, acceleration = _value_and_rate(lambda t: _value_and_rate(function, t)[1], _scalar(t))
    return value.item(), rate.item(), acceleration.item()
