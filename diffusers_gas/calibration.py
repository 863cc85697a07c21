"""Calibration of `SDMScheduler`: where a pipeline's trajectories bend, measured, and the plans that follow from it.

The methods of `adaptive/` see the unscaled state x / alpha and the noise level sigma / alpha; the pipeline sees its own.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, TypeAlias, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from . import adaptive
from .adaptive import ErrorMeasure, Tolerance
from .noise_schedules import NoiseSchedule, data_prediction_weights
from .pipelines.driving import drive, scheduler_config
from .pipelines.inputs import SampleInputs
from .schedulers.scheduling_sdm import SDMScheduler
from .schedulers.sdm_plan import SOLVERS, SDMPlan, published_plan, shift


T = TypeVar("T")
Method: TypeAlias = Callable[[Tensor, Tensor], adaptive.Algorithm[T]]
"""From the unscaled first state, shape `(B, ...)`, and noise levels, shape `(N + 1,)`, to an algorithm of `adaptive/`."""

# Of RMS norms, which do not grow with the size of the samples.
MEASURE = ErrorMeasure("rms")

# Steps of the base grid, and of the Heun solution that candidates are compared with.
BASE_STEPS, REFERENCE_STEPS = 32, 64

# The published ratio eta_max / eta_min of tolerances at the highest and the lowest noise level is 5 to 40.
TOLERANCE_RATIO = 10.0

# Candidates: the exponent q of N-step resampling (published: 0.1 and 0.25), and by how much the last noise level before 0 lies
# above the lowest trained one (published: 1), which pays if there are few evaluations.
EXPONENTS = (0.0, 0.2, 0.4)
LAST_LEVELS = (1.0, 4.0, 16.0)

# A descent from the best of them moves each exponent by 0.1 or doubles the last level, then by half as much.
DESCENT_SCALES = (1.0, 0.5)


@dataclass(frozen=True)
class PlanReport:
    """What calibration found for one number of evaluations.

    The plan's provenance has what was measured along its N steps: the error of each (`eta`), the relative curvature before
    each (`curvature`), and the errors of as many steps on Karras' noise levels (`karras_sigmas`, `karras_eta`).
    """

    plan: SDMPlan
    distance: float
    """Mean squared distance of final samples to the fine solution."""
    euler_distance: float
    """Of first-order steps on Karras' noise levels with as many evaluations."""
    heun_distance: float
    """Of Heun's steps on them."""


