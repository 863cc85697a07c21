"""Both schedulers in every pipeline of PIPELINES.md: evaluations, first order against Diffusers', callbacks, distillation."""

import functools
import importlib.util
import inspect
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    SchedulerMixin,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from first_order import first_order, reference
from tiny_pipelines import (
    MATRIX,
    Step,
    TinyPipeline,
    build,
    generators,
    plugged,
    record_steps,
)
from torch import Tensor, nn

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMScheduler
from diffusers_gas.distillation.gauss_newton import Problem, best_initial_solver, distill_gauss_newton
from diffusers_gas.pipelines.driving import differentiable_rollout, drive, sample_latents
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache


NEEDS_PEFT = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="loading a LoRA needs the package peft"
)
NAMES = [pytest.param(name, marks=NEEDS_PEFT) if "lora" in name else name for name in MATRIX]
STRENGTH = 0.5  # of image-to-image: the fraction of the steps that are done
FROM_STRENGTH = tuple(name for name in MATRIX if "img2img" in name)
FROM_IMAGES = (*FROM_STRENGTH, "stable-diffusion-inpaint")
SEPARATE_GUIDANCE = ("wan", "qwen-image")  # call the network twice a step

pipeline = functools.cache(build)


def run(tiny: TinyPipeline, scheduler: SchedulerMixin, **inputs: Any) -> list[Step]:
    """What passes between pipeline and scheduler in a call that decodes nothing, where the pipeline knows how to."""
    latent = {"output_type": "latent"} if tiny.has_latent_output else {}
    return record_steps(tiny, scheduler, **latent, **inputs)


every_family = pytest.mark.parametrize("name", NAMES)
both_schedulers = pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """A list that grows by one entry a call of the network."""
    calls: list[int] = []
    hook = network.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()


@both_schedulers
@every_family
def test_evaluations_are_as_many_as_asked_for_and_repeat(name, scheduler_class):
    tiny = pipeline(name)
    scheduler = scheduler_class.from_config(tiny.pipe.scheduler.config)
    for num_inference_steps in (6, 4):
        with counted(tiny.denoiser) as calls:
            steps = run(tiny, scheduler, num_inference_steps=num_inference_steps)
        expected = int(num_inference_steps * STRENGTH) if name in FROM_STRENGTH else num_inference_steps
        assert len(steps) == expected
        assert len(calls) == expected * (2 if name in SEPARATE_GUIDANCE else 1)
        assert all(step.prev_sample.isfinite().all() for step in steps)
        assert all(step.model_output.std() > 0.01 for step in steps)  # the random networks say something
    again = run(tiny, scheduler, num_inference_steps=4)
    assert torch.equal(steps[-1].prev_sample, again[-1].prev_sample)


# First order is DDIM or Euler


@both_schedulers
@every_family
def test_first_order_is_diffusers_first_order(name, scheduler_class):
    tiny = pipeline(name)
    theirs = reference(tiny, 4, to_data=scheduler_class is SDMScheduler)
    expected = run(tiny, theirs, num_inference_steps=4)
    ours = first_order(scheduler_class, tiny, theirs.timesteps)
    steps = run(tiny, ours, num_inference_steps=4)
    # GAS sees EDM networks as variance preserving: its states are alpha times EDM's, and it ends a little before data.
    edm = tiny.pipe.scheduler.config.get("sigma_data") is not None and scheduler_class is GASScheduler
    for k, (step, other) in enumerate(zip(steps, expected, strict=True)):
        assert step.timestep.item() == pytest.approx(other.timestep.item(), abs=1e-3)
        alpha = ours._steps.alphas[k] if edm else 1.0
        limit = 1e-3 * other.sample.abs().max().item()
        torch.testing.assert_close(step.sample / alpha, other.sample, rtol=0, atol=limit)
    if not edm:
        limit = 1e-3 * expected[-1].prev_sample.abs().max().item()
        torch.testing.assert_close(steps[-1].prev_sample, expected[-1].prev_sample, rtol=0, atol=limit)


# Callbacks


