"""Calibration of `SDMScheduler`: measures where a pipeline's trajectories bend, and finds plans that follow from it.

The methods of `adaptive/` use the unscaled state x / alpha and the noise level sigma / alpha. [`run_on_pipeline`] translates
between them and the states and times of a pipeline.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from operator import itemgetter
from typing import Any, TypeAlias, TypeVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging
from torch import Tensor
from tqdm.auto import tqdm

from . import adaptive
from .adaptive import DenoiserRequests, Trajectory
from .least_squares import DAMPING_START, check_finite, damped_step
from .noise_schedules import FlowMatchSchedule, NoiseSchedule, data_prediction_weights
from .pipelines.driving import Requests, drive, networks_of, rollout, sample_latents, scheduler_config
from .pipelines.inputs import BatchSize, SampleInputs, whole_number, whole_numbers
from .pipelines.teacher import (
    CHECKED_STEPS,
    check_driven,
    check_teacher,
    evaluations_per_sample,
    fingerprint,
    fingerprint_of_pipeline,
    provenance_of_fit,
    public_settings,
)
from .schedulers.configs import to_python
from .schedulers.scheduling_sdm import SDMScheduler
from .schedulers.sdm_plan import SOLVERS, SDMPlan, Solver, flow_shift, levels_at, times_of_levels, uncalibrated_plan
from .utils.diffusers_hooks import without_feature_caches
from .utils.tensors import FLOAT64


logger = logging.get_logger(__name__)

T = TypeVar("T")

Method: TypeAlias = Callable[[Tensor, Tensor], DenoiserRequests[T]]
"""From the unscaled first state, shape `(B, ...)`, and noise levels, shape `(N + 1,)`, to a method of `adaptive/`."""

Spacing: TypeAlias = Callable[[int], Tensor]
"""From a number of steps N to noise levels `(N,)`, without the final 0."""

# The samples of a calibration, two thirds to choose by and the others to report on.
NUM_SAMPLES = 24

# The fewest steps of the fine solution, UniPC's at equal distances in log sigma, and how many times as many as a plan's it has.
FINE_STEPS, FINENESS = 50, 3

# Samples whose fine solution gives the curvature where the target is a teacher's.
CURVATURE_SAMPLES = 8

# Ends of candidates beside those of the network, in sigma / alpha. Unit-variance data under more noise than the first hardly
# differ from noise, and few steps are better spent after it and before the others.
LATER_START, EARLIER_ENDS = 16.0, (0.03, 0.15)

# Exponent q of N-step resampling (published: 0.1 and 0.25).
EXPONENT = 0.25

# Samples for the first choice of spacings, how many are kept, and the shares of the evaluations for this choice and for that of
# the solver. The descents have the rest.
SPACING_SAMPLES, NUM_SPACINGS = 4, 4
SPACING_SHARE, SOLVER_SHARE = 0.3, 0.27

# A plan is nearly as near as the best up to this multiple of its distance.
NEAR_BEST = 1.25

# The descent moves log sigma by a piecewise linear function of the step with this many knots, each at most by MOST_MOVED, and
# measures derivatives over DIFFERENCE. It ends when a step gains less than 1 - LEAST_GAIN.
KNOTS, MOST_MOVED, DIFFERENCE, LEAST_GAIN = 5, 1.0, 0.03, 0.98

# A step is at most so many times as long in log sigma as the one before, whose prediction it extrapolates, unless it was before.
MOST_GROWTH = 3.0


def calibrate(
    pipe: DiffusionPipeline,
    num_inference_steps: int | Sequence[int] = 12,
    *,
    inputs: SampleInputs | None = None,
    teacher: SchedulerMixin | None = None,
    teacher_num_inference_steps: int = 50,
    batch_size: int = 32,
    solvers: Sequence[str] = SOLVERS,
    most_evaluations: int | None = None,
    resume_from: SDMScheduler | None = None,
    on_plan: Callable[[SDMScheduler], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
    **pipeline_arguments: Any,
) -> SDMScheduler:
    """Measures a pipeline's trajectories and finds a plan for each number of network evaluations. Nothing is trained.

    A fine solution of some samples gives the curvature of the trajectories and the Wasserstein bound on the error of any step
    (SDM, arXiv 2602.12624). Candidates for the noise levels are those at equal increments of the bound (N-step resampling)
    and spacings of Diffusers, also with a later start and an earlier end. The best of them are tried with first-order steps
    only, and the best of all with all solvers, with the published blends of first and second order, and with a later switch. A
    descent then moves the noise levels of the best plans, towards the least root mean square distance to the fine solution, or
    to a teacher's samples, which bounds the Wasserstein distance. Two thirds of the samples are to choose by, and the others for
    the distances that are reported. A plan does not depend on the other numbers of evaluations, and is the same whenever it is
    found.

    Args:
        pipe: The pipeline; left as it is. It must start from noise: for image-to-image pass the text-to-image pipeline of the
            same network.
        num_inference_steps (`int` or `Sequence[int]`, defaults to 12): Numbers of network evaluations, at least 2.
        inputs (`SampleInputs`, *optional*): Seeds and prompts to measure with, at least 2 samples. The default is 24 samples that
            all have the `pipeline_arguments`.
        teacher (`SchedulerMixin`, *optional*): The scheduler whose samples in `teacher_num_inference_steps` plans come close to,
            e.g. that of [`default_teacher`]. By default plans come close to the solution of the ODE. A plan of a dozen
            evaluations can be closer to it than a teacher of 50 steps is.
        teacher_num_inference_steps (`int`, defaults to 50): The teacher's steps.
        batch_size (`int`, defaults to 32): The most samples per pipeline call. It is halved where memory runs out.
        solvers: The solvers to choose from, see [`SDMPlan`].
        most_evaluations (`int`, *optional*): Network evaluations that a plan may take, those of the fine solution and of the
            teacher included, which all plans of a call may share. By default those of [`default_budget`].
        resume_from ([`SDMScheduler`], *optional*): The result of an earlier call. Its plans that were made by the same
            settings, from the same samples of the same network, are kept, also those for other numbers of evaluations.
        on_plan (`Callable`, *optional*): Called with the scheduler after every plan, e.g. to save it. Without it Ctrl-C or an
            error ends the search and keeps the plans that there are.
        provenance: Further entries for the plans' provenance; anything JSON can hold.
        pipeline_arguments: Arguments of the pipeline's call, instead of `inputs`, e.g. `prompt="a fox"`. The samples take the
            entries of a list of prompts, labels or embeddings in turn, with at least one sample for each. Samples of several guidance
            scales, `guidance_scale=[2, 3, 4.5, 6.7, 10]`, make one plan for all of them.

    Returns:
        [`SDMScheduler`]: With a plan for each number of evaluations. A plan's `provenance` says what was measured; [`summary`]
        prints the main numbers. For all N steps of the plan: `eta` (the bound on the error of each, in RMS norm),
        `curvature` (the relative curvature before each, in 1 / sigma), and the bounds `karras_eta` of N steps on Karras' noise
        levels `karras_sigmas`. For the trajectories: `measured_sigmas` and `measured_curvature`. For the samples that were not
        used to choose: `distance`, the mean squared one to the fine solution or the teacher's, its standard error
        `distance_error`, the `median_distance`, and the `plain_distance` of DPM-Solver++ 2M with trailing spacing. `spacing` is
        that which the descent began with, and `num_evaluations` the network evaluations that it took to find the plan.

    Raises:
        ValueError: If arguments contradict each other or are none of the pipeline's, if it starts from an image, if the teacher is
            random or for another noise schedule, or if `resume_from` has a plan that is not asked for and was made otherwise.
    """
    step_counts = whole_numbers("num_inference_steps", num_inference_steps, least=2)
    teacher_num_inference_steps = whole_number("teacher_num_inference_steps", teacher_num_inference_steps)
    batch_size = whole_number("batch_size", batch_size)
    if most_evaluations is not None:
        most_evaluations = whole_number("most_evaluations", most_evaluations)
    if not solvers or set(solvers) - set(SOLVERS):
        raise ValueError(f"`solvers` must be some of {SOLVERS}, got {tuple(solvers)}.")
    inputs = SampleInputs.of_call(pipe, inputs, NUM_SAMPLES, pipeline_arguments)
    if len(inputs) < 2:
        raise ValueError("`inputs` must be at least 2 samples: one to choose by, one to report on.")
    if teacher is not None:
        check_teacher(pipe, teacher)
    budgets = {n: most_evaluations or default_budget(n) for n in step_counts}
    # A plan of many evaluations needs a finer solution to come close to. A teacher's samples are what they are.
    fine_steps = {n: FINE_STEPS if teacher else max(FINE_STEPS, FINENESS * n) for n in step_counts}
    searches = {
        steps: _PlanSearch(pipe, inputs, batch_size, teacher, teacher_num_inference_steps, steps)
        for steps in fine_steps.values()
    }
    for n, budget in budgets.items():
        least = searches[fine_steps[n]].num_shared_evaluations + 2 * n * len(inputs)
        if budget < least:
            raise ValueError(
                f"`most_evaluations` must be at least {least} for {len(inputs)} samples and {n} evaluations, got {budget}."
            )
    scheduler = SDMScheduler.from_config(scheduler_config(pipe))
    configs = [scheduler.config, {} if teacher is None else teacher.config]
    settings = {
        **provenance_of_fit(pipe, inputs, teacher, teacher_num_inference_steps),
        **(provenance or {}),
        "num_samples": len(inputs),
        "seeds": [inputs.seeds[0], inputs.seeds[-1]],
        "solvers": [solver for solver in SOLVERS if solver in solvers],
        # Of everything that a plan depends on, with the weights and prompts that the record does not have.
        "fingerprint": fingerprint(
            fingerprint_of_pipeline(pipe), [public_settings(config) for config in configs], inputs
        ),
    }
    settings = json.loads(json.dumps(to_python(settings)))  # as in a file
    settings_of = {n: {**settings, "most_evaluations": budget} for n, budget in budgets.items()}
    others = {name: value for name, value in settings.items() if name != "versions"}
    for n, plan in ({} if resume_from is None else resume_from.plans).items():
        expected = settings_of.get(n, others)
        differing = [name for name, value in expected.items() if plan.provenance.get(name) != value]
        if not differing:
            scheduler.add_plan(plan)
        elif n not in settings_of:  # it would be lost where the result takes the place of the earlier one
            raise ValueError(
                f"The earlier plan for {n} evaluations differs in {', '.join(differing)}. Go on with the same, ask for {n} "
                "evaluations, too, or choose another `resume_from` (`--output_dir`)."
            )
    missing = [n for n in step_counts if n not in scheduler.plans]
    if missing:
        check_driven(pipe, scheduler, scheduler.plan_for(CHECKED_STEPS, mu=1.0), inputs)
    most = sum(budgets[n] for n in missing)
    for n in tqdm(missing, desc=f"Calibrating, at most {most} evaluations", unit="plan"):
        try:
            plan = searches[fine_steps[n]].find_plan(n, settings["solvers"], budgets[n])
        except (KeyboardInterrupt, Exception) as error:
            if on_plan is not None or not scheduler.plans:
                raise
            logger.warning(f"The search for {n} evaluations ended by {error!r}. The plans before it are kept.")
            break
        scheduler.add_plan(replace(plan, provenance={**settings_of[n], **plan.provenance}))
        if on_plan is not None:
            on_plan(scheduler)
    return scheduler


def default_budget(num_inference_steps: int) -> int:
    """Network evaluations that [`calibrate`] may spend on a plan: those of 400 images sampled with it, or 5000 if that is more."""
    return max(5000, 400 * num_inference_steps)


def summary(scheduler: SDMScheduler) -> str:
    """A Markdown table of a scheduler's plans and of what [`calibrate`] measured for them.

    Its columns `distance`, `median` and `2M` are squared distances to a fine solution or the teacher's, the last one of
    DPM-Solver++ 2M with trailing spacing. `cost` is the number of network evaluations that it took to find the plan.
    """
    lines = [
        "| evaluations | solver | steps | higher order from | last sigma | distance | median | 2M | cost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for n, plan in sorted(scheduler.plans.items()):
        k, found = plan.switch_index, plan.provenance
        switch = f"step {k}, sigma {plan.sigmas[k]:.3g}" if max(plan.orders) > 1 else "-"
        names = ("distance", "median_distance", "plain_distance")
        distances = [f"{found[name]:.2e}" if name in found else "-" for name in names]
        solver = plan.solver if plan.blend == "step" else f"{plan.solver}, {plan.blend} blend"
        last, cost = f"{plan.sigmas[-2]:.3g}", found.get("num_evaluations", "-")
        cells = [n, solver, plan.num_steps, switch, last, *distances, cost]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def run_on_pipeline(pipe: DiffusionPipeline, sigmas: Tensor, method: Method[T], **pipeline_inputs: Any) -> T:
    """Runs a method of `adaptive/` with a pipeline as its denoiser, and returns the method's result.

    Args:
        pipe: The pipeline; left as it is.
        sigmas (`Tensor` of shape `(N + 1,)`): Noise levels as in [`SDMPlan`]. The first is that of the pipeline's own noise.
        method: Called with the unscaled first state, shape `(B, ...)`, and the pipeline's noise levels: `sigmas`, times the
            shift of flow matching.
        pipeline_inputs: Arguments of `pipe.__call__`.

    Raises:
        ValueError: If the pipeline starts from an image, or mixes one in between steps.
    """

    def requests(noise_schedule: NoiseSchedule, prediction_type: str) -> Requests:
        levels, t = sigmas * flow_shift(noise_schedule), times_of_levels(sigmas[0], noise_schedule)
        sample, model_output = yield None, t
        dtype = torch.promote_types(sample.dtype, torch.float32)
        noise = sample.to(dtype) / noise_schedule.alpha(t).item()
        method_requests = method(noise, levels)
        x, sigma = next(method_requests)
        # The network has been evaluated at the pipeline's own noise, where most methods begin.
        is_evaluated = x is noise and torch.isclose(sigma, levels[0])
        while True:
            if not is_evaluated:
                t = noise_schedule.inverse_lambda(-sigma.log())
                sample, model_output = yield noise_schedule.alpha(t).item() * x, t
            is_evaluated = False
            evaluation_t = noise_schedule.evaluation_time(t)
            p, q = data_prediction_weights(prediction_type, noise_schedule, t, evaluation_t)
            try:
                x, sigma = method_requests.send(p.item() * sample.to(dtype) + q.item() * model_output.to(dtype))
            except StopIteration as stop:
                return stop.value

    with without_feature_caches(networks_of(pipe)):
        return drive(pipe, requests, **pipeline_inputs)


class _PlanSearch:
    """Measurements on one pipeline and its samples, and the search for plans that follows, with a count of evaluations.

    Args:
        pipe: The pipeline.
        inputs: The samples. The first two thirds are to choose by.
        batch_size: Samples per pipeline call.
        teacher, teacher_num_inference_steps: Whose samples to come close to; by default the fine solution.
        fine_steps: Steps of the fine solution.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        inputs: SampleInputs,
        batch_size: int,
        teacher: SchedulerMixin | None = None,
        teacher_num_inference_steps: int = 50,
        fine_steps: int = FINE_STEPS,
    ):
        self.pipe, self.inputs, self.batch_size = pipe, inputs, BatchSize(batch_size)
        self.teacher, self.teacher_num_inference_steps = teacher, teacher_num_inference_steps
        # The fine solution of a few samples is enough for the curvature.
        self.measured = inputs if teacher is None else inputs[:CURVATURE_SAMPLES]
        self.fine_steps, self.num_shared_evaluations = fine_steps, fine_steps * len(self.measured)
        if teacher is not None:
            self.num_shared_evaluations += evaluations_per_sample(teacher, teacher_num_inference_steps) * len(inputs)
        self.num_to_choose = 2 * len(inputs) // 3
        # Guidance multiplies a difference of outputs, and with it the error of a sampling.
        argument, _ = inputs.guidance_range() or ("", [])
        self.weights = 1 / torch.tensor([own.get(argument, 1.0) for own in inputs.per_sample], **FLOAT64)
        self.scheduler = SDMScheduler.from_config(scheduler_config(pipe))
        # Noise levels before the shift do not depend on it.
        self.noise_schedule = self.scheduler.noise_schedule(mu=1.0)
        self.low, self.high = self.scheduler.sigma_range(self.noise_schedule)
        self.num_evaluations = 0
        self.target: Tensor | None = None

    def measure(self) -> None:
        """The fine solution or the teacher's samples, and the curvature and the slope of the drift."""

        def method(x: Tensor, levels: Tensor) -> DenoiserRequests[tuple[float, Trajectory]]:
            trajectory = yield from adaptive.adaptive_unipc(x, levels, adaptive.step_weights(self.fine_steps, 0))
            return levels[0].item(), trajectory

        def call(arguments: dict[str, Any]) -> Iterator[tuple[Tensor, ...]]:
            highest, found = run_on_pipeline(self.pipe, sigmas, method, **arguments)
            self.shift = highest / self.high
            return zip(found.sample, found.relative_curvature.T, found.absolute_curvature.T)

        sigmas = _ending_at_zero(adaptive.sigma_grid(self.fine_steps, self.low, self.high, "loglinear"))
        fine, relative, absolute = zip(*self.measured.in_calls(self.pipe, self.batch_size, call))
        self.num_evaluations += self.num_shared_evaluations
        self.target, self.levels = torch.stack(fine if self.teacher is None else self.teacher_samples()), sigmas[:-1]
        self.curvature, slope = (torch.stack(values).cpu().double().mean(0)[1:] for values in (relative, absolute))
        check_finite(self.target, self.curvature, slope)
        self.slope = slope / math.sqrt(self.target[0].numel())

    def teacher_samples(self) -> list[Tensor]:
        """Final states of the teacher, one for each sample."""

        def call(arguments: dict[str, Any]) -> Tensor:
            return sample_latents(self.pipe, self.teacher, self.teacher_num_inference_steps, **arguments)[1]

        with without_feature_caches(networks_of(self.pipe)):
            return self.inputs.in_calls(self.pipe, self.batch_size, call)

    def step_errors(self, sigmas: Tensor) -> Tensor:
        """The Wasserstein bound dt^2 / 2 sup ||df/dt|| of every step along noise levels, `(N,)`, in RMS norm; 0 to sigma = 0.

        Source: SDM, arXiv 2602.12624, the local error that its adaptive schedules bound.
        """
        errors = []
        for start, end in zip(sigmas.tolist(), sigmas[1:].tolist()):
            inside = (self.levels[:-1] > end) & (self.levels[1:] < start)
            slope = self.slope[inside].max().item() if end > 0 and inside.any() else 0.0
            errors.append(0.5 * ((start - end) * self.shift) ** 2 * slope)
        return torch.tensor(errors, **FLOAT64)

    def spacings(self) -> dict[str, Spacing]:
        """Candidates for the noise levels by name, the most usual first."""
        later = LATER_START / self.shift
        starts, ends = {"": self.high}, {"": self.low}
        # The initial noise of EDM's and of exploding states is that of their highest level.
        free_start = self.scheduler.init_noise_sigma == 1
        if free_start and later < self.high:
            starts[f" from {LATER_START:g}"] = later
        ends |= {f" to {end:g}": end / self.shift for end in EARLIER_ENDS if end / self.shift > self.low}
        found: dict[str, Spacing] = {}
        if isinstance(self.noise_schedule, FlowMatchSchedule):
            found["before the shift"] = lambda n: self.scheduler.usual_sigmas(n, self.noise_schedule)[:-1]
        for (end, low), (start, high) in product(ends.items(), starts.items()):
            found |= {f"{name}{start}{end}": spacing for name, spacing in self._between(high, low).items()}
        if free_start:
            # As Diffusers' DPM-Solver has it: equal steps of time without the first.
            found["leading"] = lambda n: self._levels(
                torch.arange(n, 0, -1, **FLOAT64) * self._time(self.high) / (n + 1)
            )
        return found

    def _between(self, high: float, low: float) -> dict[str, Spacing]:
        inside = self.levels[(self.levels < high * (1 - 1e-6)) & (self.levels > low * (1 + 1e-6))]
        path = torch.cat([inside.new_tensor([high]), inside, inside.new_tensor([low])])
        bounds = self.step_errors(path)
        spacings: dict[str, Spacing] = {
            "exponential": lambda n: adaptive.sigma_grid(n, low, high, "loglinear"),
            "karras": lambda n: adaptive.sigma_grid(n, low, high),
            # At equal increments of the bound.
            f"bound^{EXPONENT:g}": lambda n: adaptive.resample_sigmas(path, bounds, n, q=EXPONENT, append_zero=False),
        }
        if low == self.low:
            spacings["trailing"] = lambda n: self._levels(torch.arange(n, 0, -1, **FLOAT64) * self._time(high) / n)
        return spacings

    def _time(self, sigma: float) -> float:
        return times_of_levels(torch.tensor(sigma, **FLOAT64), self.noise_schedule).item()

    def _levels(self, times: Tensor) -> Tensor:
        return levels_at(times, self.noise_schedule).clamp(self.low, self.high)

    def sample(self, plan: SDMPlan, positions: range) -> Tensor:
        """Final states, sampled as `SDMScheduler` does."""

        def call(arguments: dict[str, Any]) -> Tensor:
            return rollout(self.pipe, plan, **arguments)

        self.num_evaluations += plan.num_inference_steps * len(positions)
        return torch.stack(self.inputs[positions].in_calls(self.pipe, self.batch_size, call))

    def deviations(self, plan: SDMPlan, positions: range) -> Tensor:
        """Differences of a plan's final states to the target, float64 `(len(positions), entries)`."""
        assert self.target is not None
        start, stop = positions.start, positions.stop
        return (self.sample(plan, positions) - self.target[start:stop]).flatten(1).cpu().double()

    def weighted_deviations(self, plan: SDMPlan, num_samples: int) -> Tensor:
        """The deviations of the first samples, in units of their guidance scales where these differ."""
        return self.weights[:num_samples, None] * self.deviations(plan, range(num_samples))

    def closest(self, plans: Sequence[SDMPlan], num_samples: int) -> list[tuple[float, SDMPlan]]:
        """Plans by the mean distance of the first samples to the target, the closest first.

        One of a few samples that ends elsewhere would decide the root mean square of all.
        """
        distances = [_mean_distance(self.weighted_deviations(plan, num_samples)) for plan in plans]
        return sorted(zip(distances, plans), key=itemgetter(0))

    def find_plan(self, num_inference_steps: int, solvers: Sequence[Solver], most_evaluations: int) -> SDMPlan:
        """The best plan for at most so many evaluations, with what was measured."""
        if self.target is None:
            self.measure()
        n, before, to_report = num_inference_steps, self.num_evaluations, range(self.num_to_choose, len(self.inputs))
        room = most_evaluations - self.num_shared_evaluations - 2 * n * len(to_report)

        def affordable(num_plans: int, share: float = 1.0) -> int:
            """Samples for each of some plans, or plans for some samples, with a share of the evaluations."""
            return max(0, int(share * room - (self.num_evaluations - before)) // (n * num_plans))

        spacings = self.spacings()
        plans = [_fixed_plan(n, spacing, solvers[-1], name) for name, spacing in spacings.items()]
        num_samples = min(SPACING_SAMPLES, self.num_to_choose)
        plans = plans[: max(1, affordable(num_samples, SPACING_SHARE))]
        found = self.closest(plans, num_samples)[:NUM_SPACINGS]
        check_finite(found[0][0])
        # Under much guidance few steps of higher orders overshoot.
        first_order = [
            replace(plan, sigmas=_ending_at_zero(spacings[plan.provenance["spacing"]](n)), switch_index=n - 1)
            for _, plan in found[: affordable(num_samples)]
        ]
        best = self.closest(first_order[:1], num_samples)
        if best and best[0][0] < found[0][0]:
            found += best + self.closest(first_order[1:], num_samples)
        found = sorted(found, key=itemgetter(0))[:NUM_SPACINGS]
        plan, *others = (plan for _, plan in found)
        plans = [plan, *_variants(plan, spacings[plan.provenance["spacing"]], solvers), *others]
        num_samples = max(1, min(self.num_to_choose, affordable(len(plans), SPACING_SHARE + SOLVER_SHARE)))
        found = self.closest(plans[: affordable(num_samples)], num_samples) or found

        # Both the best of first order and the best of higher order, if they are nearly as near: descents can change the order.
        near = [plan for distance, plan in found if distance <= NEAR_BEST * found[0][0]]
        starts = list({max(plan.orders) > 1: plan for plan in reversed(near)}.values())
        fewest = min(SPACING_SAMPLES, self.num_to_choose)
        if affordable((KNOTS + 4) * len(starts)) < fewest:
            starts = near[:1]
        num_samples = min(self.num_to_choose, affordable((KNOTS + 4) * len(starts)))
        moved = []
        for i, plan in enumerate(dict.fromkeys([*starts, *(plan for _, plan in found)])):
            if num_samples < fewest or affordable(KNOTS + 4) < num_samples:
                break
            num_trials = affordable(num_samples) // max(1, len(starts) - i)
            moved.append(self.descend(plan, num_samples, num_trials))
        _, plan = min([*moved, *found[: not moved]], key=itemgetter(0))
        return replace(plan, provenance={**plan.provenance, **self.record(plan, to_report, before)})

    def descend(self, plan: SDMPlan, num_samples: int, num_trials: int) -> tuple[float, SDMPlan]:
        """Moves the noise levels of a plan towards the least distance on the first samples, by damped Gauss-Newton steps.

        Args:
            num_trials: Samplings there may be.
        """
        shape = _hats(plan.num_steps, KNOTS)
        if self.scheduler.init_noise_sigma != 1:
            shape = shape[:, 1:]  # the first level is that of the initial noise

        def growth(sigmas: Tensor) -> Tensor:
            steps = -sigmas[:-1].log().diff()
            return (steps[1:] / steps[:-1]).amax() if len(steps) > 1 else steps.new_ones(())

        most_growth = growth(plan.sigmas).clamp(min=MOST_GROWTH)
        best, position = plan, torch.zeros(shape.shape[1], **FLOAT64)
        # As those of one sample: the normal equations have the root mean square of all.
        deviations = self.weighted_deviations(plan, num_samples).view(1, -1)
        newest, distance = (best, deviations, position), _mean_distance(deviations)
        damping, num_tried = DAMPING_START, 1

        def distance_at(position: Tensor) -> float:
            """That of the plan moved to a position; infinite if it may not be there, or cannot be paid."""
            nonlocal newest, num_tried
            levels = (plan.sigmas[:-1] * (shape @ position).exp()).clamp(self.low, self.high)
            sigmas = _ending_at_zero(levels)
            allowed = (levels[1:] < levels[:-1] * (1 - 1e-3)).all() and growth(sigmas) <= most_growth
            if not allowed or num_tried >= num_trials:
                return math.inf
            moved, num_tried = replace(plan, sigmas=sigmas), num_tried + 1
            newest = moved, self.weighted_deviations(moved, num_samples).view(1, -1), position
            return _mean_distance(newest[1])

        jacobian: Tensor | None = None
        while num_tried + (len(position) if jacobian is None else 0) < num_trials:
            fresh, before = jacobian is None, distance
            if jacobian is None:
                # Inwards at the first knot, where the levels end.
                signs = [-1.0, *[1.0] * (len(position) - 1)]
                rows = []
                for sign, unit in zip(signs, torch.eye(len(position), **FLOAT64)):
                    if distance_at(position + sign * DIFFERENCE * unit) == math.inf:
                        return distance, best
                    rows.append((newest[1] - deviations) / (sign * DIFFERENCE))
                jacobian = torch.cat(rows)
            residuals, start = deviations[0], position
            step, distance, damping = damped_step(
                jacobian @ jacobian.T,
                jacobian @ residuals,
                lambda step: distance_at(start + step.clamp(-MOST_MOVED, MOST_MOVED)),  # noqa: B023
                distance,
                damping,
            )
            if step.any():
                best, deviations, position = newest
                # Broyden's update by what the step found.
                step = position - start
                missing = deviations[0] - residuals - step @ jacobian
                jacobian += torch.outer(step, missing / step.square().sum())
            if distance > LEAST_GAIN * before:
                if fresh:
                    break
                jacobian = None
        return distance, best

    def record(self, plan: SDMPlan, to_report: range, evaluations_before: int) -> dict[str, Any]:
        """What a plan's provenance says of the measurements."""
        spacings = self.spacings()
        karras = _ending_at_zero(spacings["karras"](plan.num_steps))
        # That of Diffusers' DPM-Solver++ 2M, for flow matching without a choice.
        usual_spacing = spacings.get("before the shift", spacings["trailing"])
        usual_plan = _fixed_plan(plan.num_inference_steps, usual_spacing, "dpmsolver++", "plain")
        distances, usual = (self.deviations(plan, to_report).square().mean(1) for plan in (plan, usual_plan))
        check_finite(distances)
        inside = [(self.levels[1:] >= sigma).sum().clamp(max=len(self.curvature) - 1) for sigma in plan.sigmas[1:-1]]
        return {
            "measured_sigmas": self.levels.tolist(),
            "measured_curvature": self.curvature.tolist(),
            "eta": self.step_errors(plan.sigmas).tolist(),
            "curvature": [0.0, *(self.curvature[i].item() for i in inside)],
            "karras_sigmas": karras.tolist(),
            "karras_eta": self.step_errors(karras).tolist(),
            "distance": distances.mean().item(),
            "distance_error": distances.std().item() / math.sqrt(len(distances)) if len(distances) > 1 else None,
            "median_distance": distances.median().item(),
            "plain_distance": usual.mean().item(),
            "num_evaluations": self.num_shared_evaluations + self.num_evaluations - evaluations_before,
        }


def _fixed_plan(num_inference_steps: int, spacing: Spacing, solver: Solver, name: str) -> SDMPlan:
    """An uncalibrated plan on a spacing, whose name it records."""
    plan = uncalibrated_plan(num_inference_steps, lambda n: _ending_at_zero(spacing(n)), solver=solver)
    return replace(plan, provenance={"spacing": name})


def _variants(plan: SDMPlan, spacing: Spacing, solvers: Sequence[Solver]) -> list[SDMPlan]:
    """Plans for as many evaluations with another solver, a later switch, or one of the published blends."""
    n, name = plan.num_inference_steps, plan.provenance["spacing"]
    plans = [_fixed_plan(n, spacing, solver, name) for solver in solvers if solver != plan.solver]
    if plan.solver != "heun" and plan.num_steps > 2:
        plans += [replace(plan, switch_index=2), replace(plan, switch_index=1, blend="linear")]
        plans.append(replace(plan, switch_index=1, blend="cosine"))
    # Too few steps of 3M are those of 2M.
    return [plan for plan in plans if plan.solver != "dpmsolver++3m" or max(plan.orders) > 2]


def _mean_distance(deviations: Tensor) -> float:
    """Mean over samples of the root mean square of deviations `(B, entries)`; infinite if sampling diverged."""
    distance = deviations.square().mean(1).sqrt().mean()
    return distance.item() if distance.isfinite() else math.inf


def _ending_at_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels.double(), torch.zeros(1, **FLOAT64)])


def _hats(num_steps: int, num_knots: int) -> Tensor:
    """Values `(N, K)` at N steps of the K piecewise linear functions that are 1 at one of K equally spaced knots."""
    knots = torch.arange(min(num_steps, num_knots), **FLOAT64)
    positions = torch.linspace(0, knots[-1].item(), num_steps, **FLOAT64)
    return (1 - (positions[:, None] - knots).abs()).clamp(min=0)
