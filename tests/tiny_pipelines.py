"""Real Diffusers pipelines around tiny random networks, with what is needed to call them and to check them by hand."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn


SIZE = 8  # of images and, as the autoencoders do not downsample, of latents
MAX_BATCH_SIZE = 4
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class TinyPipeline(NamedTuple):
    """A pipeline, its call arguments, and what its code does to the network's input and output.

    Attributes:
        pipe: The pipeline, in evaluation mode.
        inputs: Call arguments for a batch size, without `generator`; those of a smaller batch are a prefix.
        noise_shape: Shape of the noise that the pipeline draws for one sample.
        guidance_scale: Of classifier-free guidance; `None` without.
        conditional_first: Whether the conditional output precedes the unconditional one.
        flow_shift: Shift of the noise levels of a flow-matching pipeline; `None` for a variance-preserving one.
        timestep_scale: What the pipeline multiplies the scheduler's times by.
        to_state: From drawn noise to the first state that the scheduler sees.
        has_latent_output: Whether the pipeline knows `output_type="latent"`.
    """

    pipe: DiffusionPipeline
    inputs: Callable[[int], dict[str, Any]]
    noise_shape: tuple[int, ...]
    guidance_scale: float | None = None
    conditional_first: bool = False
    flow_shift: float | None = None
    timestep_scale: float = 1.0
    to_state: Callable[[Tensor], Tensor] = lambda noise: noise
    has_latent_output: bool = True

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet if hasattr(self.pipe, "unet") else self.pipe.transformer

    @property
    def decoder(self) -> nn.Module | None:
        return getattr(self.pipe, "vae", None) or getattr(self.pipe, "vqvae", None)

    def network_time(self, t: float) -> float:
        """What Diffusers calls `timestep` at a time t in [0, 1], written down once more."""
        if self.flow_shift is None:
            return 1000 * t - 1
        return 1000 * self.flow_shift * t / (1 + (self.flow_shift - 1) * t)


class Step(NamedTuple):
    """One call of a scheduler's `step`."""

    timestep: Tensor
    sample: Tensor
    model_output: Tensor
    prev_sample: Tensor


def generators(batch_size: int, first_seed: int = 0) -> list[torch.Generator]:
    """One generator a sample, so that a sample's noise does not depend on its batch."""
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


def record_steps(tiny: TinyPipeline, scheduler: SchedulerMixin, batch_size: int = 2, **inputs: Any) -> list[Step]:
    """What passes between pipeline and scheduler in a plain call of the pipeline, which runs to its end."""
    steps = []
    own_step = scheduler.step
    known = inspect.signature(own_step).parameters

    @functools.wraps(own_step)  # pipelines look at the signature, except DDPM's, which passes `generator` to all
    def step(model_output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any):
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
    """The last state of a plain call of the pipeline, for the batch's samples once each."""
    return record_steps(tiny, scheduler, batch_size, **inputs)[-1].prev_sample[:batch_size]


def build(name: str, dtype: torch.dtype = torch.float32) -> TinyPipeline:
    """A new pipeline of a family; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny = FAMILIES[name]()
    for component in tiny.pipe.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component.eval(), dtype)  # the model's own `to` warns of layers kept in float32
    tiny.pipe.set_progress_bar_config()
    return tiny


def _random(pipe: DiffusionPipeline, seed: int, batch_size: int, *shape: int) -> Tensor:
    """The first rows of a fixed random tensor, in the pipeline's dtype."""
    rows = torch.randn(MAX_BATCH_SIZE, *shape, generator=torch.Generator().manual_seed(seed))
    return rows[:batch_size].to(pipe.dtype)


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        shift_factor=0.1,
    )


def _unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        **config,
    )


def _unconditional_unet(channels: int, out_channels: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=channels,
        out_channels=out_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )


