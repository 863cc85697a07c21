"""Calibration of `SDMScheduler`: measures where a pipeline's trajectories bend, and finds plans that follow from it.

The methods of `adaptive/` use the unscaled state x / alpha and the noise level sigma / alpha. [`run_on_pipeline`] translates
between them and the states and times of a pipeline.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from . import adaptive
from .adaptive import DenoiserRequests, ErrorMeasure, Tolerance
from .noise_schedules import NoiseSchedule, data_prediction_weights
from .pipelines.driving import Requests, drive, rollout, scheduler_config
from .pipelines.inputs import TRAINING_SEED, SampleInputs, check_arguments
from .schedulers.scheduling_sdm import SDMScheduler
from .schedulers.sdm_plan import SOLVERS, SDMPlan, published_plan, shift


class Counted(Protocol):
    """A result that says how many network evaluations it took."""

    @property
    def num_evaluations(self) -> int: ...


T = TypeVar("T")
CountedT = TypeVar("CountedT", bound=Counted)

Solver: TypeAlias = Literal["heun", "dpmsolver++"]

Method: TypeAlias = Callable[[Tensor, Tensor], DenoiserRequests[T]]
"""From the unscaled first state, shape `(B, ...)`, and noise levels, shape `(N + 1,)`, to a method of `adaptive/`."""

# The RMS norm does not grow with the size of the samples.
MEASURE = ErrorMeasure("rms")

# Steps of the base grid, and of the fine solution that candidates are compared with.
BASE_STEPS, REFERENCE_STEPS = 32, 64

# The published ratio eta_max / eta_min of tolerances at the highest and the lowest noise level is 5 to 40.
TOLERANCE_RATIO = 10.0

# First candidates: the exponent q of N-step resampling (published: 0.1 and 0.25), and the ratio of the last noise level before
# 0 to the lowest one of the network (published: 1). A higher last level is better for few evaluations.
EXPONENTS = (0.0, 0.2, 0.4)
LAST_LEVELS = (1.0, 4.0, 16.0)

# A descent from the best candidate changes each exponent by 0.1 or doubles the last level, then by half as much.
DESCENT_SCALES = (1.0, 0.5)


def calibrate(
    pipe: DiffusionPipeline,
    num_inference_steps: int | Sequence[int] = 12,
    *,
    inputs: SampleInputs | None = None,
    batch_size: int = 32,
    solvers: Sequence[str] = SOLVERS,
    tolerance: Tolerance | None = None,
    on_plan: Callable[[SDMScheduler], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
    **pipeline_arguments: Any,
) -> SDMScheduler:
    """Measures a pipeline's trajectories and finds a plan for each number of network evaluations. Nothing is trained.

    As published (SDM, arXiv 2602.12624), an adaptive schedule is built whose steps have an estimated Wasserstein error below
    a tolerance, the errors of its steps are measured, and its noise levels are redistributed over the wanted number of steps.
    The published method has settings for the rest: the exponents power and q, and a threshold tau for the switch to second
    order. Here a search chooses them, and also the last noise level before 0 and the kind of second-order steps, by the
    distance to a fine solution of the same trajectories. A plan does not depend on the other numbers of evaluations.

    Args:
        pipe: The pipeline; left as it is. It must start from noise: for image-to-image pass the text-to-image pipeline of the
            same network.
        num_inference_steps (`int` or `Sequence[int]`, defaults to 12): Numbers of network evaluations, at least 2.
        inputs (`SampleInputs`, *optional*): Seeds and prompts to measure with. The default is 32 samples that all have the
            `pipeline_arguments`.
        batch_size (`int`, defaults to 32): Samples per pipeline call. The adaptive schedule is built on the first call's
            samples; everything else is measured on all samples.
        solvers: The kinds of second-order steps to choose from, `"heun"` and `"dpmsolver++"`.
        tolerance (`Tolerance`, *optional*): Largest errors of the adaptive schedule's steps, in RMS norm. The default makes
            about 32 steps.
        on_plan (`Callable`, *optional*): Called with the scheduler after every plan, e.g. to save it.
        provenance: Further entries for the plans' provenance, e.g. the `teacher`; anything JSON can hold.
        pipeline_arguments: Arguments of the pipeline's call, instead of `inputs`, e.g. `prompt="a fox"`.

    Returns:
        [`SDMScheduler`]: With a plan for each number of evaluations. A plan's `provenance` says what was measured; [`summary`]
        prints the main numbers. For all N steps of the plan: `eta` (the error of each, in RMS norm), `curvature` (the
        relative curvature before each, in 1 / sigma), and the errors `karras_eta` of N steps on Karras' noise levels
        `karras_sigmas`. For the plan: `distance` (mean squared distance of final samples to the fine solution),
        `euler_distance` and `heun_distance` (those of Euler's and Heun's steps on Karras' noise levels for as many
        evaluations), `q` and `power`, `tolerance`, `measured_sigmas` (the adaptive schedule), `num_samples`, and
        `num_evaluations` (network evaluations for all samples that it took to find the plan; several plans of one call share
        the measurement of the trajectories).

    Raises:
        ValueError: If arguments contradict each other, or if the pipeline starts from an image.
    """
    step_counts = [num_inference_steps] if isinstance(num_inference_steps, int) else sorted(set(num_inference_steps))
    if not step_counts or step_counts[0] < 2:
        raise ValueError(f"`num_inference_steps` must be numbers of evaluations of at least 2, got {step_counts}.")
    if not solvers or set(solvers) - set(SOLVERS):
        raise ValueError(f"`solvers` must be some of {SOLVERS}, got {tuple(solvers)}.")
    if inputs is not None and pipeline_arguments:
        raise ValueError(f"Pass {sorted(pipeline_arguments)} as part of `inputs`, not beside it.")
    check_arguments(pipe, pipeline_arguments)
    inputs = SampleInputs.create(TRAINING_SEED, 32, **pipeline_arguments) if inputs is None else inputs
    scheduler = SDMScheduler.from_config(scheduler_config(pipe))
    search = _PlanSearch(pipe, inputs, batch_size)
    search.measure(tolerance)
    for n in tqdm(step_counts, desc="Calibrating", unit="plan"):
        plan = search.find_plan(n, solvers)
        scheduler.add_plan(replace(plan, provenance={**(provenance or {}), **plan.provenance}))
        if on_plan is not None:
            on_plan(scheduler)
    return scheduler


def summary(scheduler: SDMScheduler) -> str:
    """A Markdown table of a scheduler's plans and of what [`calibrate`] measured for them.

    Its columns `distance`, `Euler` and `Heun` are mean squared distances to a fine solution, the last two on Karras' noise
    levels. `cost` is the number of network evaluations per sample that it took to find the plan.
    """
    lines = [
        "| evaluations | solver | steps | second order from | last sigma | distance | Euler | Heun | cost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for n, plan in sorted(scheduler.plans.items()):
        k, found = plan.switch_index, plan.provenance
        switch = f"step {k}, sigma {plan.sigmas[k]:.3g}" if 2 in plan.orders else "-"
        names = ("distance", "euler_distance", "heun_distance")
        distances = [f"{found[name]:.2e}" if name in found else "-" for name in names]
        cost = f"{found['num_evaluations'] / found['num_samples']:.0f}" if "num_evaluations" in found else "-"
        cells = [n, plan.solver, plan.num_steps, switch, f"{plan.sigmas[-2]:.3g}", *distances, cost]
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
        levels = sigmas * shift(noise_schedule)
        t = noise_schedule.inverse_lambda(-levels[0].log())
        sample, model_output = yield None, t
        dtype = torch.promote_types(sample.dtype, torch.float32)
        noise = sample.to(dtype) / noise_schedule.alpha(t).item()
        method_requests = method(noise, levels)
        x, sigma = next(method_requests)
        # The network has answered for the pipeline's own noise, where most methods begin.
        answered = x is noise and torch.isclose(sigma, levels[0])
        while True:
            if not answered:
                t = noise_schedule.inverse_lambda(-sigma.log())
                sample, model_output = yield noise_schedule.alpha(t).item() * x, t
            answered = False
            p, q = data_prediction_weights(prediction_type, noise_schedule, t, t)
            try:
                x, sigma = method_requests.send(p.item() * sample.to(dtype) + q.item() * model_output.to(dtype))
            except StopIteration as stop:
                return stop.value

    return drive(pipe, requests, from_noise=True, **pipeline_inputs)


def heun_plan(num_inference_steps: int, grid: Callable[[int], Tensor]) -> SDMPlan:
    """Heun's method. With an even number of evaluations the first step is Euler's.

    Args:
        num_inference_steps (`int`): Number of evaluations.
        grid (`Callable`): Noise levels `(N + 1,)` of N steps.
    """
    steps = num_inference_steps // 2 + 1
    return SDMPlan(grid(steps), 2 * steps - 1 - num_inference_steps)


@dataclass(frozen=True)
class _Candidate:
    """The settings that a search varies for one number of evaluations."""

    solver: Solver
    switch_index: int
    q: float
    last: float
    """Ratio of the last noise level before 0 to the lowest one of the network."""
    power: float = 0.5

    def neighbours(self, num_inference_steps: int, scale: float) -> list["_Candidate"]:
        """Candidates that differ in one setting. The switch of a Heun plan moves by 2, which keeps the evaluations."""
        n = num_inference_steps
        stride, first = (2, (n + 1) % 2) if self.solver == "heun" else (1, 1)
        switches = {min(max(self.switch_index + move, first), n - 1) for move in (-stride, stride)}
        return [
            *(replace(self, switch_index=index) for index in sorted(switches)),
            *(replace(self, q=self.q + move) for move in (-0.1 * scale, 0.1 * scale)),
            *(replace(self, power=self.power + move) for move in (-0.1 * scale, 0.1 * scale)),
            *(replace(self, last=max(1.0, self.last * 2 ** (move * scale))) for move in (-1, 1)),
        ]


class _PlanSearch:
    """Measurements on one pipeline and its samples, and the search for plans that follows, with a count of evaluations.

    Args:
        pipe: The pipeline.
        inputs: The samples.
        batch_size: Samples per pipeline call.
    """

    def __init__(self, pipe: DiffusionPipeline, inputs: SampleInputs, batch_size: int):
        self.pipe, self.inputs = pipe, inputs
        self.batches = [inputs[positions] for positions in inputs.calls(batch_size)]
        scheduler = SDMScheduler.from_config(scheduler_config(pipe))
        # Noise levels before the shift do not depend on it.
        self.low, self.high = scheduler.sigma_range(scheduler.noise_schedule(mu=1.0))
        self.num_evaluations = 0

    def karras(self, num_steps: int) -> Tensor:
        return torch.cat([adaptive.sigma_grid(num_steps, self.low, self.high), torch.zeros(1, dtype=torch.float64)])

    def run(self, sigmas: Tensor, method: Method[CountedT], num_batches: int | None = None) -> list[CountedT]:
        """The results of a method of `adaptive/` for every batch."""
        results = []
        for batch in self.batches[:num_batches]:
            result = run_on_pipeline(self.pipe, sigmas, method, **batch.pipeline_arguments(self.pipe))
            self.num_evaluations += result.num_evaluations * len(batch)
            results.append(result)
        return results

    def sample(self, plan: SDMPlan) -> list[Tensor]:
        """The final states of every batch, sampled as `SDMScheduler` does."""
        self.num_evaluations += plan.num_inference_steps * len(self.inputs)
        return [
            drive(self.pipe, rollout(plan.table), from_noise=True, **batch.pipeline_arguments(self.pipe))
            for batch in self.batches
        ]

    def mean(self, values: Iterable[Tensor]) -> Tensor:
        """Mean over all samples of values that are means over a batch, each of shape `()` or `(N,)`."""
        weights = torch.tensor([len(batch) for batch in self.batches], dtype=torch.float64)
        return weights / weights.sum() @ torch.stack([value.cpu().double() for value in values])

    def eta(self, sigmas: Tensor) -> Tensor:
        """Error of every step of Euler's method along noise levels, `(N,)`."""
        profiles = self.run(sigmas, lambda x, levels: adaptive.eta_profile(x, levels, measure=MEASURE))
        return self.mean(profile.eta for profile in profiles)

    def measure(self, tolerance: Tolerance | None) -> None:
        """Measures the adaptive schedule, the errors of its steps, and the fine solution."""
        grid = self.karras(BASE_STEPS)
        if tolerance is None:
            # BASE_STEPS steps of equal error have the same sum of roots of errors as the steps of this grid.
            eta_min = (self.eta(grid).sqrt().sum().item() / BASE_STEPS) ** 2
            tolerance = Tolerance(eta_min, TOLERANCE_RATIO * eta_min)
        self.tolerance = tolerance
        (schedule,) = self.run(
            grid[:-1],
            lambda x, levels: adaptive.adaptive_schedule(x, levels, tolerance, measure=MEASURE),
            num_batches=1,
        )
        self.path = schedule.sigmas * (grid[0] / schedule.sigmas[0])
        self.path_eta = self.eta(self.path)
        self.reference = self.sample(SDMPlan(self.resample(REFERENCE_STEPS, _Candidate("heun", 0, 0.25, 1.0)), 0))
        self.num_shared_evaluations = self.num_evaluations

    def resample(self, num_steps: int, candidate: _Candidate) -> Tensor:
        """The adaptive schedule redistributed over `num_steps` steps, with the candidate's last level and then 0."""
        levels, eta = self.path[:-1], self.path_eta[:-1]
        last = min(self.low * candidate.last, levels[1].item())
        inside = int((levels > last * (1 + 1e-9)).sum())
        share = (levels[inside - 1] - last) / (levels[inside - 1] - levels[inside])
        levels = torch.cat([levels[:inside], levels.new_tensor([last])])
        eta = torch.cat([eta[: inside - 1], eta[inside - 1 : inside] * share**2])
        return adaptive.resample_sigmas(levels, eta, num_steps, power=candidate.power, q=candidate.q)

    def plan(self, num_inference_steps: int, candidate: _Candidate) -> SDMPlan:
        num_steps = num_inference_steps
        if candidate.solver == "heun":
            num_steps = (num_inference_steps + 1 + candidate.switch_index) // 2
        return SDMPlan(self.resample(num_steps, candidate), candidate.switch_index, candidate.solver)

    def distance(self, plan: SDMPlan) -> float:
        """Mean squared distance of a plan's final states to the fine solution; infinite if sampling diverges."""
        errors = ((a - b).square().mean() for a, b in zip(self.sample(plan), self.reference))
        distance = self.mean(errors).item()
        return distance if math.isfinite(distance) else math.inf

    def find_plan(self, num_inference_steps: int, solvers: Sequence[str]) -> SDMPlan:
        """The best plan of a coarse search and of a descent along each setting, with what was measured."""
        n, evaluations_before = num_inference_steps, self.num_evaluations
        distances: dict[_Candidate, float] = {}

        def distance(candidate: _Candidate) -> float:
            if candidate not in distances:
                distances[candidate] = self.distance(self.plan(n, candidate))
            return distances[candidate]

        coarse = []
        for solver in cast(Sequence[Solver], solvers):
            switch_index = published_plan(n, self.karras, solver=solver).switch_index
            coarse += [_Candidate(solver, switch_index, q, last) for q, last in product(EXPONENTS, LAST_LEVELS)]
        best = min(coarse, key=distance)
        for scale in DESCENT_SCALES:
            improving = True
            while improving:
                near = min(best.neighbours(n, scale), key=distance)
                improving = distance(near) < distance(best)
                best = near if improving else best
        measured = self.record(n, best, distance(best))
        measured["num_evaluations"] = self.num_shared_evaluations + self.num_evaluations - evaluations_before
        return replace(self.plan(n, best), provenance=measured)

    def record(self, n: int, candidate: _Candidate, distance: float) -> dict[str, Any]:
        """What a plan's provenance says about a candidate."""
        plan = self.plan(n, candidate)
        karras = self.karras(plan.num_steps)
        return {
            "q": candidate.q,
            "power": candidate.power,
            "tolerance": asdict(self.tolerance),
            "measured_sigmas": self.path.tolist(),
            "eta": self.eta(plan.sigmas).tolist(),
            "curvature": self.curvature(plan).tolist(),
            "karras_sigmas": karras.tolist(),
            "karras_eta": self.eta(karras).tolist(),
            "distance": distance,
            "euler_distance": self.distance(SDMPlan(self.karras(n), n - 1)),
            "heun_distance": self.distance(heun_plan(n, self.karras)),
            "num_samples": len(self.inputs),
            "pipeline_arguments": self.inputs.record(self.pipe),
            "versions": {name: version(name) for name in ("torch", "diffusers", "diffusers_gas")},
        }

    def curvature(self, plan: SDMPlan) -> Tensor:
        """Relative curvature before every step of a plan, `(N,)`."""
        solve = adaptive.adaptive_heun if plan.solver == "heun" else adaptive.adaptive_dpmsolver
        weights = adaptive.step_weights(plan.num_steps, plan.switch_index)
        trajectories = self.run(plan.sigmas, lambda x, levels: solve(x, levels, weights))
        return self.mean(trajectory.relative_curvature.mean(1) for trajectory in trajectories)
