"""What both schedulers do in one pipeline class: how often it evaluates its network, its first order, and its distillation."""

import copy
import functools
import inspect
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from torch import Tensor, nn

from diffusers_gas import GASScheduler, SDMPlan, SDMScheduler
from diffusers_gas.distillation.gauss_newton import Problem, best_initial_solver, distill_gauss_newton
from diffusers_gas.pipelines.driving import sample_latents, scheduler_config
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache
from diffusers_gas.schedulers.configs import translate_config
from diffusers_gas.schedulers.scheduling_utils import ODEScheduler
from diffusers_gas.schedulers.sdm_plan import flow_shift
from diffusers_gas.utils.diffusers_hooks import DEFAULT_VALUES

from .components import build
from .exceptions import INVERTED
from .inputs import call_arguments, merged


SCHEDULERS = (GASScheduler, SDMScheduler)
STEP_COUNTS = (4, 8)
DENOISERS = [
    "unet",
    "transformer",
    "transformer_2",
    "unconditional_transformer",
    "prior",
    "decoder",
    "diffusion_decoder",
    "model",
]
EQUAL = 1e-3  # relative to the largest entry of a state
NO_ODE = "not an ODE of a known noise schedule"


class Step(NamedTuple):
    """One call of a scheduler's `step`."""

    sample: Tensor
    model_output: Tensor
    prev_sample: Tensor


class Sampling(NamedTuple):
    """What passed between a pipeline, its scheduler and its networks in one call.

    Attributes:
        steps: Calls of `step`.
        evaluations: Calls of the networks that denoise.
        times: Arguments of the calls of `set_timesteps`.
    """

    steps: list[Step]
    evaluations: int
    times: list[dict[str, Any]]

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.steps), self.evaluations


def examine(pipeline_class: type[DiffusionPipeline]) -> dict[str, Any]:
    """All that the matrix records of a class."""
    try:
        pipe = build(pipeline_class)
    except Exception as error:
        return {"not_built": _description(error)}
    result: dict[str, Any] = {}
    try:
        config = scheduler_config(pipe)
        result["scheduler"] = config["_class_name"]
        result["noise"] = kind_of_noise(config)
    except ValueError:
        result["noise"] = NO_ODE
        return result | {kind.__name__: _refusal(pipe, kind) for kind in SCHEDULERS}
    except Exception as error:
        return result | {kind.__name__: {"failure": _description(error)} for kind in SCHEDULERS}
    inputs = call_arguments(pipeline_class)
    expected: dict[int, Sampling] = {}
    try:
        expected = {n: sample(pipe, reference(config), n, inputs) for n in STEP_COUNTS}
    except Exception as error:
        result["no_reference"] = _description(error)
        try:  # Diffusers' first-order schedulers do not fit all pipelines
            expected = {n: sample(pipe, copy.deepcopy(pipe.scheduler), n, inputs) for n in STEP_COUNTS}
        except Exception as error:
            return result | {"not_sampled": _description(error)}
    if not any(sampling.steps for sampling in expected.values()):
        message = "It takes no steps with its scheduler."
        return result | {"not_sampled": {"error": "", "message": message, "where": ""}}
    for kind in SCHEDULERS:
        found = result[kind.__name__] = _sampling(pipe, kind, config, inputs, expected)
        if found.get("sampled"):
            found["first_order"] = _attempt(lambda kind=kind: first_order(pipe, kind, config, inputs))
    if result["GASScheduler"].get("sampled"):
        result["distilled"] = _attempt(lambda: distilled(pipe, inputs))
    return result


def _attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return {"failure": _description(error)}


def _description(error: BaseException) -> dict[str, str]:
    """The type of an error, its message, and the last line of Diffusers, Transformers or this package that raised it."""
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        for package in ("diffusers_gas", "diffusers", "transformers"):
            if f"/{package}/" in frame.filename:
                where = f"{package}/{frame.filename.rsplit(f'/{package}/', 1)[1]}:{frame.lineno}"
                break
    return {"error": type(error).__name__, "message": str(error).strip()[:500], "where": where}