def _prompts(pipe: DiffusionPipeline, batch_size: int, pooled: bool = False) -> dict[str, Tensor]:
    """Embeddings of prompts and negative prompts, strong enough to matter."""
    prompts = {
        "prompt_embeds": 3 * _random(pipe, 1, batch_size, 5, 16),
        "negative_prompt_embeds": 3 * _random(pipe, 2, batch_size, 5, 16),
    }
    if pooled:
        prompts["pooled_prompt_embeds"] = 3 * _random(pipe, 3, batch_size, 16)
        prompts["negative_pooled_prompt_embeds"] = 3 * _random(pipe, 4, batch_size, 16)
    return prompts


def _stable_diffusion(pipeline_class: type[DiffusionPipeline] = StableDiffusionPipeline) -> DiffusionPipeline:
    return pipeline_class(
        unet=_unet(),
        vae=_autoencoder(),
        scheduler=PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion() -> TinyPipeline:
    pipe = _stable_diffusion()

    def inputs(batch_size: int) -> dict[str, Any]:
        return {**_prompts(pipe, batch_size), "guidance_scale": 7.5}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=7.5)


def stable_diffusion_img2img() -> TinyPipeline:
    pipe = _stable_diffusion(StableDiffusionImg2ImgPipeline)

    def inputs(batch_size: int) -> dict[str, Any]:
        image = _random(pipe, 5, batch_size, 3, SIZE, SIZE).sigmoid()
        return {**_prompts(pipe, batch_size), "guidance_scale": 7.5, "image": image, "strength": 0.5}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=7.5)


def stable_diffusion_inpaint() -> TinyPipeline:
    pipe = _stable_diffusion(StableDiffusionInpaintPipeline)

    def inputs(batch_size: int) -> dict[str, Any]:
        mask = torch.zeros(batch_size, 1, SIZE, SIZE)
        mask[..., SIZE // 2 :] = 1
        return {
            **_prompts(pipe, batch_size),
            "guidance_scale": 7.5,
            "image": _random(pipe, 5, batch_size, 3, SIZE, SIZE).sigmoid(),
            "mask_image": mask,
            "height": SIZE,
            "width": SIZE,
        }

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=7.5)


def stable_diffusion_xl() -> TinyPipeline:
    pipe = StableDiffusionXLPipeline(
        unet=_unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            transformer_layers_per_block=1,
            use_linear_projection=True,
        ),
        vae=_autoencoder(),
        scheduler=EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        return {**_prompts(pipe, batch_size, pooled=True), "guidance_scale": 5.0}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=5.0)


def _stable_diffusion_3(pipeline_class: type[DiffusionPipeline] = StableDiffusion3Pipeline) -> DiffusionPipeline:
    return pipeline_class(
        transformer=SD3Transformer2DModel(
            sample_size=SIZE,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=SIZE,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(),
        text_encoder=None,
        text_encoder_2=None,
        text_encoder_3=None,
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
    )


def stable_diffusion_3() -> TinyPipeline:
    pipe = _stable_diffusion_3()

    def inputs(batch_size: int) -> dict[str, Any]:
        return {**_prompts(pipe, batch_size, pooled=True), "guidance_scale": 4.5}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=4.5, flow_shift=3.0)


def stable_diffusion_3_img2img() -> TinyPipeline:
    pipe = _stable_diffusion_3(StableDiffusion3Img2ImgPipeline)

    def inputs(batch_size: int) -> dict[str, Any]:
        image = _random(pipe, 5, batch_size, 3, SIZE, SIZE).sigmoid()
        prompts = _prompts(pipe, batch_size, pooled=True)
        return {**prompts, "guidance_scale": 4.5, "image": image, "strength": 0.5, "height": SIZE, "width": SIZE}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=4.5, flow_shift=3.0)


