"""The local Wasserstein error of an Euler step, estimated from the drift at both of its ends, and the adaptive schedule: steps as long
as a tolerance of this error allows, found by doubling and halving.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..noise_schedules import check_choice, check_sigmas
from ..solver_table import History
from ..utils.tensors import FLOAT64
from .solvers import (
    SIGMA_TIME,
    DenoiserRequests,
    ProbabilityFlow,
    TrajectoryPoint,
    Watch,
    follow,
    multistep_table,
    sample_norm,
    single_step_table,
    step_weights,
)


Number = TypeVar("Number", float, Tensor)
Norm: TypeAlias = Literal["l2", "rms"]
ProfiledSolver: TypeAlias = Literal["euler", "heun", "dpmsolver++"]
SearchedSolver: TypeAlias = Literal["euler", "heun"]
SearchVariant: TypeAlias = Literal["verified", "published", "published_latent"]

# A noise level whose relative distance to a grid value is below this counts as that value.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Tolerance:
    """Largest error of a step: eta(sigma) = eta_min + (eta_max - eta_min) (sigma / sigma_max)^p.

    Source: SDM, arXiv 2602.12624; published values: EDM pixel models 0.01 to 0.40 or 0.02 to 0.20, p = 1. Errors in the L2
    norm, and so their tolerances, grow with the square root of the dimension.

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


def sample_rms(x: Tensor) -> Tensor:
    """Root mean square of each sample's elements, which does not grow with the dimension: `(B, ...)` to `(B,)`."""
    return x.flatten(1).square().mean(1).clamp(min=1e-12).sqrt()


@dataclass(frozen=True)
class ErrorMeasure:
    """How the change of the drift over a step is measured: as the batch mean of a norm of each sample.

    Args:
        norm (`str`): `"l2"` as published for EDM models, or `"rms"`, which does not depend on the dimension, as published
            for latent models.
        vp_scaled_drift (`bool`): Replace the drift by (x / sqrt(1 + sigma^2) - D) / sigma, as the published text-to-image
            code does. It is not the derivative of the state in any scaling; it is for comparison with that code only.
    """

    norm: Norm = "l2"
    vp_scaled_drift: bool = False

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, Norm)

    def slope(self, start: TrajectoryPoint, end: TrajectoryPoint) -> float:
        """S = ||f_end - f_start|| / |change of time|, the secant estimate of sup ||df/dt|| over the step.

        Raises:
            ValueError: If a prediction was NaN or infinite.
        """
        norm = sample_rms if self.norm == "rms" else sample_norm
        slope = norm(self._drift(end) - self._drift(start)).mean().item() / abs(end.t - start.t)
        if not math.isfinite(slope):
            raise ValueError(f"The prediction at sigma {start.sigma} or {end.sigma} is not finite; check the network.")
        return slope

    def _drift(self, at: TrajectoryPoint) -> Tensor:
        if self.vp_scaled_drift:
            return (at.x / math.sqrt(1 + at.sigma**2) - at.denoised) / at.sigma
        return at.drift


L2_ERROR = ErrorMeasure()


def step_error(slope: Number, dt: Number) -> Number:
    """eta = dt^2 S / 2: the bound dt^2 / 2 sup ||df/dt|| on a step's Wasserstein error, with S for the supremum."""
    return 0.5 * dt**2 * slope


def step_length(slope: float, tolerance: float) -> float:
    """The dt at which `step_error` is the tolerance."""
    return math.sqrt(2 * tolerance / max(slope, 1e-30))


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
    solver: ProfiledSolver = "euler",
    measure: ErrorMeasure = L2_ERROR,
    flow: ProbabilityFlow = SIGMA_TIME,
) -> DenoiserRequests[EtaProfile]:
    """Measures the estimated Wasserstein error of each step along a list of noise levels.

    For Euler, the evaluation at a step's end begins the next step: one evaluation a step. The published code repeats it.
    With `"dpmsolver++"` the drift is compared along a DPM-Solver++(2M) trajectory, as in SDM's text-to-image code.

    Source: SDM, arXiv 2602.12624, the error log that N-step resampling starts from.

    Args:
        x (`Tensor` of shape `(B, ...)`): x0 + sigmas[0] * noise.
        sigmas (`Tensor` of shape `(N + 1,)`): Descending noise levels, the last is 0.
        solver (`str`): How the trajectories advance: `"euler"`, `"heun"` or `"dpmsolver++"`.
        measure (`ErrorMeasure`): Norm of the error.
        flow (`ProbabilityFlow`): Time and scaling; only sigma time with `"dpmsolver++"`.
    """
    levels = check_sigmas(sigmas)
    check_choice("solver", solver, ProfiledSolver)
    if levels[-1] > 0 or (solver == "dpmsolver++" and flow is not SIGMA_TIME):
        raise ValueError(
            'Noise levels must end with 0, and `solver="dpmsolver++"` works in sigma time, without `flow`; got '
            f"{levels.tolist()} for '{solver}'."
        )
    times = flow.inverse_sigma(levels)
    make_table = partial(single_step_table, starts=times[:-1], ends=times[1:], flow=flow)
    if solver == "dpmsolver++":
        make_table = partial(multistep_table, levels=levels)
    watch = Watch(compare=measure.slope, looks_ahead=True)
    order_weights = step_weights(len(levels) - 1, None if solver == "euler" else 0)
    sample, table, _ = yield from follow(x, levels[:-1], make_table, order_weights, watch, flow)
    slope = torch.tensor([*(watch.records[i] for i in range(len(levels) - 2)), 0.0], **FLOAT64)
    dt = -times.diff()
    return EtaProfile(step_error(slope, dt), slope, dt, sample, len(table.times))