# A call of a pipeline, observed


def extended(scheduler: SchedulerMixin, **methods: Any) -> SchedulerMixin:
    """The scheduler with other methods. Its copies, which some pipelines step for a part of a sample, have them, too."""
    kind = type(scheduler)
    scheduler.__class__ = type(kind.__name__, (kind,), methods)
    return scheduler


@contextmanager
def plugged(pipe: DiffusionPipeline, scheduler: SchedulerMixin) -> Iterator[None]:
    """The pipeline, and those that it is made of, with another scheduler."""
    own = pipe.scheduler
    parts = [pipe, *(part for part in vars(pipe).values() if isinstance(part, DiffusionPipeline))]
    holders = [part for part in parts if getattr(part, "scheduler", None) is own]
    for holder in holders:
        holder.scheduler = scheduler
        holder.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        for holder in holders:
            holder.scheduler = own


@contextmanager
def counted(pipe: DiffusionPipeline) -> Iterator[list[int]]:
    """A list that grows by one entry a call of a network that denoises."""
    calls: list[int] = []
    networks = [network for name in DENOISERS if isinstance(network := getattr(pipe, name, None), nn.Module)]
    hooks = [network.register_forward_hook(lambda *_: calls.append(1)) for network in networks]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def sample(
    pipe: DiffusionPipeline,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    inputs: dict[str, Any],
    calls: list[int] | None = None,
) -> Sampling:
    """One complete call of the pipeline. `calls` grows by an entry for every evaluation, also if the call fails."""
    steps: list[Step] = []
    times: list[dict[str, Any]] = []
    kind = type(scheduler)
    known = inspect.signature(kind.step).parameters

    @functools.wraps(kind.step)  # pipelines inspect the signature
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, ODEScheduler):  # some pipelines do not inspect it
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        before, said = sample.clone(), model_output.clone()
        output = kind.step(self, model_output, timestep, sample, *args, **kwargs)
        steps.append(Step(before, said, output[0].clone()))
        return output

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        times.append(dict(inspect.signature(kind.set_timesteps).bind(self, *args, **kwargs).arguments))
        kind.set_timesteps(self, *args, **kwargs)

    names = inspect.signature(type(pipe).__call__).parameters
    own = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": num_inference_steps}
    arguments = inputs | {name: value for name, value in own.items() if name in names}
    inverted = {
        name: value() if callable(value) else value for name, value in merged(INVERTED, type(pipe).__name__).items()
    }
    torch.manual_seed(0)
    methods = {"step": step, "set_timesteps": set_timesteps}
    if not hasattr(
        kind, "scale_model_input"
    ):  # which a pipeline does not call if the scheduler is of exactly this class
        methods["scale_model_input"] = lambda self, sample, timestep=None: sample
    extended(scheduler, **methods)
    try:
        with plugged(pipe, scheduler), counted(pipe) as found:
            try:
                if inverted:
                    pipe.invert(**inverted, num_inversion_steps=num_inference_steps)
                pipe(**arguments)
            finally:
                if calls is not None:
                    calls.extend(found)
    finally:
        scheduler.__class__ = kind
    return Sampling(steps, len(found), times)


# Sampling


def kind_of_noise(config: dict[str, Any]) -> str:
    """The noise schedule that a scheduler's config describes.

    Raises:
        ValueError: If there is none that this package knows.
    """
    settings = translate_config(config)
    if settings.get("use_flow_sigmas"):
        return "flow matching" + (", dynamic shift" if settings.get("use_dynamic_shifting") else "")
    if settings.get("exploding_sigmas") is not None:
        return "variance exploding"
    if settings.get("sigma_data") is not None:
        return "EDM" + (", times as angles" if settings.get("edm_timestep") == "atan" else "")
    return "variance preserving"


def _refusal(pipe: DiffusionPipeline, kind: Any) -> dict[str, Any]:
    """The message with which a scheduler refuses to replace a pipeline's."""
    with counted(pipe) as calls:
        try:
            kind.from_config(scheduler_config(pipe))
        except ValueError as error:
            return {"refused": str(error), "evaluations": len(calls)}
    return {"failure": {"error": "", "message": "It was not refused.", "where": ""}}


