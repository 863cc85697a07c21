"""The probability-flow ODE in a chosen time and scaling, and its solvers of mixed order: single-step (Euler, Heun) and multistep
(DPM-Solver++ 2M and 3M, UniPC).

A solver is the rows of a table, and a watch decides on the order of its steps. Sampling with a plan, calibration, and the methods
of this folder take these rows; the scheduler's online mode asks the watch. All states are unscaled, x = x0 + sigma * noise.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..noise_schedules import NoiseSchedule, check_choice, check_sigmas
from ..solver_table import ExponentialIntegrator, History, last_uses
from ..utils.tensors import FLOAT64


T = TypeVar("T")

MultistepForm: TypeAlias = Literal["midpoint", "heun"]

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

    def drift_weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of x and D in the drift at times `t`; with the amplitude b = scale sigma: (b'/b) scale and scale' - scale b'/b.

        This form has no cancelling terms where scale tends to 0, as it does at the noise end of flow matching.
        """
        # PyTorch's forward derivatives take turns in one process: threads that sample would not be free.
        if self is SIGMA_TIME:
            return 1 / t, -1 / t
        scale, scale_rate = value_and_rate(self.scale, t)
        amplitude, amplitude_rate = value_and_rate(lambda t: self.scale(t) * self.sigma(t), t)
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


