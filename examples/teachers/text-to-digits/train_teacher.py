"""Trains the small latent text-to-image model that ships in this folder: a Stable Diffusion of 16x16 coloured digits.

The data are those of ../digit_prompts.py, so nothing is downloaded. First the autoencoder is trained, then UNet and text
encoder together on its latents. The result is a pipeline folder with half-precision weights, to be loaded with
`StableDiffusionPipeline.from_pretrained(output_dir)`, its prompts.txt and a picture of its samples. The defaults made
the shipped teacher:

    OMP_NUM_THREADS=1 python examples/teachers/text-to-digits/train_teacher.py --output_dir my_teacher

Ctrl-C ends the current training early. The teacher is saved as it is then.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel


sys.path.append(str(Path(__file__).resolve().parents[1]))
from digit_prompts import IMAGE_SIZE, draw_digits, finish, make_tokenizer, paint, train_to_follow_prompts
from teacher_training import add_arguments, autoencoder_loss, encode, fit, text_encoder_config


KL_WEIGHT = 3e-4  # weight of the mean per latent, relative to the mean squared error per pixel


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small Stable Diffusion of coloured digits.")
    add_arguments(parser, output_dir="text_to_digits_teacher", max_train_steps=9_000)
    parser.add_argument("--autoencoder_train_steps", type=int, default=1_000)
    return parser.parse_args()


def build_pipeline() -> StableDiffusionPipeline:
    """The components of Stable Diffusion, with latents of 4x8x8, two resolutions, and cross-attention at 4x4."""
    tokenizer = make_tokenizer()
    text_config = text_encoder_config(tokenizer, hidden_size=64)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            sample_size=IMAGE_SIZE,
            latent_channels=4,
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            norm_num_groups=8,
            shift_factor=0.0,  # needed by Stable Diffusion 3, the other teacher
        ),
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(24, 48),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=4,  # the number of heads, despite the name in Diffusers
            cross_attention_dim=text_config.hidden_size,
        ),
        scheduler=PNDMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            skip_prk_steps=True,
            steps_offset=1,
            timestep_spacing="leading",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_autoencoder(vae: AutoencoderKL, args: argparse.Namespace) -> None:
    """Trains on images in all colours: squared error plus a small weight times the divergence. Sets the scale of the latents."""
    images, _ = paint(draw_digits(copies=10, seed=args.seed)[0], args.seed)
    images = images.to(vae.device)

    def loss(index: Tensor) -> Tensor:
        return autoencoder_loss(vae, lambda latents: vae.decode(latents).sample, images[index], KL_WEIGHT)

    fit({"the autoencoder": vae}, loss, len(images), args, args.autoencoder_train_steps)
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=1 / encode(vae, images).std().item())


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    device = Accelerator().device
    pipe = build_pipeline().to(device)
    train_autoencoder(pipe.vae, args)

    def loss(latents: Tensor, prompts: list[str]) -> Tensor:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(pipe.scheduler.config.num_train_timesteps, latents.shape[:1], device=device)
        prompt_embeds, _ = pipe.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
        noisy_latents = pipe.scheduler.add_noise(latents, noise, timesteps)
        return functional.mse_loss(pipe.unet(noisy_latents, timesteps, prompt_embeds).sample, noise)

    modules = {"the UNet": pipe.unet, "its text encoder": pipe.text_encoder}
    train_to_follow_prompts(modules, pipe.vae, loss, args)
    finish(pipe, DPMSolverMultistepScheduler.from_config(pipe.scheduler.config), args)


if __name__ == "__main__":
    main()