def flux() -> TinyPipeline:
    pipe = FluxPipeline(
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        # The shift at another than Flux's own resolution range, so that it differs from every default.
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.9, max_shift=1.4),
        vae=_autoencoder(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        return {
            "prompt_embeds": 3 * _random(pipe, 1, batch_size, 5, 16),
            "pooled_prompt_embeds": 3 * _random(pipe, 3, batch_size, 16),
            "guidance_scale": 3.5,
            "height": SIZE,
            "width": SIZE,
        }

    def to_state(noise: Tensor) -> Tensor:
        return pipe._pack_latents(noise, *noise.shape)

    shift = math.exp(calculate_shift((SIZE // 2) ** 2, base_shift=0.9, max_shift=1.4))
    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), flow_shift=shift, timestep_scale=1e-3, to_state=to_state)


def wan() -> TinyPipeline:
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipe = WanPipeline(
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        prompts = _prompts(pipe, batch_size)
        return {**prompts, "guidance_scale": 5.0, "height": 32, "width": 32, "num_frames": 5}

    return TinyPipeline(pipe, inputs, (16, 2, 4, 4), guidance_scale=5.0, conditional_first=True, flow_shift=3.0)


def dit() -> TinyPipeline:
    pipe = DiTPipeline(
        transformer=DiTTransformer2DModel(
            sample_size=SIZE,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ),
        vae=_autoencoder(),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    nn.init.normal_(pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight)

    def inputs(batch_size: int) -> dict[str, Any]:
        return {"class_labels": [207, 88, 974, 33][:batch_size], "guidance_scale": 4.0}

    return TinyPipeline(
        pipe,
        inputs,
        (4, SIZE, SIZE),
        guidance_scale=4.0,
        conditional_first=True,
        to_state=lambda noise: torch.cat([noise, noise]),
        has_latent_output=False,
    )


def pixart() -> TinyPipeline:
    pipe = PixArtAlphaPipeline(
        transformer=PixArtTransformer2DModel(
            sample_size=SIZE,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=16,
            caption_channels=16,
        ),
        vae=_autoencoder(),
        scheduler=DPMSolverMultistepScheduler(),
        text_encoder=None,
        tokenizer=None,
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        mask = torch.ones(batch_size, 5)
        return {
            **_prompts(pipe, batch_size),
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "negative_prompt": None,
            "guidance_scale": 4.5,
            "use_resolution_binning": False,
        }

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=4.5)


def ddpm(out_channels: int = 3, **scheduler_config: Any) -> TinyPipeline:
    pipe = DDPMPipeline(_unconditional_unet(3, out_channels), DDPMScheduler(clip_sample=False, **scheduler_config))
    return TinyPipeline(pipe, lambda batch_size: {"batch_size": batch_size}, (3, SIZE, SIZE), has_latent_output=False)


def ldm() -> TinyPipeline:
    vqvae = VQModel(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, num_vq_embeddings=8)
    pipe = LDMPipeline(
        vqvae=vqvae,
        unet=_unconditional_unet(4, 4),
        scheduler=DDIMScheduler(beta_start=0.0015, beta_end=0.0195, clip_sample=False, prediction_type="v_prediction"),
    )
    return TinyPipeline(pipe, lambda batch_size: {"batch_size": batch_size}, (4, SIZE, SIZE), has_latent_output=False)


FAMILIES: dict[str, Callable[[], TinyPipeline]] = {
    "stable-diffusion": stable_diffusion,
    "stable-diffusion-xl": stable_diffusion_xl,
    "stable-diffusion-3": stable_diffusion_3,
    "flux": flux,
    "wan": wan,
    "dit": dit,
    "pixart": pixart,
    "ddpm": ddpm,
    "ddpm-learned-variance": functools.partial(ddpm, out_channels=6, variance_type="learned_range"),
    "ldm": ldm,
    "stable-diffusion-img2img": stable_diffusion_img2img,
    "stable-diffusion-3-img2img": stable_diffusion_3_img2img,
    "stable-diffusion-inpaint": stable_diffusion_inpaint,
}
FROM_IMAGES = ("stable-diffusion-img2img", "stable-diffusion-3-img2img", "stable-diffusion-inpaint")
FROM_NOISE = tuple(name for name in FAMILIES if name not in FROM_IMAGES)
