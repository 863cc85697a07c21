"""Real Diffusers pipelines around tiny random networks, and helpers to call and to check them."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import tiny_transformers
import tiny_unets
import tiny_video_and_audio
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from tiny_components import TinyPipeline
from torch import Tensor, nn

from diffusers_gas.schedulers.scheduling_utils import ODEScheduler


class Step(NamedTuple):
    """One call of a scheduler's `step`."""

    timestep: Tensor
    sample: Tensor
    model_output: Tensor
    prev_sample: Tensor


def generators(batch_size: int, first_seed: int = 0) -> list[torch.Generator]:
    """One generator per sample, so that the noise of a sample does not depend on its batch."""
    return [torch.Generator().manual_seed(first_seed + i) for i in range(batch_size)]


def random_states(tiny: TinyPipeline, batch_size: int, first_seed: int = 0) -> Tensor:
    """The first states of a pipeline that is called with `generators(batch_size, first_seed)`."""
    return tiny.to_state(
        torch.stack(
            [torch.randn(tiny.noise_shape, generator=generator) for generator in generators(batch_size, first_seed)]
        )
    )


@contextmanager
def plugged(pipe: DiffusionPipeline, scheduler: SchedulerMixin) -> Iterator[None]:
    """The pipeline with another scheduler and without a progress bar."""
    own_scheduler = pipe.scheduler
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.scheduler = own_scheduler
        pipe.set_progress_bar_config()


def at_times(scheduler: SchedulerMixin, **times: Any) -> SchedulerMixin:
    """The scheduler with fixed times (`sigmas` or `timesteps`), which replace those that a pipeline asks for."""
    own_set_timesteps = scheduler.set_timesteps

    @functools.wraps(own_set_timesteps)  # pipelines inspect the signature
    def set_timesteps(num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        own_set_timesteps(device=device, **({} if mu is None else {"mu": mu}), **times)

    scheduler.set_timesteps = set_timesteps
    return scheduler


def record_steps(tiny: TinyPipeline, scheduler: SchedulerMixin, batch_size: int = 2, **inputs: Any) -> list[Step]:
    """Records all calls of `step` in a complete call of the pipeline."""
    steps = []
    own_step = scheduler.step
    known = inspect.signature(own_step).parameters

    @functools.wraps(own_step)  # pipelines inspect the signature
    def step(model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any):
        if not isinstance(scheduler, ODEScheduler):  # some pipelines (DDPM, DDIM, Marigold) do not inspect it
            kwargs = {name: value for name, value in kwargs.items() if name in known}
        before = sample.clone()  # callbacks may change states in place
        output = own_step(model_output, timestep, sample, **kwargs)
        steps.append(Step(timestep, before, model_output, output[0].clone()))
        return output

    scheduler.step = step
    with plugged(tiny.pipe, scheduler):
        tiny.pipe(**{**tiny.inputs(batch_size), "generator": generators(batch_size), **inputs})
    del scheduler.step
    return steps


def final_state(tiny: TinyPipeline, scheduler: SchedulerMixin, batch_size: int = 2, **inputs: Any) -> Tensor:
    """The last state of a complete call of the pipeline. It has one row per sample, also with guidance."""
    return record_steps(tiny, scheduler, batch_size, **inputs)[-1].prev_sample[:batch_size]


def build(name: str, dtype: torch.dtype = torch.float32) -> TinyPipeline:
    """A new pipeline of a family, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = MATRIX[name]()
    for component in tiny.pipe.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component.eval(), dtype)  # the model's own `to` warns about layers kept in float32
    tiny.pipe.set_progress_bar_config()
    return tiny


# These families cover all ways in which pipelines use a scheduler. The tests of most modules run on them.
FAMILIES: dict[str, Callable[[], TinyPipeline]] = {
    "stable-diffusion": tiny_unets.stable_diffusion,
    "stable-diffusion-xl": tiny_unets.stable_diffusion_xl,
    "stable-diffusion-3": tiny_transformers.stable_diffusion_3,
    "flux": tiny_transformers.flux,
    "wan": tiny_video_and_audio.wan,
    "dit": tiny_transformers.dit,
    "pixart": tiny_transformers.pixart,
    "ddpm": tiny_unets.ddpm,
    "ddpm-learned-variance": functools.partial(tiny_unets.ddpm, out_channels=6, variance_type="learned_range"),
    "ldm": tiny_unets.ldm,
    "stable-diffusion-img2img": tiny_unets.stable_diffusion_img2img,
    "stable-diffusion-3-img2img": tiny_transformers.stable_diffusion_3_img2img,
    "stable-diffusion-inpaint": tiny_unets.stable_diffusion_inpaint,
}
# The other families of PIPELINES.md. `test_pipeline_matrix.py` runs on all families.
FURTHER_FAMILIES: dict[str, Callable[[], TinyPipeline]] = {
    "stable-diffusion-controlnet": tiny_unets.stable_diffusion_controlnet,
    "stable-diffusion-lora": tiny_unets.stable_diffusion_lora,
    "stable-diffusion-ip-adapter": tiny_unets.stable_diffusion_ip_adapter,
    "stable-diffusion-xl-img2img": tiny_unets.stable_diffusion_xl_img2img,
    "ddim": tiny_unets.ddim,
    "marigold": tiny_unets.marigold,
    "flux-img2img": tiny_transformers.flux_img2img,
    "pixart-sigma": tiny_transformers.pixart_sigma,
    "sana": tiny_transformers.sana,
    "qwen-image": tiny_transformers.qwen_image,
    "z-image": tiny_transformers.z_image,
    "ltx-video": tiny_video_and_audio.ltx_video,
    "mochi": tiny_video_and_audio.mochi,
    "cogvideox": tiny_video_and_audio.cogvideox,
    "animatediff": tiny_video_and_audio.animatediff,
    "stable-audio": tiny_video_and_audio.stable_audio,
}
MATRIX = FAMILIES | FURTHER_FAMILIES
FROM_IMAGES = ("stable-diffusion-img2img", "stable-diffusion-3-img2img", "stable-diffusion-inpaint")
FROM_NOISE = tuple(name for name in FAMILIES if name not in FROM_IMAGES)
