"""Solvers of mixed order: single-step (Euler, Heun) and multistep (DPM-Solver++ 2M, UniPC), and the rules for the order."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..utils.tensors import FLOAT64
from .curvature import absolute_curvature, relative_curvature
from .grids import check_choice, check_sigmas
from .probability_flow import SIGMA_TIME, DenoiserRequests, ProbabilityFlow, TrajectoryPoint


MultistepForm: TypeAlias = Literal["midpoint", "heun"]


@dataclass(frozen=True)
class CurvatureSwitch:
    """First order until the batch mean of the curvature reaches `tau`, second order from that step on.

    Source: SDM, arXiv 2602.12624, the adaptive solver with `step` switching. There tau is 1e-4 to 1e-3, for data of standard
    deviation 0.5 and sigma up to 80. The curvature is in 1 / sigma: data c times as wide need tau / c.

    Args:
        tau (`float`): Threshold. Not positive: second order wherever possible; infinite: first order throughout.
        relative (`bool`): Compare the relative curvature with it, else the absolute curvature.
        lagged (`bool`): Measure over the step before, as published. Otherwise measure over the step to be taken, through
            the evaluation at its Euler end point, which the next step needs anyway. This needs a single-step solver with
            alpha = 1.
    """

    tau: float
    relative: bool = True
    lagged: bool = True

    def __post_init__(self) -> None:
        if math.isnan(self.tau):
            raise ValueError("`tau` is NaN; give the curvature from which steps are of second order.")


OrderRule: TypeAlias = CurvatureSwitch | Sequence[float] | Tensor
"""A switch, or for each of N steps the weight in [0, 1] of the first-order candidate (1: first order, 0: second)."""


def step_weights(num_steps: int, switch_index: int | None) -> Tensor:
    """First order before step `switch_index`, second from there on; None: always first. Shape `(num_steps,)`."""
    index = num_steps if switch_index is None else switch_index
    return (torch.arange(num_steps, device="cpu") < index).double()


def linear_weights(num_steps: int) -> Tensor:
    """From 1 at the first step to 0 at the last, linearly. Shape `(num_steps,)`."""
    return torch.linspace(1, 0, num_steps, **FLOAT64)


def cosine_weights(num_steps: int) -> Tensor:
    """From 1 at the first step to 0 at the last, along half a cosine. Shape `(num_steps,)`."""
    return 0.5 * (1 + (math.pi * torch.linspace(0, 1, num_steps, **FLOAT64)).cos())


@dataclass
class Trajectory:
    """The result of a solver. N steps, batch of B; all states unscaled, x0 + sigma * noise."""

    sample: Tensor
    """Final state, shape `(B, ...)`."""
    weights: Tensor
    """Weight of the first-order candidate in each step, shape `(N,)`."""
    absolute_curvature: Tensor
    """Shape `(N, B)`; 0 where there is none, as at step 0 of a lagged proxy."""
    relative_curvature: Tensor
    """Shape `(N, B)`."""
    switch_index: int | None
    """First step at which the curvature had reached the threshold; None if it never did, and for fixed weights."""
    num_evaluations: int
    states: list[Tensor]
    """With `keep_states`: the state at the start of each step, then the final one. Otherwise empty."""


@dataclass
class _Recorder:
    """Records the curvature along one trajectory and decides each step's first-order weight."""

    rule: OrderRule
    num_steps: int
    switch_index: int | None = None
    weights: list[float] = field(default_factory=list)
    absolute: list[Tensor] = field(default_factory=list)
    relative: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.switch = self.rule if isinstance(self.rule, CurvatureSwitch) else None
        self.fixed = [] if self.switch else torch.as_tensor(self.rule, **FLOAT64).tolist()
        if self.switch is None and not (
            len(self.fixed) == self.num_steps and all(0 <= weight <= 1 for weight in self.fixed)
        ):
            raise ValueError(f"{self.num_steps} weights in [0, 1] are needed, one for each step, got {self.fixed}.")

    @property
    def looks_ahead(self) -> bool:
        return self.switch is not None and not self.switch.lagged

    def observe(self, drift: Tensor, earlier_drift: Tensor | None, dt: float) -> None:
        """Records the curvature between two drifts; `earlier_drift` is None where there is no earlier one."""
        if earlier_drift is None:
            zeros = drift.new_zeros(len(drift))
            self.absolute.append(zeros)
            self.relative.append(zeros)
        else:
            self.absolute.append(absolute_curvature(drift, earlier_drift, dt))
            self.relative.append(relative_curvature(drift, earlier_drift, dt))

    def first_order_weight(self, step: int) -> float:
        """Weight of `step` by the rule, from the latest observed curvature."""
        if self.switch is None:
            return self.fixed[step]
        if self.switch_index is None:
            curvature = self.relative[-1] if self.switch.relative else self.absolute[-1]
            if curvature.mean().item() >= self.switch.tau:
                self.switch_index = step
        return 1.0 if self.switch_index is None else 0.0

    def trajectory(self, sample: Tensor, num_evaluations: int, states: list[Tensor]) -> Trajectory:
        return Trajectory(
            sample,
            torch.tensor(self.weights, **FLOAT64),
            torch.stack(self.absolute),
            torch.stack(self.relative),
            self.switch_index,
            num_evaluations,
            states,
        )