def _sampling(
    pipe: DiffusionPipeline, kind: Any, config: dict[str, Any], inputs: dict[str, Any], expected: dict[int, Sampling]
) -> dict[str, Any]:
    """Whether a scheduler samples with the evaluations of a scheduler of Diffusers, finitely and repeatably."""
    calls: list[int] = []
    try:
        found = {n: sample(pipe, kind.from_config(config), n, inputs, calls) for n in STEP_COUNTS}
        again = sample(pipe, kind.from_config(config), STEP_COUNTS[0], inputs)
    except ValueError as error:
        return {"failure": _description(error)} if calls else {"refused": str(error), "evaluations": 0}
    except Exception as error:
        return {"failure": _description(error)}
    steps = [step for sampling in found.values() for step in sampling.steps]
    first = found[STEP_COUNTS[0]].steps
    checks = {
        "as many evaluations as Diffusers": all(found[n].counts == expected[n].counts for n in STEP_COUNTS),
        "any steps and evaluations": all(min(found[n].counts) > 0 for n in STEP_COUNTS),
        "finite": all(bool(step.prev_sample.isfinite().all()) for step in steps),
        "repeatable": bool(first) and torch.equal(first[-1].prev_sample, again.steps[-1].prev_sample),
        "the network says something": any(step.model_output.float().std() > EQUAL for step in steps),
    }
    counts = {str(n): list(found[n].counts) for n in STEP_COUNTS}
    if all(checks.values()):
        return {"sampled": True, "steps_and_evaluations": counts}
    message = "Not " + ", ".join(name for name, passed in checks.items() if not passed)
    theirs = {str(n): list(expected[n].counts) for n in STEP_COUNTS}
    return {"failure": {"error": "", "message": f"{message}: {counts}, of Diffusers {theirs}.", "where": ""}}


# First order


def reference(config: dict[str, Any], to_data: bool = True) -> SchedulerMixin:
    """Diffusers' first-order scheduler for a network. It ends at data or, without `to_data`, at the first trained time."""
    noise = kind_of_noise(config)
    # Diffusers would replace the defaults of the pipeline's own class by those of the class made here.
    config = {name: value for name, value in config.items() if name != DEFAULT_VALUES}
    if noise.startswith("flow") or noise == "variance exploding":
        names = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
        settings = {name: value for name, value in config.items() if name in names}
        scheduler = FlowMatchEulerDiscreteScheduler(**(settings | {"stochastic_sampling": False}))
        # Some pipelines keep settings of their own in the config.
        scheduler.register_to_config(**{k: v for k, v in config.items() if k not in names and not k.startswith("_")})
        return scheduler
    if noise.startswith("EDM"):
        sigma_data = translate_config(config)["sigma_data"]
        return EDMEulerScheduler.from_config(config, sigma_max=100.0, sigma_data=sigma_data)
    end = "zero" if to_data else "sigma_min"
    if config["_class_name"] == "EulerDiscreteScheduler":  # whose states are those of DDIM divided by alpha
        # With another spacing its initial noise is slightly smaller than that of the noise schedule.
        return EulerDiscreteScheduler.from_config(
            config, timestep_spacing="leading", steps_offset=1, final_sigmas_type=end
        )
    settings = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": to_data}
    if config.get("snr_shift_scale") is not None:
        return CogVideoXDDIMScheduler.from_config(config, **settings)
    if config.get("variance_type") in ("learned", "learned_range"):  # which DDIM does not know
        return DPMSolverMultistepScheduler.from_config(
            config, timestep_spacing="trailing", solver_order=1, final_sigmas_type=end
        )
    return DDIMScheduler.from_config(config, **settings)


