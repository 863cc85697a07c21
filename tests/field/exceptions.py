"""What single pipelines need beside the rules of `components.py` and `inputs.py`, by patterns of their class names.

All rows that match a class are applied, later ones over earlier ones. Settings of one component are joined.
"""

from typing import Any, TypeAlias

from .material import (
    depth,
    embedding,
    embeddings,
    examples,
    film,
    film_latents,
    film_mask,
    film_tensor,
    frames,
    half_mask,
    hint,
    large_film,
    nothing,
    other_embeddings,
    other_picture,
    picture,
    pictures,
    poses,
    short_film_latents,
    sound,
    token_mask,
    tokens,
)
from .sizes import AXES, LATENT, SIZE, WIDTH


# Patterns of class names, and what holds for the classes that match one of them.
Table: TypeAlias = tuple[tuple[str, dict[str, Any]], ...]

_IMAGES = {"image_encoder": {}, "feature_extractor": {}}
_SDXL_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    "cross_attention_dim": 2 * WIDTH,
    "use_linear_projection": True,
}
_SD3_WIDTHS = {"joint_attention_dim": 2 * WIDTH, "pooled_projection_dim": 2 * WIDTH}
_PIXEL_UNET = {"in_channels": 3, "out_channels": 6, "encoder_hid_dim": WIDTH}
_KANDINSKY_UNET = {"out_channels": 2 * LATENT, "encoder_hid_dim": WIDTH, "cross_attention_dim": WIDTH}
_QWEN3 = {"text_encoder": {"class": "Qwen3Model"}}
_GEMMA2 = {"text_encoder": {"class": "Gemma2Model"}}
_SIXTEEN = {"latents_mean": [0.1] * 16, "latents_std": [1.1] * 16}  # channels of latents, where pipelines insist on it


def _levels(n: int) -> dict[str, Any]:
    return {
        "block_out_channels": (8,) * n,
        "down_block_types": ("DownEncoderBlock2D",) * n,
        "up_block_types": ("UpDecoderBlock2D",) * n,
        "mid_block_add_attention": False,
    }


