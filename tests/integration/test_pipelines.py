"""`GASScheduler` plugged into Diffusers pipelines: what comes out, against Diffusers' own schedulers on the same times."""

import functools
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from tiny_pipelines import (
    FAMILIES,
    FROM_NOISE,
    Step,
    TinyPipeline,
    build,
    final_state,
    random_states,
    record_steps,
)
from torch import Tensor

from diffusers_gas import GASScheduler


# Families by their forward process, and those whose pipelines have callbacks.
FLOW = ("stable-diffusion-3", "flux", "wan", "stable-diffusion-3-img2img")
VARIANCE_PRESERVING = tuple(name for name in FAMILIES if name not in FLOW)
WITH_CALLBACK = (
    "stable-diffusion",
    "stable-diffusion-xl",
    "stable-diffusion-img2img",
    "stable-diffusion-inpaint",
    *FLOW,
)

pipeline = functools.cache(build)


def gas_scheduler(tiny: TinyPipeline, timesteps: list[float] | None = None, **config: Any) -> GASScheduler:
    """An untrained scheduler for the pipeline, if need be with times that the pipeline does not know how to pass."""
    scheduler = GASScheduler.from_config(tiny.pipe.scheduler.config, **config)
    if timesteps is not None:
        scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, timesteps=timesteps)
    return scheduler


def trailing_timesteps(num_inference_steps: int) -> list[int]:
    """Times of Diffusers' `"trailing"` spacing, from the last to (nearly) the first that networks are trained on."""
    return [1000 - k * 1000 // num_inference_steps - 1 for k in range(num_inference_steps)]


def variance_preserving_reference(tiny: TinyPipeline, order: int) -> SchedulerMixin:
    """Diffusers' scheduler of an order, from the last trained time to the first."""
    config = tiny.pipe.scheduler.config
    if order == 1 and config.get("variance_type") != "learned_range":  # which DDIM does not know
        return DDIMScheduler.from_config(
            config, timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False
        )
    return DPMSolverMultistepScheduler.from_config(
        config, timestep_spacing="trailing", solver_order=order, final_sigmas_type="sigma_min"
    )


def assert_same_steps(actual: list[Step], expected: list[Step]) -> None:
    assert len(actual) == len(expected)
    for step, reference in zip(actual, expected):
        assert step.timestep.item() == pytest.approx(reference.timestep.item(), abs=1e-3)
        scale = reference.prev_sample.abs().max().item()
        torch.testing.assert_close(step.sample, reference.sample, rtol=0, atol=1e-4 * scale)
        torch.testing.assert_close(step.prev_sample, reference.prev_sample, rtol=0, atol=1e-4 * scale)


def assert_variance_preserving_solution(name: str, order: int, num_inference_steps: int, **inputs: Any) -> None:
    """That GAS is DDIM (order 1) or DPM-Solver++ 2M (order 2) at every step."""
    tiny = pipeline(name)
    inputs["num_inference_steps"] = num_inference_steps
    expected = record_steps(tiny, variance_preserving_reference(tiny, order), **inputs)
    scheduler = gas_scheduler(tiny, trailing_timesteps(num_inference_steps), solver_order=order)
    assert_same_steps(record_steps(tiny, scheduler, **inputs), expected)


def assert_flow_solution(name: str, num_inference_steps: int, **inputs: Any) -> None:
    """That first-order GAS is Euler's method at every step."""
    tiny = pipeline(name)
    inputs["num_inference_steps"] = num_inference_steps
    dynamic = tiny.pipe.scheduler.config.use_dynamic_shifting
    euler = tiny.pipe.scheduler if dynamic else FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = record_steps(tiny, euler, **inputs)
    scheduler = gas_scheduler(tiny, euler.timesteps.tolist(), solver_order=1)
    assert_same_steps(record_steps(tiny, scheduler, **inputs), expected)


@pytest.mark.parametrize("name", FROM_NOISE)
def test_default_times_are_uniform(name):
    tiny = pipeline(name)
    scheduler = gas_scheduler(tiny)
    steps = record_steps(tiny, scheduler, num_inference_steps=5)
    times = torch.linspace(*((1 - 1e-4, 0) if name in FLOW else (1, 1e-3)), 6)[:-1]
    expected = [tiny.network_time(t) for t in times.tolist()]
    assert [step.timestep.item() for step in steps] == pytest.approx(expected, abs=1e-2)
    assert torch.equal(steps[0].sample, random_states(tiny, 2))


@pytest.mark.parametrize("num_inference_steps", [4, 8])
@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_untrained_is_dpm_solver(name, num_inference_steps):
    assert_variance_preserving_solution(name, 2, num_inference_steps)


@pytest.mark.parametrize("num_inference_steps", [4, 8])
@pytest.mark.parametrize("name", FLOW)
def test_first_order_is_euler(name, num_inference_steps):
    assert_flow_solution(name, num_inference_steps)


@pytest.mark.parametrize("strength", [0.25, 0.75, 1.0])
def test_image_to_image_starts_where_diffusers_starts(strength):
    for order in (1, 2):
        assert_variance_preserving_solution("stable-diffusion-img2img", order, 8, strength=strength)
        assert_variance_preserving_solution("stable-diffusion-inpaint", order, 8, strength=strength)
    assert_flow_solution("stable-diffusion-3-img2img", 8, strength=strength)


def scale_latents(pipe: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
    return {"latents": tensors["latents"] * 0.5} if step == 1 else {}


def scale_latents_in_place(pipe: DiffusionPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict:
    tensors["latents"].mul_(0.5)
    return {}


@pytest.mark.parametrize("callback", [scale_latents, scale_latents_in_place])
@pytest.mark.parametrize("name", WITH_CALLBACK)
def test_callbacks_that_change_latents_are_honoured(name, callback):
    if name in FLOW:
        assert_flow_solution(name, 4, callback_on_step_end=callback)
    else:
        assert_variance_preserving_solution(name, 2, 4, callback_on_step_end=callback)


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl", "pixart"])
def test_pipelines_pass_timesteps(name):
    tiny = pipeline(name)
    timesteps = trailing_timesteps(4)
    expected = final_state(tiny, gas_scheduler(tiny, timesteps), num_inference_steps=4)
    assert torch.equal(final_state(tiny, gas_scheduler(tiny), timesteps=timesteps), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_does_not_depend_on_its_batch(name):
    tiny = pipeline(name)
    alone = final_state(tiny, gas_scheduler(tiny), batch_size=1, num_inference_steps=4)
    together = final_state(tiny, gas_scheduler(tiny), batch_size=3, num_inference_steps=4)
    scale = alone.abs().max().item()
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5 * scale)
    assert not torch.allclose(together[1], together[0], rtol=0.1)


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-3", "flux", "dit"])
def test_half_precision_latents_stay_so(name):
    steps = record_steps(build(name, torch.bfloat16), gas_scheduler(pipeline(name)), num_inference_steps=4)
    assert {step.prev_sample.dtype for step in steps} == {torch.bfloat16}
    assert all(step.prev_sample.isfinite().all() for step in steps)