def at_times(scheduler: SchedulerMixin, **fixed: Any) -> SchedulerMixin:
    """The scheduler with fixed times in the place of those that a pipeline asks for; device and shift are the pipeline's."""
    kind = type(scheduler)

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        asked = inspect.signature(kind.set_timesteps).bind(self, *args, **kwargs).arguments
        kind.set_timesteps(self, **({name: asked[name] for name in ("device", "mu") if name in asked} | fixed))

    return extended(scheduler, set_timesteps=set_timesteps)


def first_order(pipe: DiffusionPipeline, kind: Any, config: dict[str, Any], inputs: dict[str, Any]) -> float:
    """The largest difference of a state from Diffusers' Euler or DDIM on the same times, relative to its largest entry."""
    n = STEP_COUNTS[-1]
    noise = kind_of_noise(config)
    flow, edm = noise.startswith("flow"), noise.startswith("EDM")
    asked = sample(pipe, reference(config), n, inputs).times[-1]
    theirs = reference(config, to_data=kind is SDMScheduler)
    # A list starts slightly below 1, because a plan of `SDMScheduler` has finite sigma / alpha.
    levels = [0.999 * (1 - k / n) for k in range(n)]
    unshifted = flow and asked.get("sigmas") is not None and asked.get("timesteps") is not None
    lists = {"sigmas": levels, **({"timesteps": [1000 * level for level in levels]} if unshifted else {})}
    if flow:
        theirs = at_times(theirs, **lists)
    expected = sample(pipe, theirs, n, inputs).steps
    timesteps = theirs.timesteps
    if kind is GASScheduler:
        ours = GASScheduler.from_config(config, solver_order=1, **({"t_end": 0.0} if flow else {}))
        ours = at_times(ours, **(lists if unshifted else {"timesteps": timesteps.tolist()}))
    else:
        ours = SDMScheduler.from_config(config, **({"sigma_max": 100.0} if edm else {}))
        schedule = ours.noise_schedule(asked.get("mu"), unshifted) if flow else ours.noise_schedule()
        plan = (-schedule.lambda_(schedule.inverse_timestep(timesteps.double()))).exp() / flow_shift(schedule)
        ours.add_plan(SDMPlan(torch.cat([plan, plan.new_zeros(1)]), len(plan) - 1))
        ours = at_times(ours, **(lists if unshifted else {"num_inference_steps": n}))
    steps = sample(pipe, ours, n, inputs).steps
    # GAS sees EDM networks as variance preserving: its states are alpha times EDM's, and it ends a little before data.
    scaled = (edm and kind is GASScheduler) or isinstance(theirs, EulerDiscreteScheduler)
    begin = len(timesteps) - len(expected)
    differences = [
        _difference(step.sample / (ours._steps.alphas[begin + k] if scaled else 1.0), other.sample)
        for k, (step, other) in enumerate(zip(steps, expected, strict=True))
    ]
    if not scaled:
        differences.append(_difference(steps[-1].prev_sample, expected[-1].prev_sample))
    return max(differences)


def _difference(state: Tensor, other: Tensor) -> float:
    return (state - other).abs().max().item() / other.abs().max().item()


# Distillation


def distilled(pipe: DiffusionPipeline, inputs: dict[str, Any]) -> dict[str, Any]:
    """One iteration of Gauss-Newton: distances to the teacher before it, after it, and of what the pipeline then samples."""
    scheduler = GASScheduler.from_config(scheduler_config(pipe))
    own = SampleInputs.create(0, 1, **inputs)
    with tempfile.TemporaryDirectory() as folder:
        samples = TeacherCache(folder, type(pipe).__name__, scheduler, STEP_COUNTS[-1]).collect(pipe, own, 1, "")
    problem = Problem(pipe)
    start = best_initial_solver(problem, 3, samples)
    result = distill_gauss_newton(problem, start, samples, samples, max_iterations=1)
    scheduler.add_solver(result.solver)
    _, final = sample_latents(pipe, scheduler, 3, **own.pipeline_arguments(pipe))
    distance = (final[:1] - samples.final).square().mean().item()
    return {
        "closer": result.distance < result.initial_distance,
        "as_fitted": math.isclose(distance, result.distance, rel_tol=1e-2),
        "distances": [result.initial_distance, result.distance, distance],
    }