# Single-step solvers


@dataclass(frozen=True)
class Churn:
    """Noise added before each step whose sigma is in [`s_min`, `s_max`] (EDM, arXiv 2206.00364, algorithm 2).

    Args:
        s_churn (`float`): Total amount; each step's sigma grows by min(s_churn / N, sqrt(2) - 1) of itself.
        s_min (`float`): Lowest sigma that gets noise.
        s_max (`float`): Highest sigma that gets noise.
        s_noise (`float`): Standard deviation of the noise.
        draw_noise (`Callable`): Unit normal noise like its argument. It is called once at every step, so that a seeded
            generator gives the same noise for any range.
        noise_in_curvature (`bool`): Leave the fresh noise in the curvature proxy, as published. The proxy then jumps, and
            the switch comes with the first churned step. By default the drift is compared at the state before the noise.
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
) -> DenoiserRequests[Trajectory]:
    """Euler steps where the trajectory is straight, alpha-Heun steps where it bends, or a blend of both.

    The predictor of Heun is the Euler point, so that the next evaluation is at the same place for either order. A step to
    sigma = 0 is always Euler's. A switch at step k of N costs 2N - 1 - k evaluations.

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
    recorder = _Recorder(rule, num_steps)
    if recorder.looks_ahead and (alpha != 1 or churn is not None):
        raise ValueError("A switch with `lagged=False` needs `alpha=1` and no churn; use `lagged=True`.")
    times = flow.times(sigmas)
    num_evaluations = 0
    states: list[Tensor] = []
    arrival: TrajectoryPoint | None = None
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

        if recorder.looks_ahead and not to_zero:
            middle = yield from flow.evaluate(end, t_next)
            num_evaluations += 1
            recorder.observe(middle.drift, drift, abs(step))
        elif churn is None or churn.noise_in_curvature:
            recorder.observe(drift, previous_drift, abs(t - previous_t))
        else:
            calm_drift = flow.drift(calm_x, calm_t, arrival.denoised)
            recorder.observe(calm_drift, previous_drift, abs(calm_t - previous_t))
        weight = recorder.first_order_weight(i)
        weight = 1.0 if to_zero else weight
        recorder.weights.append(weight)
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
    return recorder.trajectory(x, num_evaluations, states)


def euler(
    x: Tensor, sigmas: Tensor, *, flow: ProbabilityFlow = SIGMA_TIME, keep_states: bool = False
) -> DenoiserRequests[Trajectory]:
    """First order throughout; in sigma time the same as DDIM. N evaluations. Arguments as in [`adaptive_heun`]."""
    return adaptive_heun(x, sigmas, step_weights(len(sigmas) - 1, None), flow=flow, keep_states=keep_states)


def heun(
    x: Tensor, sigmas: Tensor, *, flow: ProbabilityFlow = SIGMA_TIME, keep_states: bool = False
) -> DenoiserRequests[Trajectory]:
    """EDM's second-order solver; 2N - 1 evaluations to sigma = 0. Arguments as in [`adaptive_heun`]."""
    return adaptive_heun(x, sigmas, step_weights(len(sigmas) - 1, 0), flow=flow, keep_states=keep_states)


# Multistep solvers: first or second order with the same single evaluation a step


def adaptive_dpmsolver(
    x: Tensor,
    sigmas: Tensor,
    rule: OrderRule,
    *,
    solver_type: MultistepForm = "midpoint",
    keep_states: bool = False,
) -> DenoiserRequests[Trajectory]:
    """DPM-Solver++ with first-order steps (DDIM) where the trajectory is straight, second-order (2M) where it bends.

    N evaluations for any orders. The first step, and a step to sigma = 0, have no second-order candidate and are of first
    order. The update is the same in every scaling of the ODE; curvature is measured in sigma time.

    Source: SDM, arXiv 2602.12624; DPM-Solver++(2M): arXiv 2211.01095, algorithm 2.

    Args:
        x (`Tensor` of shape `(B, ...)`): x0 + sigmas[0] * noise.
        sigmas (`Tensor` of shape `(N + 1,)`): Descending noise levels, the last may be 0.
        rule (`CurvatureSwitch` or `(N,)` weights): Order of each step. The decision is one for the whole batch.
        solver_type (`str`): `"midpoint"` or `"heun"`, as in Diffusers' `DPMSolverMultistepScheduler`.
        keep_states (`bool`): Return the state of every step, too.

    Returns:
        `Trajectory`.
    """
    check_choice("solver_type", solver_type, MultistepForm)
    return _adaptive_multistep(x, sigmas, rule, solver_type, with_corrector=False, keep_states=keep_states)