@dataclass
class Calibration:
    """Result of `calibrate`: the scheduler, how its plans do, and what was spent on them."""

    scheduler: SDMScheduler
    reports: dict[int, PlanReport] = field(default_factory=dict)
    measured_sigmas: Tensor | None = None
    """The adaptive schedule that all plans are resampled from, shape `(K + 1,)`."""
    num_evaluations: int = 0
    """Network evaluations, each counted once for every sample."""

    def summary(self) -> str:
        """A table of the plans."""
        lines = [
            "| evaluations | solver | steps | second order from | last sigma | distance | Euler | Heun |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for n, report in sorted(self.reports.items()):
            plan = report.plan
            switch = "-" if plan.switch_index == plan.num_steps - 1 else _switch_label(plan)
            lines.append(
                f"| {n} | {plan.solver} | {plan.num_steps} | {switch} | {plan.sigmas[-2]:.3g} | {report.distance:.2e} | "
                f"{report.euler_distance:.2e} | {report.heun_distance:.2e} |"
            )
        return "\n".join(lines)


def _switch_label(plan: SDMPlan) -> str:
    return f"step {plan.switch_index}, sigma {plan.sigmas[plan.switch_index]:.3g}"


def calibrate(
    pipe: DiffusionPipeline,
    num_inference_steps: Sequence[int] = (8, 12, 18),
    *,
    inputs: SampleInputs | None = None,
    batch_size: int = 32,
    solvers: Sequence[str] = SOLVERS,
    tolerance: Tolerance | None = None,
    on_plan: Callable[[SDMScheduler], None] | None = None,
    provenance: Mapping[str, Any] | None = None,
    **pipeline_arguments: Any,
) -> Calibration:
    """Measures a pipeline's trajectories and finds a plan for each number of evaluations.

    As published, an adaptive schedule is built with steps whose estimated Wasserstein error stays below a tolerance, its
    error profile is measured, and its noise levels are redistributed over the wanted number of steps. What was published
    as settings (the exponents power and q, and the switch, there a threshold tau) is here what comes closest to a fine
    solution of the same trajectories; so are the last noise level before 0 and the kind of second-order steps.

    Args:
        pipe: The pipeline; left as it is.
        num_inference_steps (`Sequence[int]`): Numbers of evaluations, at least 2.
        inputs (`SampleInputs`, *optional*): Seeds and prompts to measure with; by default 32 samples that all have the
            `pipeline_arguments`, e.g. `prompt="a fox", guidance_scale=5.0`.
        batch_size (`int`): Samples per pipeline call. The adaptive schedule is built on one batch, all else on all.
        solvers: Which kinds of second-order steps may be chosen.
        tolerance (`Tolerance`, *optional*): Of the adaptive schedule, for errors in RMS norm; by default one that gives
            about 32 steps.
        on_plan: Called with the scheduler after every plan, e.g. to save it.
        provenance: What else is to be recorded with the plans, e.g. the `teacher`; anything JSON can hold.
    """
    step_counts = sorted(set(num_inference_steps))
    unknown = sorted(set(solvers) - set(SOLVERS))
    if not step_counts or step_counts[0] < 2:
        raise ValueError(f"`num_inference_steps` must be numbers of evaluations of at least 2, got {step_counts}.")
    if unknown or not solvers:
        raise ValueError(f"`solvers` must be some of {SOLVERS}, got {tuple(solvers)}.")
    if inputs is not None and pipeline_arguments:
        raise ValueError(f"Pass {sorted(pipeline_arguments)} as part of `inputs`, not beside it.")
    inputs = SampleInputs.create(0, 32, **pipeline_arguments) if inputs is None else inputs
    run = _Run(pipe, inputs, batch_size)
    calibration = Calibration(SDMScheduler.from_config(scheduler_config(pipe)))
    run.measure(tolerance)
    calibration.measured_sigmas = run.path
    for n in tqdm(step_counts, desc="Calibrating", unit="plan"):
        report = run.find_plan(n, solvers)
        report = replace(
            report, plan=replace(report.plan, provenance={**(provenance or {}), **report.plan.provenance})
        )
        calibration.reports[n] = report
        calibration.scheduler.add_plan(report.plan)
        calibration.num_evaluations = run.num_evaluations
        if on_plan is not None:
            on_plan(calibration.scheduler)
    return calibration


def run_on_pipeline(pipe: DiffusionPipeline, sigmas: Tensor, method: Method[T], **pipeline_inputs: Any) -> T:
    """Runs an algorithm of `adaptive/` with a pipeline as its denoiser; see `diffusers_gas.oracle.drive`.

    Args:
        sigmas (`Tensor` of shape `(N + 1,)`): Noise levels as in [`SDMPlan`]; the pipeline's own noise is taken to have the
            first.
        method: From the unscaled first state and the pipeline's noise levels (`sigmas` times the shift of flow matching)
            to the algorithm, whose first request must be made there.
    """

    def algorithm(noise_schedule: NoiseSchedule, prediction_type: str):
        levels = sigmas * shift(noise_schedule)
        t = noise_schedule.inverse_lambda(-levels[0].log())
        sample, model_output = yield None, t
        dtype = torch.promote_types(sample.dtype, torch.float32)
        requests = method(sample.to(dtype) / noise_schedule.alpha(t).item(), levels)
        next(requests)
        while True:
            p, q = data_prediction_weights(prediction_type, noise_schedule, t, t)
            try:
                x, sigma = requests.send(p.item() * sample.to(dtype) + q.item() * model_output.to(dtype))
            except StopIteration as stop:
                return stop.value
            t = noise_schedule.inverse_lambda(-sigma.log())
            sample, model_output = yield noise_schedule.alpha(t).item() * x, t

    return drive(pipe, algorithm, **pipeline_inputs)


class _Run:
    """The measurements on one pipeline and its samples, with a count of network evaluations."""

    def __init__(self, pipe: DiffusionPipeline, inputs: SampleInputs, batch_size: int):
        self.pipe, self.inputs = pipe, inputs
        self.batches = [inputs[positions] for positions in inputs.calls(batch_size)]
        scheduler = SDMScheduler.from_config(scheduler_config(pipe))
        # Noise levels before the shift do not depend on it.
        self.low, self.high = scheduler.sigma_range(scheduler.noise_schedule(mu=1.0))
        self.coarse = list(product(EXPONENTS, LAST_LEVELS))
        self.num_evaluations = 0

    def karras(self, num_steps: int) -> Tensor:
        return torch.cat([adaptive.sigma_grid(num_steps, self.low, self.high), torch.zeros(1, dtype=torch.float64)])

    def run(self, sigmas: Tensor, method: Method[T], num_batches: int | None = None) -> list[T]:
        """The results of a method for every batch."""
        results = []
        for batch in self.batches[:num_batches]:
            result = run_on_pipeline(self.pipe, sigmas, method, **batch.pipeline_arguments(self.pipe))
            self.num_evaluations += result.num_evaluations * len(batch)
            results.append(result)
        return results

    def mean(self, values: Iterable[Tensor]) -> Tensor:
        """Mean of one tensor a batch over all samples."""
        return sum(value * len(batch) for value, batch in zip(values, self.batches)) / sum(map(len, self.batches))

    def eta(self, sigmas: Tensor) -> Tensor:
        """Error of every step of Euler's along some noise levels, `(N,)`."""
        profiles = self.run(sigmas, lambda x, levels: adaptive.eta_profile(x, levels, measure=MEASURE))
        return self.mean(profile.eta for profile in profiles)

    def measure(self, tolerance: Tolerance | None) -> None:
        """The adaptive schedule, its error profile, and the fine solution on noise levels that follow from them."""
        grid = self.karras(BASE_STEPS)
        if tolerance is None:
            # Equal errors of that many steps: their roots add up to the same length.
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
        fine = self.resample(REFERENCE_STEPS, _Setting("heun", 0, 0.25, 1.0))
        self.reference = [trajectory.sample for trajectory in self.run(fine, adaptive.heun)]

    def resample(self, num_steps: int, setting: "_Setting") -> Tensor:
        """The adaptive schedule redistributed over `num_steps` steps, which end at `setting.last * low` and 0."""
        levels, eta = self.path[:-1], self.path_eta[:-1]
        last = min(self.low * setting.last, levels[1].item())
        inside = int((levels > last * (1 + 1e-9)).sum())
        share = (levels[inside - 1] - last) / (levels[inside - 1] - levels[inside])
        levels = torch.cat([levels[:inside], levels.new_tensor([last])])
        eta = torch.cat([eta[: inside - 1], eta[inside - 1 : inside] * share**2])
        return adaptive.resample_sigmas(levels, eta, num_steps, power=setting.power, q=setting.q)

    def plan(self, num_inference_steps: int, setting: "_Setting") -> SDMPlan:
        num_steps = num_inference_steps
        if setting.solver == "heun":
            num_steps = (num_inference_steps + 1 + setting.switch_index) // 2
        return SDMPlan(self.resample(num_steps, setting), setting.switch_index, setting.solver)

    def trajectories(self, plan: SDMPlan) -> tuple[list[adaptive.Trajectory], float]:
        """Samples by a plan, and their mean squared distance to the fine solution."""
        solve = adaptive.adaptive_heun if plan.solver == "heun" else adaptive.adaptive_dpmsolver
        weights = adaptive.step_weights(plan.num_steps, plan.switch_index)
        trajectories = self.run(plan.sigmas, lambda x, levels: solve(x, levels, weights))
        errors = [(a.sample - b).square().mean().cpu() for a, b in zip(trajectories, self.reference)]
        distance = self.mean(errors).item()
        return trajectories, distance if math.isfinite(distance) else math.inf

    def find_plan(self, num_inference_steps: int, solvers: Sequence[str]) -> PlanReport:
        """The best plan by a coarse search, then a descent along each of the settings; to be called with growing numbers."""
        n = num_inference_steps
        distances: dict[_Setting, float] = {}

        def distance(setting: _Setting) -> float:
            if setting not in distances:
                distances[setting] = self.trajectories(self.plan(n, setting))[1]
            return distances[setting]

        switches = {solver: published_plan(n, self.karras, solver=solver).switch_index for solver in solvers}
        best = min((_Setting(*which, *grid) for which, grid in product(switches.items(), self.coarse)), key=distance)
        for scale in DESCENT_SCALES:
            improving = True
            while improving:
                near = min(best.neighbours(n, scale), key=distance)
                improving = distance(near) < distance(best)
                best = near if improving else best
        # With more evaluations the last level can only be lower, and the rest hardly changes.
        self.coarse = [(best.q, best.last), (best.q, max(1.0, best.last / 2))]
        return self.report(n, best)

    def report(self, n: int, setting: "_Setting") -> PlanReport:
        plan = self.plan(n, setting)
        trajectories, distance = self.trajectories(plan)
        karras = self.karras(plan.num_steps)
        curvature = self.mean(trajectory.relative_curvature.mean(1).cpu() for trajectory in trajectories)
        provenance = {
            "q": setting.q,
            "power": setting.power,
            "tolerance": asdict(self.tolerance),
            "eta": self.eta(plan.sigmas).tolist(),
            "curvature": curvature.tolist(),
            "karras_sigmas": karras.tolist(),
            "karras_eta": self.eta(karras).tolist(),
            "distance": distance,
            "num_samples": sum(map(len, self.batches)),
            "pipeline_arguments": self.inputs.record(self.pipe),
            "versions": {module.__name__: module.__version__ for module in (torch, diffusers)},
        }
        return PlanReport(
            replace(plan, provenance=provenance),
            distance,
            euler_distance=self.trajectories(SDMPlan(self.karras(n), n - 1))[1],
            heun_distance=self.trajectories(heun_plan(n, self.karras))[1],
        )


@dataclass(frozen=True)
class _Setting:
    """What is searched over, beside the numbers of evaluations and steps."""

    solver: str
    switch_index: int
    q: float
    last: float
    power: float = 0.5

    def neighbours(self, num_inference_steps: int, scale: float) -> list["_Setting"]:
        """Settings that differ in one thing. With a given number of evaluations a Heun plan's switch moves by 2 at once."""
        n = num_inference_steps
        stride, first = (2, (n + 1) % 2) if self.solver == "heun" else (1, 1)
        switches = {min(max(self.switch_index + move, first), n - 1) for move in (-stride, stride)}
        return [
            *(replace(self, switch_index=index) for index in sorted(switches)),
            *(replace(self, q=self.q + move) for move in (-0.1 * scale, 0.1 * scale)),
            *(replace(self, power=self.power + move) for move in (-0.1 * scale, 0.1 * scale)),
            *(replace(self, last=max(1.0, self.last * 2 ** (move * scale))) for move in (-1, 1)),
        ]


def heun_plan(num_inference_steps: int, grid: Callable[[int], Tensor]) -> SDMPlan:
    """Heun's method; an even number of evaluations leaves the first step to Euler's."""
    steps = num_inference_steps // 2 + 1
    return SDMPlan(grid(steps), 2 * steps - 1 - num_inference_steps)