@dataclass(frozen=True)
class StepSearch:
    """Settings of the search for one step.

    The first trial goes to the next value of the base grid. After an accepted trial the number of grid intervals is doubled,
    after a rejected one the step is halved. Then the step at which the error equals the tolerance is extrapolated.

    Args:
        solver (`str`): `"euler"` or `"heun"`: how the trajectories advance. The error is Euler's in both cases.
        snap (`bool`): Use values of the base grid only.
        max_expansions (`int`): Largest number of doublings per step.
        max_shrinks (`int`): Largest number of halvings per step; 2 as published. If no trial passes, the step is the last
            trial, and its record says that it exceeds the tolerance. With `"verified"`, steps are never shorter than
            shrink^max_shrinks grid intervals, which bounds their number.
        shrink (`float`): Factor of a "halving", in (0, 1).
        gamma (`float`): Safety factor of the extrapolated step, in (0, 1].
        variant (`str`): `"verified"`: the extrapolated and snapped step is evaluated. If it exceeds the tolerance, the step
            is the longest accepted trial instead. For Euler this costs nothing, as the next step starts with that
            evaluation. `"published"`, as in SDM's code: the step is not checked, and a shorter trial may replace a longer
            one. `"published_latent"`, as in its text-to-image code: in addition, trials snap, too.
    """

    solver: SearchedSolver = "euler"
    snap: bool = False
    max_expansions: int = 2
    max_shrinks: int = 5
    shrink: float = 0.5
    gamma: float = 0.95
    variant: SearchVariant = "verified"

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, SearchedSolver)
        check_choice("variant", self.variant, SearchVariant)
        if not (0 < self.shrink < 1 and 0 < self.gamma <= 1 and self.max_expansions >= 0 and self.max_shrinks >= 0):
            raise ValueError(f"`shrink` in (0, 1), `gamma` in (0, 1] and counts >= 0 are needed, got {self}.")


class Trial(NamedTuple):
    """A step whose end was evaluated."""

    t: float
    """Time at its end."""
    length: float
    """|change of t|."""
    slope: float
    """S, the change of the drift per unit of time."""
    eta: float
    """length^2 S / 2, the estimated error."""


@dataclass(frozen=True)
class StepRecord:
    """How one step was found."""

    t: float
    t_next: float
    sigma: float
    sigma_next: float
    tolerance: float
    best: Trial
    """The trial that the step is based on. With `"verified"` it is the step itself."""
    length: float
    """|change of t| before snapping."""
    trials: tuple[Trial, ...]
    num_expansions: int
    num_shrinks: int

    @property
    def exceeds_tolerance(self) -> bool:
        return self.best.eta > self.tolerance


@dataclass(frozen=True)
class AdaptiveSchedule:
    """Result of `adaptive_schedule`."""

    sigmas: Tensor
    """Noise levels, float64 of shape `(K + 2,)`: from the grid's first to its last value in K steps, then 0."""
    steps: tuple[StepRecord, ...]
    """One record for each step down to the grid's last value."""
    sample: Tensor
    """Unscaled state at the grid's last value, shape `(B, ...)`."""
    num_evaluations: int
    states: list[Tensor]
    """With `keep_states`: the unscaled states at `sigmas[:-1]`. Otherwise empty."""