def adaptive_unipc(
    x: Tensor, sigmas: Tensor, rule: OrderRule, *, keep_states: bool = False
) -> DenoiserRequests[Trajectory]:
    """UniPC (B(h) = expm1(-h), data prediction) whose steps are first order, or second order with the corrector.

    The second-order predictor is DPM-Solver++(2M). The corrector improves the step before with the evaluation at its end, so
    that there is still one evaluation a step. First-order steps are not corrected; they are DDIM's. With weight 0 throughout
    it is second-order UniPC. Curvature is measured in sigma time.

    Source: UniPC, arXiv 2302.04867, algorithms 5 and 7. SDM's code has UniPC as a baseline only.

    Arguments as in [`adaptive_dpmsolver`]; with `keep_states` the states are those before correction.
    """
    return _adaptive_multistep(x, sigmas, rule, "midpoint", with_corrector=True, keep_states=keep_states)


def _adaptive_multistep(
    x: Tensor, sigmas: Tensor, rule: OrderRule, solver_type: MultistepForm, with_corrector: bool, keep_states: bool
) -> DenoiserRequests[Trajectory]:
    levels = check_sigmas(sigmas).tolist()
    num_steps = len(levels) - 1
    recorder = _Recorder(rule, num_steps)
    if recorder.looks_ahead:
        raise ValueError("A switch with `lagged=False` needs a single-step solver; use `lagged=True`.")
    history: list[TrajectoryPoint] = []  # the newest three, oldest first
    departure = x  # the state at the start of the last step
    states: list[Tensor] = []

    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if keep_states:
            states.append(x)
        here = yield from SIGMA_TIME.evaluate(x, sigma)
        history = [*history[-2:], here]
        last = history[-2] if i > 0 else None
        recorder.observe(here.drift, last.drift if last else None, last.sigma - sigma if last else 0.0)
        if with_corrector and i > 1 and recorder.weights[-1] < 1:
            x = x.lerp(_correct(departure, *history), 1 - recorder.weights[-1])

        ratio = sigma_next / sigma
        departure = x
        x = ratio * x - (ratio - 1) * here.denoised
        weight = 1.0
        if last is not None and sigma_next > 0:
            weight = recorder.first_order_weight(i)
            if weight < 1:
                x = x + (1 - weight) * second_order_term(here, last, sigma_next, solver_type)
        recorder.weights.append(weight)

    if keep_states:
        states.append(x)
    return recorder.trajectory(x, num_steps, states)


def second_order_term(
    here: TrajectoryPoint, last: TrajectoryPoint, sigma_next: float, solver_type: MultistepForm = "midpoint"
) -> Tensor:
    """What DPM-Solver++(2M) adds to the first-order step; h and the earlier step are in log sigma, E = exp(-h) - 1."""
    h = math.log(here.sigma / sigma_next)
    expm1 = sigma_next / here.sigma - 1
    slope = (here.denoised - last.denoised) * (h / math.log(last.sigma / here.sigma))
    return (-0.5 * expm1 if solver_type == "midpoint" else expm1 / h + 1) * slope


def _correct(departure: Tensor, before: TrajectoryPoint, last: TrajectoryPoint, here: TrajectoryPoint) -> Tensor:
    """UniC-2: the step from `last` to `here`, taken again from `departure` with the evaluation at its end."""
    weights = corrector_weights(math.log(last.sigma / here.sigma), math.log(before.sigma / last.sigma))
    ratio = here.sigma / last.sigma
    data = sum(weight * point.denoised for weight, point in zip(weights, (before, last, here)))
    return ratio * departure + (1 - ratio) * data


def corrector_weights(h: float, h_before: float) -> tuple[float, float, float]:
    """UniC-2: weights of the data predictions before a step, at its start and at its end. They sum up to 1.

    Source: UniPC, arXiv 2302.04867, algorithm 5 with B(h) = expm1(-h).

    Args:
        h, h_before (`float`): Length of the step and of the one before it, in log sigma.
    """
    expm1, r = math.expm1(-h), -h_before / h
    phi_1 = -expm1 / h - 1
    b_1, b_2 = phi_1 / expm1, 2 * (-phi_1 / h - 0.5) / expm1
    weight_before = (b_1 - b_2) / (1 - r)
    weight_here = b_1 - weight_before
    return weight_before / r, 1 - weight_before / r - weight_here, weight_here
