"""Pipelines around transformers that make images."""

import math
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tiny_components import SIZE, TinyPipeline, autoencoder, embeddings, random_rows
from torch import Tensor, nn


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
        vae=autoencoder(),
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
        return {**embeddings(pipe, batch_size, pooled=True), "guidance_scale": 4.5}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=4.5, flow_shift=3.0)


def stable_diffusion_3_img2img() -> TinyPipeline:
    pipe = _stable_diffusion_3(StableDiffusion3Img2ImgPipeline)

    def inputs(batch_size: int) -> dict[str, Any]:
        image = random_rows(pipe, 5, batch_size, 3, SIZE, SIZE).sigmoid()
        embeds = embeddings(pipe, batch_size, pooled=True)
        return {**embeds, "guidance_scale": 4.5, "image": image, "strength": 0.5, "height": SIZE, "width": SIZE}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=4.5, flow_shift=3.0)


def flux(pipeline_class: type[DiffusionPipeline] = FluxPipeline) -> TinyPipeline:
    pipe = pipeline_class(
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
        # The resolution range of the shift differs from Flux's own, so that the shift differs from every default.
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.9, max_shift=1.4),
        vae=autoencoder(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        return {
            "prompt_embeds": 3 * random_rows(pipe, 1, batch_size, 5, 16),
            "pooled_prompt_embeds": 3 * random_rows(pipe, 3, batch_size, 16),
            "guidance_scale": 3.5,
            "height": SIZE,
            "width": SIZE,
        }

    def to_state(noise: Tensor) -> Tensor:
        return pipe._pack_latents(noise, *noise.shape)

    shift = math.exp(calculate_shift((SIZE // 2) ** 2, base_shift=0.9, max_shift=1.4))
    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), flow_shift=shift, timestep_scale=1e-3, to_state=to_state)


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
        vae=autoencoder(),
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


def pixart(pipeline_class: type[DiffusionPipeline] = PixArtAlphaPipeline) -> TinyPipeline:
    pipe = pipeline_class(
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
        vae=autoencoder(),
        scheduler=DPMSolverMultistepScheduler(),
        text_encoder=None,
        tokenizer=None,
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        mask = torch.ones(batch_size, 5)
        return {
            **embeddings(pipe, batch_size),
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "negative_prompt": None,
            "guidance_scale": 4.5,
            "use_resolution_binning": False,
        }

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=4.5)


def pixart_sigma() -> TinyPipeline:
    return pixart(PixArtSigmaPipeline)


def flux_img2img() -> TinyPipeline:
    tiny = flux(FluxImg2ImgPipeline)

    def inputs(batch_size: int) -> dict[str, Any]:
        image = random_rows(tiny.pipe, 5, batch_size, 3, SIZE, SIZE).sigmoid()
        return {**tiny.inputs(batch_size), "image": image, "strength": 0.5}

    return tiny._replace(inputs=inputs)


def sana() -> TinyPipeline:
    pipe = SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=SIZE,
        ),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, final_sigmas_type="zero"
        ),
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        mask = torch.ones(batch_size, 5)
        return {
            **embeddings(pipe, batch_size),
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "negative_prompt": None,
            "guidance_scale": 4.5,
            "height": 32 * SIZE,
            "width": 32 * SIZE,
            "use_resolution_binning": False,
            "output_type": "latent",
        }

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), guidance_scale=4.5, flow_shift=3.0)


def qwen_image() -> TinyPipeline:
    # The shift's settings are the published model's, except for the terminal value, which must matter with few steps.
    shifting = {"base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192}
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **shifting),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        mask = torch.ones(batch_size, 5, dtype=torch.long)
        return {
            **embeddings(pipe, batch_size),
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds_mask": mask,
            "true_cfg_scale": 4.0,
            "height": 8 * SIZE,
            "width": 8 * SIZE,
            "output_type": "latent",
        }

    def to_state(noise: Tensor) -> Tensor:
        return pipe._pack_latents(noise, noise.shape[0], 4, SIZE, SIZE)

    shift = math.exp(calculate_shift((SIZE // 2) ** 2, 256, 8192, 0.5, 0.9))
    return TinyPipeline(pipe, inputs, (1, 4, SIZE, SIZE), flow_shift=shift, timestep_scale=1e-3, to_state=to_state)


def z_image() -> TinyPipeline:
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[64, 32, 32],
        ),
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        embeds = {name: list(rows) for name, rows in embeddings(pipe, batch_size).items()}
        return {**embeds, "guidance_scale": 3.0, "height": SIZE, "width": SIZE}

    return TinyPipeline(pipe, inputs, (4, SIZE, SIZE), flow_shift=3.0)