@both_schedulers
@every_family
def test_callbacks_see_every_step_and_may_change_it(name, scheduler_class):
    tiny = pipeline(name)
    parameters = inspect.signature(type(tiny.pipe).__call__).parameters
    seen = []

    def on_step_end(pipe: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
        seen.append((step, timestep.item()))
        return {"latents": 0.5 * tensors["latents"]}

    def after_step(step: int, timestep: Tensor, latents: Tensor) -> None:
        seen.append((step, timestep.item()))
        latents.mul_(0.5)

    if "callback_on_step_end" in parameters:
        callback = {"callback_on_step_end": on_step_end}
    elif "callback" in parameters:
        callback = {"callback": after_step}
    else:
        pytest.skip(f"{type(tiny.pipe).__name__} has no callbacks")
    scheduler = scheduler_class.from_config(tiny.pipe.scheduler.config)
    steps = run(tiny, scheduler, num_inference_steps=6, **callback)
    assert seen == [(k, step.timestep.item()) for k, step in enumerate(steps)]
    for step, following in itertools.pairwise(steps):
        if name != "stable-diffusion-inpaint":  # which puts the known part in afterwards
            assert torch.equal(following.sample, 0.5 * step.prev_sample)


# Distillation


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FROM_IMAGES])
def test_a_gauss_newton_iteration_gets_closer_to_the_teacher(name, tmp_path):
    tiny = pipeline(name)
    scheduler = GASScheduler.from_config(tiny.pipe.scheduler.config)
    inputs = SampleInputs.create(0, 1, **tiny.inputs(1))
    samples = TeacherCache(tmp_path, name, scheduler, 4).collect(tiny.pipe, inputs, 1, "")
    problem = Problem(tiny.pipe)
    start = best_initial_solver(problem, 2, samples)
    result = distill_gauss_newton(problem, start, samples, samples, max_iterations=1)
    assert result.distance < result.initial_distance
    # What was fitted is what the scheduler samples.
    scheduler.add_solver(result.solver)
    _, final = sample_latents(tiny.pipe, scheduler, 2, **inputs.pipeline_arguments(tiny.pipe))
    distance = (final[:1] - samples.final).square().mean().item()
    assert distance == pytest.approx(result.distance, rel=1e-2)


@every_family
def test_gradients_of_all_parameters(name):
    tiny = pipeline(name)
    solver = GeneralizedSolver(4)
    differentiable_rollout(tiny.pipe, solver, **tiny.inputs(1), generator=generators(1)).square().mean().backward()
    for parameter in solver.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0


@pytest.mark.parametrize("name", FROM_IMAGES)
def test_pipelines_that_start_from_an_image_are_refused_where_states_must_be_the_solvers(name):
    def algorithm(noise_schedule: Any, prediction_type: str) -> Any:
        evaluation = yield None, 0.9
        yield evaluation.sample, 0.5

    tiny = pipeline(name)
    with pytest.raises(ValueError, match="text-to-image pipeline"):
        drive(tiny.pipe, algorithm, **tiny.inputs(1), generator=generators(1))


@pytest.mark.parametrize("control", [{"control_guidance_end": 0.5}, {"control_guidance_start": 0.5}])
def test_control_of_some_steps_only_is_that_of_sampling_when_differentiated(control):
    tiny = pipeline("stable-diffusion-controlnet")
    solver = GeneralizedSolver(4)
    scheduler = GASScheduler.from_config(tiny.pipe.scheduler.config)
    scheduler.add_solver(solver)
    inputs = {**tiny.inputs(1), **control}
    _, expected = sample_latents(tiny.pipe, scheduler, 4, **inputs, generator=generators(1))
    rollout = differentiable_rollout(tiny.pipe, solver, **inputs, generator=generators(1)).detach()
    limit = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(rollout, expected, rtol=0, atol=limit)
    _, always = sample_latents(tiny.pipe, scheduler, 4, **tiny.inputs(1), generator=generators(1))
    assert not torch.allclose(rollout, always, rtol=0.1)


# Pipelines in parts, and automatic ones


@pytest.mark.parametrize("split", [0.25, 0.5])
@both_schedulers
def test_base_and_refiner_share_the_steps(scheduler_class, split):
    """Stable Diffusion XL with `denoising_end`, then image-to-image with `denoising_start`, both with the same network."""
    tiny = pipeline("stable-diffusion-xl")
    refiner = StableDiffusionXLImg2ImgPipeline(**tiny.pipe.components, add_watermarker=False)
    inputs = {**tiny.inputs(2), "num_inference_steps": 8, "output_type": "latent"}
    timesteps = reference(tiny, 8, to_data=False)
    timesteps.set_timesteps(8)
    scheduler = first_order(scheduler_class, tiny, timesteps.timesteps)
    with plugged(tiny.pipe, scheduler), plugged(refiner, scheduler), counted(tiny.denoiser) as calls:
        expected = tiny.pipe(**inputs, generator=generators(2)).images
        half = tiny.pipe(**inputs, generator=generators(2), denoising_end=split).images
        assert len(calls) == 8 + 8 * split
        final = refiner(**inputs, image=half, denoising_start=split).images
    assert len(calls) == 16
    limit = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(final, expected, rtol=0, atol=limit)