def adaptive_schedule(
    x: Tensor,
    grid: Tensor,
    tolerance: Tolerance,
    search: StepSearch = StepSearch(),
    *,
    measure: ErrorMeasure = L2_ERROR,
    flow: ProbabilityFlow = SIGMA_TIME,
    keep_states: bool = False,
) -> DenoiserRequests[AdaptiveSchedule]:
    """Finds noise levels whose steps have an estimated Wasserstein error below a noise-dependent tolerance.

    Source: SDM, arXiv 2602.12624, adaptive scheduling: E = dt^2 S / 2 <= eta(sigma), dt = gamma sqrt(2 eta / S).

    Args:
        x (`Tensor` of shape `(B, ...)`): x0 + grid[0] * noise. Errors are means over this batch; 128 samples are
            published.
        grid (`Tensor` of shape `(M,)`): Base grid, descending, positive. It sets the range and the length of first trials.
        tolerance (`Tolerance`): Largest error by noise level.
        search (`StepSearch`): Settings.
        measure (`ErrorMeasure`): Norm of the error.
        flow (`ProbabilityFlow`): Time and scaling; errors are in units of the scaled state.
        keep_states (`bool`): Return the state at every noise level, too.
    """
    levels = check_sigmas(grid).tolist()
    if levels[-1] == 0:
        raise ValueError("The base grid must end above 0, where the drift exists; drop its last value.")
    find = _StepFinder(levels, tolerance, search, measure, flow)
    steps: list[StepRecord] = []
    states: list[Tensor] = []
    num_evaluations, t = 0, flow.time(levels[0])
    here: TrajectoryPoint | None = None
    while t > find.t_end:
        if keep_states:
            states.append(x)
        if here is None:
            here = yield from flow.evaluate(x, t)
            num_evaluations += 1
        step, arrival = yield from find(here)
        steps.append(step)
        num_evaluations += len(step.trials)
        times = torch.tensor([t, step.t_next], **FLOAT64)
        table = single_step_table(
            torch.full((1,), float(search.solver == "euler"), **FLOAT64), times[:1], times[1:], flow
        )
        history = History(table.weights.tolist())
        x = history.step(x, here.denoised)
        if search.solver == "heun":
            if arrival is None:
                arrival = yield from flow.evaluate(x, step.t_next)
                num_evaluations += 1
            x, arrival = history.step(x, arrival.denoised), None
        here, t = arrival, step.t_next

    if keep_states:
        states.append(x)
    sigmas = [levels[0], *(step.sigma_next for step in steps[:-1]), levels[-1], 0.0]
    return AdaptiveSchedule(torch.tensor(sigmas, **FLOAT64), tuple(steps), x, num_evaluations, states)


@dataclass(frozen=True)
class _StepFinder:
    """Finds the step from a point. Arguments as in [`adaptive_schedule`]."""

    levels: list[float]
    tolerance: Tolerance
    search: StepSearch
    measure: ErrorMeasure
    flow: ProbabilityFlow

    @property
    def t_end(self) -> float:
        return self.flow.time(self.levels[-1])

    def time_of(self, sigma: float, snap: bool) -> float:
        levels = self.levels
        if snap:
            sigma = next((level for level in levels if level <= sigma * (1 + ROUNDING)), levels[-1])
        return self.flow.time(sigma) if sigma > levels[-1] * (1 + ROUNDING) else self.t_end

    def trial(self, here: TrajectoryPoint, t_next: float) -> DenoiserRequests[tuple[Trial, TrajectoryPoint]]:
        arrival = yield from self.flow.evaluate(self.flow.move(here.x, here.drift, here.t, t_next), t_next)
        length, slope = abs(t_next - here.t), self.measure.slope(here, arrival)
        return Trial(t_next, length, slope, step_error(slope, length)), arrival

    def __call__(self, here: TrajectoryPoint) -> DenoiserRequests[tuple[StepRecord, TrajectoryPoint | None]]:
        """The step, and the point at its end if that was evaluated."""
        search, levels, sigma, t = self.search, self.levels, here.sigma, here.t
        verifies, limit = search.variant == "verified", self.tolerance(sigma, levels[0])
        trials: list[Trial] = []
        best: tuple[Trial, TrajectoryPoint] | None = None
        num_expansions = num_shrinks = 0

        # The j with levels[j] >= sigma > levels[j + 1], or the nearest interval of the grid.
        below = (j for j, level in enumerate(levels) if level < sigma * (1 - ROUNDING))
        interval = max(next(below, len(levels) - 1) - 1, 0)
        decrease, least = sigma - levels[interval + 1], 2 * ROUNDING * sigma
        if verifies:
            # A fraction of the whole grid interval. With fractions of the rest of it, steps would never reach its end.
            floor = (levels[interval] - levels[interval + 1]) * search.shrink**search.max_shrinks
            least = max(least, min(decrease, floor))
        while True:
            t_next = self.time_of(sigma - decrease, search.snap and search.variant != "published")
            if trials and t_next == trials[-1].t:
                break
            newest = yield from self.trial(here, t_next)
            trials.append(newest[0])
            accepted = newest[0].eta <= limit
            best = newest if accepted else best
            if accepted and num_expansions < search.max_expansions:
                target = interval + 2 ** (num_expansions + 1)
                if num_shrinks > 0 or target > len(levels) - 1:
                    break
                decrease = sigma - levels[target]
                num_expansions += 1
            elif not accepted and num_shrinks < search.max_shrinks and not (verifies and best):
                decrease = max(search.shrink * decrease, least)
                num_shrinks += 1
            else:
                break

        chosen, arrival = best or newest
        slope = trials[-1].slope if verifies else chosen.slope
        length = min(t - self.t_end, max(chosen.length, search.gamma * step_length(slope, limit)))
        t_next = self.time_of(self.flow.noise_level(t - length), search.snap)
        if verifies:
            if chosen.eta <= limit and t_next < chosen.t and t_next != trials[-1].t:
                newest = yield from self.trial(here, t_next)
                trials.append(newest[0])
                chosen, arrival = newest if newest[0].eta <= limit else (chosen, arrival)
            t_next = chosen.t
        sigma_next, counts = self.flow.noise_level(t_next), (num_expansions, num_shrinks)
        step = StepRecord(t, t_next, sigma, sigma_next, limit, chosen, length, tuple(trials), *counts)
        return step, arrival if verifies else None
