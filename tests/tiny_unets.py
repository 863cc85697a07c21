"""Pipelines around UNets: Stable Diffusion and its relatives, and unconditional ones."""

from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    LDMPipeline,
    MarigoldDepthPipeline,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from tiny_components import SD_BETAS, SIZE, TinyPipeline, autoencoder, embeddings, random_rows
from torch import nn


def small_unet(**config: Any) -> UNet2DConditionModel:
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


def unconditional_unet(channels: int, out_channels: int) -> UNet2DModel:
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


def _stable_diffusion(
    pipeline_class: type[DiffusionPipeline] = StableDiffusionPipeline, **components: Any
) -> DiffusionPipeline:
    return pipeline_class(
        unet=components.pop("unet", None) or small_unet(),
        vae=autoencoder(),
        scheduler=PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **components,
    )


def stable_diffusion() -> TinyPipeline:
    pipe = _stable_diffusion()

    def inputs(batch_size: int) -> dict[str, Any]:
        return {**embeddings(pipe, batch_size), "guidance_scale": 7.5}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=7.5)


def stable_diffusion_img2img() -> TinyPipeline:
    pipe = _stable_diffusion(StableDiffusionImg2ImgPipeline)

    def inputs(batch_size: int) -> dict[str, Any]:
        image = random_rows(pipe, 5, batch_size, 3, SIZE, SIZE).sigmoid()
        return {**embeddings(pipe, batch_size), "guidance_scale": 7.5, "image": image, "strength": 0.5}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=7.5)


def stable_diffusion_inpaint() -> TinyPipeline:
    pipe = _stable_diffusion(StableDiffusionInpaintPipeline)

    def inputs(batch_size: int) -> dict[str, Any]:
        mask = torch.zeros(batch_size, 1, SIZE, SIZE)
        mask[..., SIZE // 2 :] = 1
        return {
            **embeddings(pipe, batch_size),
            "guidance_scale": 7.5,
            "image": random_rows(pipe, 5, batch_size, 3, SIZE, SIZE).sigmoid(),
            "mask_image": mask,
            "height": SIZE,
            "width": SIZE,
        }

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=7.5)


def _stable_diffusion_xl(pipeline_class: type[DiffusionPipeline] = StableDiffusionXLPipeline) -> DiffusionPipeline:
    return pipeline_class(
        unet=small_unet(
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
            transformer_layers_per_block=1,
            use_linear_projection=True,
        ),
        vae=autoencoder(),
        scheduler=EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        add_watermarker=False,
    )


def stable_diffusion_xl() -> TinyPipeline:
    pipe = _stable_diffusion_xl()

    def inputs(batch_size: int) -> dict[str, Any]:
        return {**embeddings(pipe, batch_size, pooled=True), "guidance_scale": 5.0}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=5.0)


def ddpm(out_channels: int = 3, **scheduler_config: Any) -> TinyPipeline:
    pipe = DDPMPipeline(unconditional_unet(3, out_channels), DDPMScheduler(clip_sample=False, **scheduler_config))
    return TinyPipeline(pipe, lambda batch_size: {"batch_size": batch_size}, (3, SIZE, SIZE), has_latent_output=False)


def ldm() -> TinyPipeline:
    vqvae = VQModel(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, num_vq_embeddings=8)
    pipe = LDMPipeline(
        vqvae=vqvae,
        unet=unconditional_unet(4, 4),
        scheduler=DDIMScheduler(beta_start=0.0015, beta_end=0.0195, clip_sample=False, prediction_type="v_prediction"),
    )
    return TinyPipeline(pipe, lambda batch_size: {"batch_size": batch_size}, (4, SIZE, SIZE), has_latent_output=False)


def ddim() -> TinyPipeline:
    pipe = DDIMPipeline(unconditional_unet(3, 3), DDIMScheduler(clip_sample=False))
    return TinyPipeline(pipe, lambda batch_size: {"batch_size": batch_size}, (3, SIZE, SIZE), has_latent_output=False)


