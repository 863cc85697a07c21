"""The error of every step of a given list of noise levels."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .error_bound import L2_ERROR, ErrorMeasure, step_error
from .evaluation import Algorithm
from .grids import check_sigmas
from .multistep import second_order_term
from .probability_flow import SIGMA_TIME, Evaluation, ProbabilityFlow


SOLVERS = ("euler", "heun", "dpmsolver++")


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
    solver: Literal["euler", "heun", "dpmsolver++"] = "euler",
    measure: ErrorMeasure = L2_ERROR,
    flow: ProbabilityFlow = SIGMA_TIME,
) -> Algorithm[EtaProfile]:
    """Measure the estimated Wasserstein error of each step along a list of noise levels.

    For Euler, the evaluation at a step's end begins the next step: one evaluation a step. The published code repeats
    it. With `"dpmsolver++"` the drift is compared along a DPM-Solver++(2M) trajectory, as in SDM's text-to-image code.

    Source: SDM, arXiv 2602.12624, the error log that N-step resampling starts from.

    Args:
        x (`Tensor` of shape `(B, ...)`): x0 + sigmas[0] * noise.
        sigmas (`Tensor` of shape `(N + 1,)`): Descending noise levels, the last may be 0.
        solver (`str`): How the trajectories advance.
        measure (`ErrorMeasure`): Norm of the error.
        flow (`ProbabilityFlow`): Time and scaling; only sigma time with `"dpmsolver++"`.
    """
    sigmas = check_sigmas(sigmas)
    if solver not in SOLVERS:
        raise ValueError(f"`solver` = {solver!r} is unknown; choose one of {', '.join(SOLVERS)}.")
    if solver == "dpmsolver++" and flow is not SIGMA_TIME:
        raise ValueError('`solver="dpmsolver++"` works in sigma time; leave `flow` at its default.')
    times = flow.times(sigmas)
    slopes: list[float] = []
    num_evaluations = 0
    last: Evaluation | None = None
    here: Evaluation | None = None

    for (t, t_next), sigma_next in zip(pairwise(times), sigmas[1:].tolist()):
        if here is None:
            here = yield from flow.evaluate(x, t)
            num_evaluations += 1
        end = flow.move(x, here.drift, t, t_next)
        if sigma_next == 0:
            x = end
            slopes.append(0.0)
            continue
        if solver == "dpmsolver++" and last is not None:
            end = end + second_order_term(here, last, sigma_next)
        arrival = yield from flow.evaluate(end, t_next)
        num_evaluations += 1
        slopes.append(measure.slope(here, arrival, abs(t_next - t)))
        if solver == "heun":
            x, last, here = flow.move(x, 0.5 * (here.drift + arrival.drift), t, t_next), here, None
        else:
            x, last, here = end, here, arrival

    lengths = [abs(t_next - t) for t, t_next in pairwise(times)]
    errors = [step_error(slope, dt) for slope, dt in zip(slopes, lengths)]
    eta, slope, dt = torch.tensor([errors, slopes, lengths], dtype=torch.float64)
    return EtaProfile(eta, slope, dt, x, num_evaluations)
