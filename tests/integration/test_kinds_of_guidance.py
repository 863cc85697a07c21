"""Guidance of every kind happens before the scheduler: sampling of first order with it is DDIM's and Euler's."""

import functools
from collections.abc import Callable

import pytest
import torch
from diffusers import SchedulerMixin, StableDiffusionPAGPipeline
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines import ModularPipeline, StableDiffusionXLAutoBlocks
from first_order import first_order, reference
from tiny_pipelines import TinyPipeline, build, generators, record_steps
from torch import Tensor

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMScheduler
from diffusers_gas.pipelines.driving import differentiable_rollout, sample_latents


pipeline = functools.cache(build)
both_schedulers = pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])


def perturbed_attention() -> TinyPipeline:
    tiny = pipeline("stable-diffusion")
    pipe = StableDiffusionPAGPipeline(**tiny.pipe.components, requires_safety_checker=False, pag_applied_layers="mid")
    return tiny._replace(pipe=pipe)


def flux_with_negative_prompts() -> TinyPipeline:
    tiny = pipeline("flux")

    def inputs(batch_size: int) -> dict:
        own = tiny.inputs(batch_size)
        negative = {f"negative_{name}": -own[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
        return {**own, **negative}

    return tiny._replace(inputs=inputs)


GUIDANCE = {
    "rescaled": (lambda: pipeline("stable-diffusion"), {"guidance_rescale": 0.7}),
    "rescaled-flow": (lambda: pipeline("ltx-video"), {"guidance_rescale": 0.7}),
    "perturbed-attention": (perturbed_attention, {"pag_scale": 8.0}),
    "true-classifier-free": (flux_with_negative_prompts, {"true_cfg_scale": 4.0}),
    "distilled": (lambda: pipeline("flux"), {"guidance_scale": 7.0}),
    "of-some-steps": (lambda: pipeline("z-image"), {"cfg_truncation": 0.5}),
    "changing": (lambda: pipeline("cogvideox"), {"use_dynamic_cfg": True}),
}


@pytest.mark.parametrize("make, settings", GUIDANCE.values(), ids=GUIDANCE)
@both_schedulers
def test_pipelines_own_guidance(scheduler_class, make, settings):
    tiny = make()
    theirs = reference(tiny, 4, to_data=scheduler_class is SDMScheduler)
    expected = record_steps(tiny, theirs, num_inference_steps=4, **settings)
    ours = first_order(scheduler_class, tiny, theirs.timesteps)
    final = record_steps(tiny, ours, num_inference_steps=4, **settings)[-1].prev_sample
    limit = 1e-3 * expected[-1].prev_sample.abs().max().item()
    torch.testing.assert_close(final, expected[-1].prev_sample, rtol=0, atol=limit)
    without = record_steps(tiny, ours, num_inference_steps=4)[-1].prev_sample
    assert (final - without).abs().max() > 10 * limit


LAYERS = "mid_block.attentions.0.transformer_blocks"
GUIDERS: dict[str, Callable[[], BaseGuidance]] = {
    "classifier-free": lambda: ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=0.5),
    "of-some-steps": lambda: ClassifierFreeGuidance(guidance_scale=5.0, start=0.25, stop=0.75),
    "adaptive-projected": lambda: AdaptiveProjectedGuidance(
        guidance_scale=5.0, adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_rescale=2.5, eta=0.5
    ),
    "zero-star": lambda: ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=1),
    "tangential": lambda: TangentialClassifierFreeGuidance(guidance_scale=5.0),
    "perturbed-attention": lambda: PerturbedAttentionGuidance(
        guidance_scale=5.0,
        perturbed_guidance_scale=8.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config=LayerSkipConfig(
            indices=[0], fqn=LAYERS, skip_attention=False, skip_attention_scores=True, skip_ff=False
        ),
    ),
}


@functools.cache
def modular_pipeline() -> ModularPipeline:
    """Stable Diffusion XL's blocks from embeddings to latents."""
    blocks = StableDiffusionXLAutoBlocks()
    for name in list(blocks.sub_blocks):
        if name != "denoise":
            blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    components = pipeline("stable-diffusion-xl").pipe.components
    pipe.update_components(unet=components["unet"], vae=components["vae"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(guider: BaseGuidance, scheduler: SchedulerMixin) -> Tensor:
    pipe = modular_pipeline()
    pipe.update_components(guider=guider, scheduler=scheduler)
    inputs = pipeline("stable-diffusion-xl").inputs(2)
    del inputs["guidance_scale"]
    return pipe(**inputs, height=8, width=8, num_inference_steps=4, generator=generators(2), output="latents")


@pytest.mark.parametrize("guider", GUIDERS.values(), ids=GUIDERS)
@both_schedulers
def test_guider_objects(scheduler_class, guider):
    tiny = pipeline("stable-diffusion-xl")
    theirs = reference(tiny, 4, to_data=scheduler_class is SDMScheduler)
    expected = sample(guider(), theirs)
    ours = first_order(scheduler_class, tiny, theirs.timesteps)
    final = sample(guider(), ours)
    limit = 1e-3 * expected.abs().max().item()
    torch.testing.assert_close(final, expected, rtol=0, atol=limit)
    assert (final - sample(ClassifierFreeGuidance(guidance_scale=5.0), ours)).abs().max() > 10 * limit


@pytest.mark.parametrize("call", [sample_latents, differentiable_rollout])
def test_modular_pipelines_are_not_distilled(call):
    scheduler = GASScheduler.from_config(pipeline("stable-diffusion-xl").pipe.scheduler.config)
    modular_pipeline().update_components(scheduler=scheduler)
    arguments = (scheduler, 4) if call is sample_latents else (GeneralizedSolver(4),)
    with pytest.raises(ValueError, match="StableDiffusionXLModularPipeline"):
        call(modular_pipeline(), *arguments)