def stable_diffusion_controlnet() -> TinyPipeline:
    unet = small_unet()
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,))
    for parameter in controlnet.parameters():  # its outputs start at zero
        nn.init.normal_(parameter, std=0.3)
    pipe = _stable_diffusion(StableDiffusionControlNetPipeline, unet=unet, controlnet=controlnet)

    def inputs(batch_size: int) -> dict[str, Any]:
        image = random_rows(pipe, 5, batch_size, 3, SIZE, SIZE).sigmoid()
        return {**embeddings(pipe, batch_size), "guidance_scale": 7.5, "image": image}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=7.5)


def stable_diffusion_lora() -> TinyPipeline:
    tiny = stable_diffusion()
    weights = {}
    for name, module in tiny.pipe.unet.named_modules():
        if name.endswith((".to_q", ".to_k", ".to_v")):
            weights[f"unet.{name}.lora_A.weight"] = torch.randn(2, module.in_features)
            weights[f"unet.{name}.lora_B.weight"] = 0.3 * torch.randn(module.out_features, 2)
    tiny.pipe.load_lora_weights(weights)
    return tiny


def stable_diffusion_ip_adapter() -> TinyPipeline:
    tiny = stable_diffusion()
    pipe, num_tokens, dim = tiny.pipe, 4, 16
    image_projection = {
        "proj.weight": torch.randn(num_tokens * dim, dim),
        "proj.bias": torch.zeros(num_tokens * dim),
        "norm.weight": torch.ones(dim),
        "norm.bias": torch.zeros(dim),
    }
    attention = {}
    # Weight files number all attention layers. Every second one is a cross-attention layer, which is adapted.
    for i, name in enumerate(pipe.unet.attn_processors):
        if "attn2" in name:
            width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            attention |= {f"{i}.{k}_ip.weight": torch.randn(width, dim) for k in ("to_k", "to_v")}
    pipe.load_ip_adapter(
        {"image_proj": image_projection, "ip_adapter": attention},
        subfolder="",
        weight_name="",
        image_encoder_folder=None,
        low_cpu_mem_usage=False,
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        rows = [random_rows(pipe, seed, batch_size, 1, dim) for seed in (6, 7)]
        return {**tiny.inputs(batch_size), "ip_adapter_image_embeds": [torch.cat(rows)]}

    return tiny._replace(inputs=inputs)


def stable_diffusion_xl_img2img() -> TinyPipeline:
    pipe = _stable_diffusion_xl(StableDiffusionXLImg2ImgPipeline)

    def inputs(batch_size: int) -> dict[str, Any]:
        image = random_rows(pipe, 5, batch_size, 3, SIZE, SIZE).sigmoid()
        return {**embeddings(pipe, batch_size, pooled=True), "guidance_scale": 5.0, "image": image, "strength": 0.5}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=5.0)


def marigold() -> TinyPipeline:
    pipe = MarigoldDepthPipeline(
        unet=small_unet(in_channels=8),
        vae=autoencoder(),
        scheduler=DDIMScheduler(
            **SD_BETAS, clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing"
        ),
        text_encoder=None,
        tokenizer=None,
        prediction_type="depth",
        default_denoising_steps=4,
    )
    pipe.empty_text_embedding = torch.randn(1, 2, 16)  # the embedding of the empty prompt, instead of a text encoder

    def inputs(batch_size: int) -> dict[str, Any]:
        images = random_rows(pipe, 5, batch_size, 3, SIZE, SIZE).sigmoid()
        return {"image": images, "batch_size": batch_size, "processing_resolution": 0}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), has_latent_output=False)


def only_whole_times(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    (timestep,) = arguments
    assert torch.equal(timestep, timestep.round()), f"told {timestep}"
    return (timestep.long(),)


def ddpm_with_a_time_table() -> TinyPipeline:
    """Its network looks times up in a table, and refuses fractions."""
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        time_embedding_type="learned",
        num_train_timesteps=1000,
    )
    unet.time_proj.register_forward_pre_hook(only_whole_times)
    pipe = DDPMPipeline(unet, DDPMScheduler(clip_sample=False))
    return TinyPipeline(pipe, lambda batch_size: {"batch_size": batch_size}, (1, 8, 8), has_latent_output=False)
