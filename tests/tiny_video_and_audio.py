"""Pipelines that make videos and sound."""

import math
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLWan,
    AutoencoderOobleck,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    MotionAdapter,
    StableAudioDiTModel,
    StableAudioPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from tiny_components import SIZE, TinyPipeline, autoencoder, embeddings
from tiny_unets import small_unet
from torch import Tensor


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
        embeds = embeddings(pipe, batch_size)
        return {**embeds, "guidance_scale": 5.0, "height": 32, "width": 32, "num_frames": 5}

    return TinyPipeline(pipe, inputs, (16, 2, 4, 4), guidance_scale=5.0, conditional_first=True, flow_shift=3.0)


def ltx_network() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )


def ltx_video() -> TinyPipeline:
    # The shift's settings are the published model's.
    shifting = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    pipe = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **shifting),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=ltx_network(),
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        mask = torch.ones(batch_size, 5)
        return {
            **embeddings(pipe, batch_size),
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 3.0,
            "height": 128,
            "width": 128,
            "num_frames": 9,
            "output_type": "latent",
        }

    def to_state(noise: Tensor) -> Tensor:
        return pipe._pack_latents(noise, 1, 1)

    shift = math.exp(calculate_shift(2 * 4 * 4, 1024, 4096, 0.95, 2.05))
    return TinyPipeline(pipe, inputs, (4, 2, 4, 4), guidance_scale=3.0, flow_shift=shift, to_state=to_state)


def mochi() -> TinyPipeline:
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=16,
            time_embed_dim=4,
        ),
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        mask = torch.ones(batch_size, 5, dtype=torch.bool)
        return {
            **embeddings(pipe, batch_size),
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 4.5,
            "height": 32,
            "width": 32,
            "num_frames": 7,
            "output_type": "latent",
        }

    return TinyPipeline(pipe, inputs, (12, 2, 4, 4), guidance_scale=4.5, flow_shift=1.0, inverted=True)


def cogvideox() -> TinyPipeline:
    pipe = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=4,
            text_embed_dim=16,
            num_layers=1,
            sample_width=SIZE,
            sample_height=SIZE,
            sample_frames=5,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=5,
        ),
        # The settings of the published 2b model.
        scheduler=CogVideoXDDIMScheduler(
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        sizes = {"height": 8 * SIZE, "width": 8 * SIZE, "num_frames": 5}
        return {**embeddings(pipe, batch_size), "guidance_scale": 6.0, **sizes, "output_type": "latent"}

    return TinyPipeline(pipe, inputs, (2, 4, SIZE, SIZE), guidance_scale=6.0)


def animatediff() -> TinyPipeline:
    pipe = AnimateDiffPipeline(
        vae=autoencoder(),
        text_encoder=None,
        tokenizer=None,
        unet=small_unet(),
        motion_adapter=MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_norm_num_groups=4,
            motion_num_attention_heads=2,
            motion_max_seq_length=4,
        ),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1),
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        return {**embeddings(pipe, batch_size), "guidance_scale": 7.5, "num_frames": 2, "output_type": "latent"}

    return TinyPipeline(pipe, inputs, (4, 2, SIZE, SIZE), guidance_scale=7.5)


def stable_audio() -> TinyPipeline:
    pipe = StableAudioPipeline(
        vae=AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[1, 2],
            channel_multiples=[1, 1],
            decoder_channels=4,
            decoder_input_channels=4,
            audio_channels=2,
            sampling_rate=4,
        ),
        text_encoder=None,
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32
        ),
        tokenizer=None,
        transformer=StableAudioDiTModel(
            sample_size=16,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            out_channels=4,
            cross_attention_dim=16,
            time_proj_dim=8,
            global_states_input_dim=32,
            cross_attention_input_dim=16,
        ),
        scheduler=EDMDPMSolverMultistepScheduler(
            sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, prediction_type="v_prediction"
        ),
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        return {**embeddings(pipe, batch_size), "guidance_scale": 7.0, "audio_end_in_s": 4.0}

    return TinyPipeline(pipe, inputs, (4, 16), guidance_scale=7.0)