def value_and_rate(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    result = torch.func.jvp(function, (t,), (torch.ones_like(t),))
    return result[0], result[1]


def sample_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each sample: `(B, ...)` to `(B,)`."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


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


@dataclass(frozen=True)
class StepTable:
    """The rows of N steps, one for each of n evaluations: x[k+1] = w[k, 0] x[k] + sum_j w[k, 2 + j] D[j].

    Attributes:
        order_weights (`Tensor` of shape `(N,)`): Share of the first-order candidate in each step. It is 1 where there is no other.
        steps: The step of each evaluation.
        times: Times of the n evaluations.
        weights (`Tensor` of shape `(n, n + 2)`): w, as in a [`SolverTable`]; float64.
    """

    order_weights: Tensor
    steps: list[int]
    times: list[float]
    weights: Tensor


def single_step_table(
    order_weights: Tensor, starts: Tensor, ends: Tensor, flow: ProbabilityFlow = SIGMA_TIME, alpha: float = 1.0
) -> StepTable:
    """Euler steps with one evaluation, alpha-Heun steps with two, or blends of both.

    Source: SDM, arXiv 2602.12624, adaptive solver; alpha-Heun: EDM, arXiv 2206.00364, algorithm 3.

    Args:
        order_weights (`Tensor` of shape `(N,)`): Share of Euler's step; a step to sigma = 0 is always Euler's.
        starts, ends (`Tensor` of shape `(N,)`): Times of each step's ends.
        flow (`ProbabilityFlow`): Time and scaling.
        alpha (`float`): Position of the second evaluation within the step: 1 Heun, 2/3 Ralston, 1/2 midpoint.
    """
    order_weights = order_weights.where(flow.sigma(ends) > 0, 1.0)
    middles = starts + alpha * (ends - starts)
    (of_x, of_data), (of_middle, of_middle_data) = flow.drift_weights(starts), flow.drift_weights(middles)

    def euler(times: Tensor) -> tuple[Tensor, Tensor]:
        lengths, scale = times - starts, flow.scale(times)
        return (flow.scale(starts) + lengths * of_x) / scale, lengths * of_data / scale

    # The step goes along (1 - share) f + share f', with f' the drift in the middle, where x_m = p x + q D.
    (p, q), (a, b) = euler(middles), euler(ends)
    share = (1 - order_weights) / (2 * alpha) * (ends - starts) / flow.scale(ends)
    a, b = a - share * of_x, b - share * of_data
    first = torch.stack([a, b], dim=1).tolist()
    to_middle = torch.stack([p, q], dim=1).tolist()
    from_middle = torch.stack([a / p + share * of_middle, b - a * q / p, share * of_middle_data], dim=1).tolist()
    steps, times, rows = [], [], []
    for i, (weight, start, middle) in enumerate(zip(order_weights.tolist(), starts.tolist(), middles.tolist())):
        second = weight < 1
        rows += [to_middle[i], from_middle[i]] if second else [first[i]]
        times += [start, middle] if second else [start]
        steps += [i] * (1 + second)
    weights = torch.zeros(len(rows), len(rows) + 2, **FLOAT64)
    for k, (state, *data) in enumerate(rows):
        weights[k, 0] = state
        weights[k, 3 + k - len(data) : 3 + k] = torch.tensor(data, **FLOAT64)
    return StepTable(order_weights, steps, times, weights)


def step_orders(num_steps: int, switch_index: int, highest: int = 2, falling: bool = True) -> list[int]:
    """Orders of N steps: rising by one a step from the switch on, and falling towards a last step of first order."""
    n, k = num_steps, switch_index
    return [min(highest, 2 + i - k, n - i if falling else highest) if i >= k else 1 for i in range(n)]


def multistep_table(
    order_weights: Tensor,
    levels: Tensor,
    highest: int = 2,
    corrected: bool = False,
    solver_type: MultistepForm = "midpoint",
) -> StepTable:
    """DPM-Solver++ of mixed order, and UniPC (B(h) = expm1(-h), data prediction), whose predictor it is.

    The corrector improves the step before with the evaluation at its end, so that there is one evaluation a step. First-order
    steps are DDIM's, and are not corrected.

    Source: DPM-Solver++(2M), arXiv 2211.01095, algorithm 2; UniPC, arXiv 2302.04867, algorithms 5 and 7.

    Args:
        order_weights (`Tensor` of shape `(N,)`): Share of the first-order candidate; 1 at the first step and at one to sigma = 0.
        levels (`Tensor` of shape `(N + 1,)`): Noise levels.
        highest (`int`): Order, 2 or 3.
        corrected (`bool`): Whether there is UniPC's corrector.
        solver_type (`str`): Form of the second order, `"midpoint"` or `"heun"`, as in Diffusers' `DPMSolverMultistepScheduler`.
    """
    n = len(levels) - 1
    switch_index = max(1, next((i for i, weight in enumerate(order_weights.tolist()) if weight < 1), n))
    orders = step_orders(n, switch_index, highest, falling=bool(levels[-1] == 0 or order_weights[-1] == 1))
    order_weights = order_weights.where(torch.tensor(orders, device="cpu") > 1, 1.0)
    shares = 1 - order_weights
    integrator = ExponentialIntegrator(torch.ones_like(levels), levels, -levels.log())
    if solver_type == "heun":
        shares = shares * -2 * (1 / torch.expm1(-integrator.h) + 1 / integrator.h)
    data = torch.zeros(n, n, **FLOAT64)
    for k, order in enumerate(orders):
        m = min(k + 1, 3)
        first, higher = (integrator.theory_weights(k, p, m).flip(0) for p in (1, order))
        data[k, k + 1 - m : k + 1] = torch.lerp(first, higher, shares[k])
    if corrected:
        predicted = data.clone()
        for k in range(2, n):
            # What the evaluation at the end of the step before adds to its result.
            of_step = corrector_weights(integrator.h[k - 1].item(), integrator.h[k - 2].item())
            correction = integrator.data_scale[k - 1] * torch.tensor(of_step, **FLOAT64)
            correction -= predicted[k - 1, k - 2 : k + 1]
            data[k, k - 2 : k + 1] += integrator.sigma_ratio[k] * shares[k - 1] * correction
    weights = torch.cat([integrator.sigma_ratio[:, None], data.new_zeros(n, 1), data], dim=1)
    return StepTable(order_weights, list(range(n)), levels[:-1].tolist(), weights)


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


def curvatures(start: TrajectoryPoint, end: TrajectoryPoint) -> tuple[Tensor, Tensor]:
    """Absolute and relative curvature of each sample between two points, shapes `(B,)`."""
    dt = abs(end.t - start.t)
    return absolute_curvature(end.drift, start.drift, dt), relative_curvature(end.drift, start.drift, dt)


@dataclass
class Watch:
    """Sees the evaluations of a sampling one after the other, and says from which step on steps are of second order.

    Attributes:
        switch: The rule, or `None` to look only.
        earliest: First step that may be of second order.
        compare: What is recorded of two evaluations at the starts of steps.
        looks_ahead: Compare the ends of a step, not of the step before: its end by Euler's method is evaluated in any case.
        records: What was found, by step.
        switch_index: The step of the switch, once it is decided.
    """

    switch: CurvatureSwitch | None = None
    earliest: int = 0
    compare: Callable[[TrajectoryPoint, TrajectoryPoint], Any] = curvatures
    looks_ahead: bool = False
    records: dict[int, Any] = field(default_factory=dict)
    switch_index: int | None = None
    _start: TrajectoryPoint | None = None
    _step: int = -1
    _was_start: bool = False

    def decides(self, step: int, here: TrajectoryPoint, compared: TrajectoryPoint | None = None) -> bool:
        """Whether the switch is decided by an evaluation of a step.

        Args:
            compared: The point to compare with the start of the step before, if it is not `here`.
        """
        is_start, decided = step != self._step, step
        if is_start and self._start is not None:
            self.records[step] = self.compare(self._start, compared or here)
        if self.looks_ahead:
            decided = self._step
            if self._was_start and self._start is not None:
                self.records[decided] = self.compare(self._start, here)
        if is_start:
            self._start, self._step = here, step
        self._was_start = is_start
        if self.switch is None or self.switch_index is not None or decided < self.earliest:
            return False
        absolute, relative = self.records.get(decided, 2 * (torch.zeros(1, **FLOAT64),))
        if not (relative if self.switch.relative else absolute).mean().item() >= self.switch.tau:
            return False  # also where it is NaN
        self.switch_index = decided
        if self.looks_ahead:  # it is the second evaluation of that step now
            self._step, self._was_start = decided, False
        return True


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

    def growth(self, levels: Tensor) -> Tensor:
        """Factors `(N,)` by which the noise levels `(N,)` at the starts of N steps grow."""
        in_range = (levels >= self.s_min) & (levels <= self.s_max)
        return 1 + min(self.s_churn / len(levels), math.sqrt(2) - 1) * in_range.double()

    def apply(self, x: Tensor, levels: Tensor, step: int) -> Tensor:
        """The unscaled state with the noise before a step added."""
        growth, sigma = self.growth(levels)[step].item(), levels[step].item()
        return x + sigma * math.sqrt(growth**2 - 1) * self.s_noise * self.draw_noise(x)


def follow(
    x: Tensor,
    levels: Tensor,
    make_table: Callable[[Tensor], StepTable],
    order_weights: Tensor,
    watch: Watch,
    flow: ProbabilityFlow = SIGMA_TIME,
    churn: Churn | None = None,
    keep_states: bool = False,
) -> DenoiserRequests[tuple[Tensor, StepTable, list[Tensor]]]:
    """Samples by a table, until the watch decides on second order, and by another from there on.

    Args:
        x (`Tensor` of shape `(B, ...)`): First state.
        levels (`Tensor` of shape `(N,)`): Noise levels at the starts of steps, before `churn`.
        make_table: The table for `order_weights` `(N,)`.

    Returns:
        `tuple`: the final state, the table that led there, and with `keep_states` the states at the starts of steps and the final one.
    """
    table, states, k = make_table(order_weights), dict[int, Tensor](), 0
    history = History(table.weights.tolist(), last_uses=last_uses(table.weights.tolist()))
    while k < len(table.times):
        step, t = table.steps[k], table.times[k]
        before, calm = x, None
        if k == 0 or step != table.steps[k - 1]:
            x = x if churn is None else churn.apply(x, levels, step)
            if keep_states:
                states[step] = x
        here = yield from flow.evaluate(x, t)
        if churn is not None and not churn.noise_in_curvature:
            calm = flow.point(before, flow.time(levels[step].item()), here.denoised)
        if watch.decides(step, here, calm):
            table = make_table(step_weights(len(order_weights), watch.switch_index))
            history.weights = table.weights.tolist()
            history.last_uses = last_uses(history.weights)
        x = history.step(x, here.denoised)
        k += 1
    return x, table, [*states.values(), x] if keep_states else []


OrderRule: TypeAlias = CurvatureSwitch | Sequence[float] | Tensor
"""A switch, or for each of N steps the weight in [0, 1] of the first-order candidate (1: first order, 0: second)."""


@dataclass
class Trajectory:
    """The result of a solver. N steps, batch of B; all states unscaled, x0 + sigma * noise."""

    sample: Tensor
    """Final state, shape `(B, ...)`."""
    weights: Tensor
    """Weight of the first-order candidate in each step, shape `(N,)`."""
    absolute_curvature: Tensor
    """Over the step before each, shape `(N, B)`; 0 at step 0."""
    relative_curvature: Tensor
    """Shape `(N, B)`."""
    switch_index: int | None
    """First step at which the curvature had reached the threshold; None if it never did, and for fixed weights."""
    num_evaluations: int
    states: list[Tensor]
    """With `keep_states`: the state at the start of each step, then the final one. Otherwise empty."""


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
    levels = check_sigmas(sigmas)
    if not 0 < alpha <= 1:
        raise ValueError(f"`alpha` must be in (0, 1], got {alpha}; 1 is Heun, 1/2 the midpoint rule.")
    if _looks_ahead(rule) and (alpha != 1 or churn is not None):
        raise ValueError("A switch with `lagged=False` needs `alpha=1` and no churn; use `lagged=True`.")
    starts = levels[:-1] if churn is None else churn.growth(levels[:-1]) * levels[:-1]
    starts, ends = flow.inverse_sigma(starts), flow.inverse_sigma(levels[1:])
    make_table = partial(single_step_table, starts=starts, ends=ends, flow=flow, alpha=alpha)
    settings = {"flow": flow, "churn": churn, "keep_states": keep_states}
    return (yield from _trajectory(x, levels, rule, make_table, 0, **settings))


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


def adaptive_dpmsolver(
    x: Tensor, sigmas: Tensor, rule: OrderRule, *, solver_type: MultistepForm = "midpoint", keep_states: bool = False
) -> DenoiserRequests[Trajectory]:
    """DPM-Solver++ with first-order steps (DDIM) where the trajectory is straight, second-order (2M) where it bends.

    N evaluations for any orders. The first step, and a step to sigma = 0, have no second-order candidate and are of first
    order. The update is the same in every scaling of the ODE; curvature is measured in sigma time.

    Source: SDM's adaptive DPM-Solver++; DPM-Solver++(2M): arXiv 2211.01095, algorithm 2.

    Args:
        x (`Tensor` of shape `(B, ...)`): x0 + sigmas[0] * noise.
        sigmas (`Tensor` of shape `(N + 1,)`): Descending noise levels, the last may be 0.
        rule (`CurvatureSwitch` or `(N,)` weights): Order of each step.
        solver_type (`str`): `"midpoint"` or `"heun"`, as in Diffusers' `DPMSolverMultistepScheduler`.
        keep_states (`bool`): Return the state of every step, too.

    Returns:
        `Trajectory`.
    """
    check_choice("solver_type", solver_type, MultistepForm)
    return _multistep(x, sigmas, rule, keep_states, solver_type=solver_type)


def adaptive_unipc(
    x: Tensor, sigmas: Tensor, rule: OrderRule, *, keep_states: bool = False
) -> DenoiserRequests[Trajectory]:
    """UniPC (B(h) = expm1(-h), data prediction) whose steps are first order, or second order with the corrector.

    With weight 0 throughout it is second-order UniPC. Curvature is measured in sigma time.

    Source: UniPC, arXiv 2302.04867, algorithms 5 and 7. SDM's code has UniPC as a baseline only.

    Arguments as in [`adaptive_dpmsolver`]; with `keep_states` the states are those before correction.
    """
    return _multistep(x, sigmas, rule, keep_states, corrected=True)


def _multistep(
    x: Tensor, sigmas: Tensor, rule: OrderRule, keep_states: bool, **settings: Any
) -> DenoiserRequests[Trajectory]:
    """`settings` are those of [`multistep_table`]."""
    levels = check_sigmas(sigmas)
    if _looks_ahead(rule):
        raise ValueError("A switch with `lagged=False` needs a single-step solver; use `lagged=True`.")
    make_table = partial(multistep_table, levels=levels, **settings)
    return (yield from _trajectory(x, levels, rule, make_table, 1, keep_states=keep_states))


def _looks_ahead(rule: OrderRule) -> bool:
    return isinstance(rule, CurvatureSwitch) and not rule.lagged


def _trajectory(
    x: Tensor, levels: Tensor, rule: OrderRule, make_table: Callable, earliest: int, **settings: Any
) -> DenoiserRequests[Trajectory]:
    """`settings` are those of [`follow`], and `earliest` is the first step that a switch may make one of second order."""
    n = len(levels) - 1
    switch = rule if isinstance(rule, CurvatureSwitch) else None
    weights = torch.ones(n, **FLOAT64) if switch else torch.as_tensor(rule, **FLOAT64)
    if weights.shape != (n,) or not ((weights >= 0) & (weights <= 1)).all():
        raise ValueError(f"{n} weights in [0, 1] are needed, one for each step, got {weights.tolist()}.")
    watch = Watch(switch, earliest, looks_ahead=_looks_ahead(rule))
    sample, table, states = yield from follow(x, levels[:-1], make_table, weights, watch, **settings)
    none = x.new_zeros(2, len(x))
    absolute, relative = map(torch.stack, zip(*(watch.records.get(i, none) for i in range(n))))
    num_evaluations = len(table.times)
    return Trajectory(sample, table.order_weights, absolute, relative, watch.switch_index, num_evaluations, states)