# Components: a dictionary has settings of the component, `class` and `config` among them, and builds one that is otherwise left
# out; anything else is the component.
PIPELINES: Table = (
    ("*PAG*", {"pag_applied_layers": "mid"}),
    ("HunyuanDiTPAG* PixArt*PAG* SanaPAG* StableDiffusion3PAG*", {"pag_applied_layers": "blocks.0"}),
    ("StableDiffusionXL*", {"unet": _SDXL_UNET, "controlnet": _SDXL_UNET}),
    ("AnimateDiffSDXL* LEdits*XL", {"unet": _SDXL_UNET}),
    ("StableDiffusionXLControlNetUnion*", {"controlnet": {"class": "ControlNetUnionModel"}}),
    (
        "StableDiffusion3*",
        {
            "transformer": _SD3_WIDTHS,
            "controlnet": _SD3_WIDTHS,
            "text_encoder_3": {"d_model": 2 * WIDTH},
        },
    ),
    ("StableDiffusion3ControlNetInpainting*", {"controlnet": {"extra_conditioning_channels": 1}}),
    (
        "StableDiffusion3Inpaint*",
        {
            "transformer": {"in_channels": 16, "out_channels": 16},
            "vae": {"latent_channels": 16, **_SIXTEEN},
        },
    ),
    ("StableDiffusionInstruct* StableDiffusionXLInstruct*", {"unet": {"in_channels": 2 * LATENT}}),
    ("StableDiffusionUpscale*", {"unet": {"in_channels": LATENT + 3, "num_class_embeds": 1000}}),
    (
        "StableDiffusionLatentUpscale*",
        {"unet": {"in_channels": 2 * LATENT, "out_channels": LATENT + 1, "time_cond_proj_dim": 128 + WIDTH}},
    ),
    ("StableDiffusionDepth2Img*", {"unet": {"in_channels": LATENT + 1}, "depth_estimator": None}),
    ("StableDiffusionImageVariation* StableUnCLIPImg2Img* StableCascade* ShapEImg2Img*", _IMAGES),
    ("FluxPriorRedux* HunyuanVideoFramepack* HunyuanVideo15ImageToVideo* WanAnimate*", _IMAGES),
    (
        "StableVideo*",
        {
            "feature_extractor": {},
            "image_encoder": {"image_size": 224, "patch_size": 32},
            "scheduler": {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
        },
    ),
    ("StableAudio3* AceStep*", {"scheduler": {"num_train_timesteps": 1, "shift": 1.0}}),
    ("AceStep*", _QWEN3),
    ("Mochi*", {"scheduler": {"shift": 1.0, "invert_sigmas": True}}),
    ("Flux* Qwen*", {"scheduler": {"use_dynamic_shifting": True, "shift": 1.0}}),
    ("FluxControl[PI]*", {"transformer": {"in_channels": 8 * LATENT, "out_channels": 4 * LATENT}}),
    ("FluxFill*", {"transformer": {"in_channels": 4 * (2 * LATENT + 4), "out_channels": 4 * LATENT}}),
    ("Flux2*", {"tokenizer": {"class": "PreTrainedTokenizerFast"}}),
    (
        "HunyuanImageRefiner*",
        {
            "transformer": {
                "in_channels": 4 * LATENT,
                "out_channels": 2 * LATENT,
                "patch_size": (1, 1, 1),
                "rope_axes_dim": AXES,
            }
        },
    ),
    ("HunyuanDiT*", {"vae": _levels(4)}),
    ("HunyuanVideo15ImageToVideo*", {"transformer": {"task_type": "i2v"}}),
    ("HunyuanVideoImageToVideo*", {"transformer": {"image_condition_type": "token_replace"}}),
    ("HunyuanSkyreels* LucyEdit* CogVideoXFunControl*", {"transformer": {"in_channels": 2 * LATENT}}),
    ("CogVideoXImageToVideo* CogView4Control*", {"transformer": {"in_channels": 2 * LATENT}}),
    ("LongCatImage*", {"transformer": {"in_channels": 64}, "vae": {"latent_channels": 16, **_SIXTEEN}}),
    ("LongCatImageEdit*", {"vae": _levels(7)}),
    ("QwenImageEdit* QwenImageLayered*", {"vae": {"dim_mult": [1] * 7, "temperal_downsample": [False] * 6}}),
    ("QwenImageControlNetInpaint*", {"controlnet": {"extra_condition_channels": 4}}),
    ("ChronoEdit* SkyReelsV2ImageToVideo*", _IMAGES | {"transformer": {"image_dim": WIDTH}}),
    ("WanImageToVideo* ChronoEdit* SkyReelsV2ImageToVideo*", {"transformer": {"in_channels": 2 * LATENT + 4}}),
    ("Krea2*", {"text_encoder_select_layers": (0, 1, 2)}),
    ("PRX*", {"transformer": {"axes_dim": (8, 8)}}),
    ("PRXPipeline", {"text_encoder": {"config": "T5GemmaModuleConfig"}}),
    ("PRXPixel*", _QWEN3 | {"transformer": {"in_channels": 3}}),
    ("Z*", _QWEN3),
    ("ZImageControlNetInpaint*", {"controlnet": {"control_in_dim": 2 * LATENT + 1}}),
    (
        "Ideogram4*",
        {
            "text_encoder": {"class": "Qwen3VLModel", "text_config": {"num_hidden_layers": 36}},
            "transformer": {"llm_features_dim": 13 * WIDTH},
            "unconditional_transformer": {"llm_features_dim": 13 * WIDTH},
        },
    ),
    ("LLaDA2* DiffusionGemma*", {"model": None, "processor": None}),
    (
        "RFD4*",
        {
            "vae": {"atom37_mask": [[True] * 37] * 147, "allowed_residue_types": [[True] * 147] * 7},
            "bb_ca_scheduler": None,
            "local_latents_scheduler": None,
        },
    ),
    ("MotifVideoImage2Video*", {"feature_extractor": {}, "transformer": {"image_embed_dim": WIDTH}}),
    (
        "AudioLDM2*",
        {
            "tokenizer": {"class": "RobertaTokenizer"},
            "tokenizer_2": {"class": "T5Tokenizer"},
            "vae": {"in_channels": 1, "out_channels": 1},
        },
    ),
    ("Kandinsky5I2I*", {"vae": _levels(4), "transformer": {"visual_cond": True}}),
    ("LEditsPP*", {"scheduler": {"class": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}}),
    ("Kandinsky6SR*", {"latent_upscaler": None}),
    ("BriaFibo2*", {"text_encoder": {"text_config": {"num_hidden_layers": 36}}}),
    (
        "BriaFiboEdit*",
        {
            "vae": {
                "patch_size": 2,
                "in_channels": 12,
                "out_channels": 12,
                "scale_factor_spatial": 16,
                "is_residual": True,
                "z_dim": 16,
                **_SIXTEEN,
            }
        },
    ),
    ("VisualCloze*", {"resolution": SIZE, "transformer": {"in_channels": 12 * LATENT, "out_channels": 4 * LATENT}}),
    ("LTX2DFR*", {"transformer": {"use_keyframes_abs_pos_embedding": True}}),
    ("LTX2VideoDiffusionDecode*", {"scheduler": {"class": "FlowMatchEulerDiscreteScheduler"}}),
    (
        "ShapE*",
        {
            "prior": {
                "num_embeddings": 32,
                "embedding_proj_dim": WIDTH,
                "clip_embed_dim": 2 * WIDTH,
                "additional_embeddings": 0,
                "time_embed_act_fn": "gelu",
                "norm_in_type": "layer",
                "embedding_proj_norm_type": "layer",
                "encoder_hid_proj_type": None,
                "added_emb_type": None,
            }
        },
    ),
    ("IF*", {"unet": _PIXEL_UNET, "scheduler": {"variance_type": "learned_range", "clip_sample": False}}),
    ("IF*SuperResolution*", {"unet": {"in_channels": 6, "class_embed_type": "timestep"}}),
    (
        "KandinskyPipeline KandinskyCombined* KandinskyImg2Img* KandinskyInpaint*",
        {"unet": _KANDINSKY_UNET | {"encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"}},
    ),
    (
        "KandinskyV22*",
        {"unet": _KANDINSKY_UNET | {"encoder_hid_dim_type": "image_proj", "addition_embed_type": "image"}},
    ),
    ("KandinskyInpaint* KandinskyV22Inpaint*", {"unet": {"in_channels": 2 * LATENT + 1}}),
    ("KandinskyV22Controlnet*", {"unet": {"addition_embed_type": "image_hint", "in_channels": 2 * LATENT}}),
    ("LDMSuperResolution*", {"vqvae": {"latent_channels": 3}, "unet": {"in_channels": 6, "out_channels": 3}}),
    ("LDMTextToImage*", {"unet": {"class": "UNet2DConditionModel"}, "bert": {"class": "LDMBertModel"}}),
    ("Sana* Lumina*", _GEMMA2),
    ("SanaWMLTX2Refiner", {"text_encoder": {"class": "Gemma3ForConditionalGeneration"}}),
    ("SanaSprint*", {"scheduler": {"class": "SCMScheduler"}}),
    ("SanaVideo* SanaImageToVideo*", {"vae": {"class": "AutoencoderKLWan"}}),
    ("Cosmos*", {"safety_checker": {"class": "SilentSafetyChecker"}}),
    ("CosmosVideoToWorld* Cosmos2VideoToWorld* Cosmos2_5_*", {"transformer": {"in_channels": LATENT + 1}}),
    (
        "Cosmos2_5_*",
        {
            "transformer": {"use_crossattn_projection": True, "crossattn_proj_in_channels": 2 * WIDTH},
            "controlnet": {"in_channels": LATENT + 1, "latent_channels": LATENT + 1, "n_controlnet_blocks": 1},
        },
    ),
    (
        "Marigold*",
        {
            "unet": {"in_channels": 2 * LATENT},
            "default_processing_resolution": 0,
            "default_denoising_steps": 4,
        },
    ),
)

_FROM_EMBEDDINGS = {"prompt": None, "prompt_embeds": embeddings, "negative_prompt_embeds": other_embeddings}
_FROM_IMAGE_EMBEDDINGS = {"image_embeds": embedding, "negative_image_embeds": embedding}
# Arguments of calls: a function makes the argument, `None` leaves it out.
INPUTS: Table = (
    ("ChronoEdit* LucyEdit* WanImageToVideo* WanVideoToVideo*", _FROM_EMBEDDINGS),
    ("WanVACE* WanAnimate* SkyReels* PRX*", _FROM_EMBEDDINGS),
    ("SkyReelsV2DiffusionForcing*", {"prompt": nothing, "num_frames": 9}),
    ("SkyReelsV2DiffusionForcingVideoToVideo*", {"num_frames": 13, "overlap_history": 5, "base_num_frames": 9}),
    (
        "PRX*",
        {
            "prompt_attention_mask": token_mask,
            "negative_prompt_attention_mask": token_mask,
            "output_type": "pt",
        },
    ),
    ("WanAnimate*", {"pose_video": film, "face_video": film}),
    ("AnimateDiff*ControlNet*", {"conditioning_frames": film}),
    ("FluxKontext*", {"max_area": SIZE * SIZE, "_auto_resize": False}),
    ("Flux2Pipeline Flux2KleinPipeline Flux2KleinKV* ZImageOmni* BriaFibo2* GlmImage* QwenImage21*", {"image": None}),
    ("Flux2*", {"text_encoder_out_layers": (0, 1, 2)}),
    ("GlmImage*", {"prior_token_ids": tokens}),
    ("Marigold*", {"processing_resolution": 0, "output_type": "np"}),
    ("StableDiffusion3ControlNetInpainting*", {"control_image": picture, "control_mask": half_mask}),
    ("StableDiffusionXLControlNetUnion*", {"control_image": pictures, "control_mode": [0]}),
    ("StableDiffusionDepth2Img*", {"depth_map": depth}),
    ("QwenImageControlNetInpaint*", {"control_mask": half_mask}),
    ("QwenImageLayered*", {"output_type": "pt"}),
    ("QwenImageEdit* LongCatImageEdit*", {"height": 256, "width": 256, "max_sequence_length": None}),
    ("Kandinsky5I2I* Ideogram4*", {"max_sequence_length": None}),
    ("Ideogram4*", {"guidance_schedule": nothing, "guidance_scale": 3.0}),
    ("SanaSprint*", {"intermediate_timesteps": nothing}),
    ("BriaFiboEdit*", {"prompt": '{"text": "a fox", "edit_instruction": "a red fox"}'}),
    ("KandinskyPipeline KandinskyImg2ImgPipeline KandinskyInpaintPipeline", _FROM_IMAGE_EMBEDDINGS),
    ("KandinskyV22Pipeline KandinskyV22Img2ImgPipeline KandinskyV22InpaintPipeline", _FROM_IMAGE_EMBEDDINGS),
    ("KandinskyPipeline KandinskyCombined* KandinskyImg2Img* KandinskyInpaint*", {"output_type": "pt"}),
    ("KandinskyV22Controlnet*", {"hint": hint, "output_type": "pt", **_FROM_IMAGE_EMBEDDINGS}),
    ("IF*", {"output_type": "pt"}),
    ("Kandinsky6SR*", {"video": large_film, "output_type": "pt"}),
    ("LTX*", {"num_frames": 9}),
    ("LTX2ImageToVideo*", {"image_crf": 0}),
    ("LTX2VideoDiffusionDecode*", {"latents": short_film_latents, "output_type": "pt"}),
    ("Latte*", {"video_length": 2}),
    ("NucleusMoE*", {"return_index": -1}),
    ("AudioLDM2*", {"max_new_tokens": 4}),
    ("AceStep*", {"audio_duration": 0.4, "max_text_length": 16}),
    ("StableAudioPipeline", {"audio_end_in_s": 4.0}),
    ("StableAudio3*", {"duration": 1.0}),
    ("StableAudio3AudioToAudio* StableAudio3Inpaint*", {"audio": sound}),
    ("StableAudio3Inpaint*", {"mask_start_seconds": 0.2, "mask_end_seconds": 0.6}),
    (
        "VisualCloze*",
        {
            "task_prompt": "a fox",
            "content_prompt": "a red fox",
            "image": examples,
            "upsampling_height": SIZE,
            "upsampling_width": SIZE,
        },
    ),
    (
        "BlipDiffusion*",
        {
            "reference_image": picture,
            "condtioning_image": other_picture,
            "source_subject_category": "fox",
            "target_subject_category": "fox",
        },
    ),
    ("OmniGen*", {"input_images": None}),
    ("Cosmos3* CosmosVideoToWorld* Cosmos2VideoToWorld* Cosmos2_5_Predict*", {"video": None}),
    ("Cosmos2_5_Predict*", {"image": None}),
    ("Cosmos2_5_Transfer*", {"controls": frames}),
    ("EasyAnimate*", {"negative_prompt": "blurred"}),
    ("EasyAnimateInpaint*", {"video": film_tensor, "mask_video": film_mask}),
    (
        "HunyuanVideoImageToVideo*",
        {
            **_FROM_EMBEDDINGS,
            "pooled_prompt_embeds": embedding,
            "prompt_attention_mask": token_mask,
        },
    ),
    ("SanaWMLTX2Refiner", {"sana_latent": film_latents, "fps": 16.0}),
    ("SanaWMPipeline", {"c2w": poses, "intrinsics": [16.0, 16.0, 16.0, 16.0], "num_frames": 9}),
)
# Pipelines that edit what was inverted before.
INVERTED: Table = (("LEditsPP*", {"image": picture, "skip": 0.0}),)
