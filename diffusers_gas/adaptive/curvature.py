"""The exact second derivative of trajectories of the probability-flow ODE.

It is for analysis, not for sampling. It differentiates the network twice backwards (`torch.autograd.functional.jvp`), because
forward-mode differentiation fails in the group normalization of Diffusers' networks. A network with fused attention needs
`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around the call.
"""

import torch
from torch import Tensor
from torch.autograd.functional import jvp

from ..utils.tensors import FLOAT64
from .solvers import Denoiser, ProbabilityFlow, value_and_rate


def second_derivative(
    denoiser: Denoiser, flow: ProbabilityFlow, x: Tensor, t: float, *, published: bool = False
) -> Tensor:
    """Second time derivative of the scaled state along the ODE at one point, shape `(B, ...)`.

    It is the derivative of the drift f(y, t) along (f, 1), the direction in which the scaled state y and the time move. In sigma
    time it is -(J e + dD/dsigma) / sigma, with J the Jacobian of D and e = (x - D) / sigma.

    Args:
        denoiser: D(x; sigma), twice differentiable in both arguments.
        flow (`ProbabilityFlow`): Time and scaling.
        x (`Tensor` of shape `(B, ...)`): Unscaled state x0 + sigma * noise.
        t (`float`): The time of `flow`; in sigma time the noise level.
        published (`bool`): Use the closed form of SDM's code. It neglects that the argument x = y / scale(t) of the denoiser
            depends on time through the scale. Both forms agree wherever the scale is constant.
    """
    time = torch.tensor(t, **FLOAT64)

    def drift(y: Tensor, t: Tensor) -> Tensor:
        of_x, of_denoised = flow.drift_weights(t)
        x = y / flow.scale(t)
        return of_x * x + of_denoised * denoiser(x, flow.sigma(t))

    y = flow.scale(time) * x
    exact = jvp(drift, (y, time), (drift(y, time).detach(), torch.ones_like(time)))[1]
    if not published:
        return exact
    sigma, sigma_rate = value_and_rate(flow.sigma, time)
    _, scale_rate = value_and_rate(flow.scale, time)
    along_state = jvp(lambda x: denoiser(x, sigma), x, x)[1]
    return exact - sigma_rate * scale_rate / sigma * along_state