def test_a_part_of_the_steps_is_not_distilled():
    tiny = pipeline("stable-diffusion-xl")
    with pytest.raises(ValueError, match="denoising_end"):
        sample_latents(
            tiny.pipe, GASScheduler.from_config(tiny.pipe.scheduler.config), 8, **tiny.inputs(1), denoising_end=0.5
        )


@both_schedulers
def test_automatic_pipelines_keep_the_scheduler(scheduler_class, tmp_path):
    tiny = build("stable-diffusion")
    scheduler = scheduler_class.from_config(tiny.pipe.scheduler.config)
    if scheduler_class is GASScheduler:
        scheduler.add_solver(GeneralizedSolver(6))
    else:
        scheduler.add_plan(scheduler.plan_for(6))
    tiny.pipe.scheduler = scheduler
    inputs = {**tiny.inputs(1), "num_inference_steps": 6, "output_type": "latent"}
    tiny.pipe.set_progress_bar_config(disable=True)
    expected = tiny.pipe(**inputs, generator=generators(1)).images

    image_to_image = AutoPipelineForImage2Image.from_pipe(tiny.pipe)
    assert isinstance(image_to_image, StableDiffusionImg2ImgPipeline) and image_to_image.scheduler is scheduler
    same = AutoPipelineForText2Image.from_pipe(image_to_image)
    assert torch.equal(same(**inputs, generator=generators(1)).images, expected)

    tiny.pipe.save_pretrained(tmp_path)
    absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    loaded = AutoPipelineForText2Image.from_pretrained(tmp_path, **dict.fromkeys(absent))
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded, StableDiffusionPipeline) and type(loaded.scheduler) is scheduler_class
    assert torch.equal(loaded(**inputs, generator=generators(1)).images, expected)
    if scheduler_class is GASScheduler:
        with pytest.raises(ValueError, match=r"8.*\[6\]"):
            loaded(**{**inputs, "num_inference_steps": 8})


# What does not work, and says so


@both_schedulers
@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"_class_name": "LTXEulerAncestralRFScheduler", "num_train_timesteps": 1000, "eta": 1.0},
            "LTXEulerAncestral",
        ),
        ({"_class_name": "UnCLIPScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon"}, "UnCLIP"),
        ({"_class_name": "ScoreSdeVeScheduler", "sigma_min": 0.01, "sigma_max": 1348.0}, "ScoreSdeVe"),
        ({"_class_name": "IPNDMScheduler", "num_train_timesteps": 1000, "trained_betas": None}, "IPNDM"),
        ({"_class_name": "CMStochasticIterativeScheduler", "sigma_data": 0.5, "clip_denoised": True}, "consistency"),
        ({"_class_name": "SCMScheduler", "sigma_data": 0.5, "prediction_type": "trigflow"}, "SCMScheduler cannot be"),
    ],
    ids=lambda value: value["_class_name"] if isinstance(value, dict) else "",
)
def test_networks_of_another_kind_are_refused(scheduler_class, config, message):
    with pytest.raises(ValueError, match=message):
        scheduler_class.from_config(config)


COSINE = {
    "sigma_min": 0.3,
    "sigma_max": 500.0,
    "sigma_data": 1.0,
    "prediction_type": "v_prediction",
    "solver_order": 2,
}


@pytest.mark.parametrize(
    "name", [{}, {"_class_name": "CosineDPMSolverMultistepScheduler"}], ids=["constructed", "loaded"]
)
@both_schedulers
def test_stable_audio_is_told_an_angle(scheduler_class, name):
    """Its scheduler's times (`precondition_noise`), not those of other networks with EDM preconditioning."""
    scheduler = scheduler_class.from_config(COSINE | name)
    scheduler.set_timesteps(10)
    expected = 2 / math.pi * scheduler.sigmas[:-1].atan()
    torch.testing.assert_close(scheduler.timesteps, expected, rtol=1e-5, atol=1e-6)
    assert init_config(scheduler_class.from_config(scheduler.config)) == init_config(scheduler)


@pytest.mark.parametrize("other_class", [GASScheduler, SDMScheduler])
@both_schedulers
def test_other_edm_networks_are_not_taken_for_stable_audio(scheduler_class, other_class):
    theirs = EDMDPMSolverMultistepScheduler(sigma_data=0.5)
    for config in (theirs.config, {**theirs.config, "_class_name": type(theirs).__name__}):
        scheduler = other_class.from_config(scheduler_class.from_config(config).config)
        assert scheduler.config.edm_timestep == "log"


def init_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    names = inspect.signature(type(scheduler).__init__).parameters.keys() - {"self"}
    return {name: scheduler.config[name] for name in names}
