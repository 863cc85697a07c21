"""Single-step solvers: Euler, (alpha-)Heun, and the adaptive choice between them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .evaluation import Algorithm
from .grids import check_sigmas
from .order_rules import OrderRule, OrderSelector, Trajectory, step_weights
from .probability_flow import SIGMA_TIME, Evaluation, ProbabilityFlow


@dataclass(frozen=True)
class Churn:
    """Noise added before each step whose sigma is in [`s_min`, `s_max`] (EDM, arXiv 2206.00364, algorithm 2).

    Args:
        s_churn (`float`): Total amount; each step's sigma grows by min(s_churn / N, sqrt(2) - 1) of itself.
        s_min (`float`): Lowest sigma that gets noise.
        s_max (`float`): Highest sigma that gets noise.
        s_noise (`float`): Standard deviation of the noise.
        draw_noise (`Callable`): Unit normal noise like its argument; called once at every step, so that a seeded
            generator gives the same noise for any range.
        noise_in_curvature (`bool`): Leave the fresh noise in the curvature proxy, as published: it then jumps and the
            switch comes with the first churned step. By default the drift is compared at the state before the noise.
    """

    s_churn: float
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    draw_noise: Callable[[Tensor], Tensor] = torch.randn_like
    noise_in_curvature: bool = False

    def apply(self, x: Tensor, sigma: float, num_steps: int) -> tuple[Tensor, float]:
        """The unscaled state with noise added, and its sigma."""
        noise = self.draw_noise(x)
        if not self.s_min <= sigma <= self.s_max:
            return x, sigma
        sigma_hat = sigma * (1 + min(self.s_churn / num_steps, math.sqrt(2) - 1))
        return x + math.sqrt(sigma_hat**2 - sigma**2) * self.s_noise * noise, sigma_hat


def adaptive_heun(
    x: Tensor,
    sigmas: Tensor,
    rule: OrderRule,
    *,
    alpha: float = 1.0,
    flow: ProbabilityFlow = SIGMA_TIME,
    churn: Churn | None = None,
    keep_states: bool = False,
) -> Algorithm[Trajectory]:
    """Euler steps where the trajectory is straight, alpha-Heun steps where it bends, or a blend of both.

    The predictor of Heun is the Euler point, so whatever is decided, the next evaluation is made at the same place. A
    step to sigma = 0 is always Euler. A switch at step k of N costs 2N - 1 - k evaluations.

    Source: SDM, arXiv 2602.12624, adaptive solver; alpha-Heun: EDM, arXiv 2206.00364, algorithm 3.

    Args:
        x (`Tensor` of shape `(B, ...)`): x0 + sigmas[0] * noise.
        sigmas (`Tensor` of shape `(N + 1,)`): Descending noise levels, the last may be 0.
        rule (`CurvatureSwitch` or `(N,)` weights): Order of each step. The decision is one for the whole batch.
        alpha (`float`): Position of the second evaluation within the step: 1 Heun, 2/3 Ralston, 1/2 midpoint.
        flow (`ProbabilityFlow`): Time and scaling in which steps are straight; tau is in units of 1 / its time.
        churn (`Churn`, *optional*): Add noise before steps.
        keep_states (`bool`): Return the state of every step, too.

    Returns:
        `Trajectory`.
    """
    sigmas = check_sigmas(sigmas)
    if not 0 < alpha <= 1:
        raise ValueError(f"`alpha` must be in (0, 1], got {alpha}; 1 is Heun, 1/2 the midpoint rule.")
    num_steps = len(sigmas) - 1
    selector = OrderSelector(rule, num_steps)
    if selector.looks_ahead and (alpha != 1 or churn is not None):
        raise ValueError("A switch with `lagged=False` needs `alpha=1` and no churn; use `lagged=True`.")
    times = flow.times(sigmas)
    num_evaluations = 0
    states: list[Tensor] = []
    arrival: Evaluation | None = None
    previous_drift, previous_t = None, times[0]

    for i in range(num_steps):
        t, t_next = times[i], times[i + 1]
        calm_x, calm_t = x, t
        if churn is not None:
            x, sigma = churn.apply(x, sigmas[i].item(), num_steps)
            t = flow.time(sigma)
        if keep_states:
            states.append(x)
        if arrival is None:
            arrival = yield from flow.evaluate(x, t)
            num_evaluations += 1
        drift, middle = arrival.drift, None
        step = t_next - t
        end = flow.move(x, drift, t, t_next)
        to_zero = sigmas[i + 1] == 0

        if selector.looks_ahead and not to_zero:
            middle = yield from flow.evaluate(end, t_next)
            num_evaluations += 1
            selector.observe(middle.drift, drift, abs(step))
        elif churn is None or churn.noise_in_curvature:
            selector.observe(drift, previous_drift, abs(t - previous_t))
        else:
            calm_drift = flow.drift(calm_x, calm_t, arrival.denoised)
            selector.observe(calm_drift, previous_drift, abs(calm_t - previous_t))
        weight = selector.first_order_weight(i)
        weight = 1.0 if to_zero else weight
        selector.weights.append(weight)
        previous_drift, previous_t = drift, t

        if weight == 1:
            x, arrival = end, middle
            continue
        if middle is None:
            t_middle = t + alpha * step
            middle = yield from flow.evaluate(flow.move(x, drift, t, t_middle), t_middle)
            num_evaluations += 1
        # lambda x_Euler + (1 - lambda) x_Heun, as one step along the weighted slope.
        share = (1 - weight) / (2 * alpha)
        x = flow.move(x, (1 - share) * drift + share * middle.drift, t, t_next)
        arrival = None

    if keep_states:
        states.append(x)
    return selector.trajectory(x, num_evaluations, states)


def euler(x: Tensor, sigmas: Tensor, *, flow: ProbabilityFlow = SIGMA_TIME) -> Algorithm[Trajectory]:
    """First order throughout; in sigma time the same as DDIM. N evaluations. Arguments as in `adaptive_heun`."""
    return adaptive_heun(x, sigmas, step_weights(len(sigmas) - 1, None), flow=flow)


def heun(x: Tensor, sigmas: Tensor, *, flow: ProbabilityFlow = SIGMA_TIME) -> Algorithm[Trajectory]:
    """EDM's second-order solver; 2N - 1 evaluations to sigma = 0. Arguments as in `adaptive_heun`."""
    return adaptive_heun(x, sigmas, step_weights(len(sigmas) - 1, 0), flow=flow)
