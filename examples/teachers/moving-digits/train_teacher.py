"""Trains the small text-to-video model that ships in this folder: a Wan of coloured digits that move.

The data are made by ../digit_prompts.py and ../motion_prompts.py, so nothing is downloaded. First the autoencoder is
trained, then transformer and text encoder together on its latents. The result is a pipeline folder with half-precision
weights, to be loaded with `WanPipeline.from_pretrained(output_dir)`, its prompts.txt and a picture of its samples. The
defaults made the shipped teacher:

    OMP_NUM_THREADS=1 python examples/teachers/moving-digits/train_teacher.py --output_dir my_teacher

Ctrl-C ends the current training early. The teacher is saved as it is then.
"""

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor
from torch.nn import functional
from transformers import UMT5Config, UMT5EncoderModel


sys.path.append(str(Path(__file__).resolve().parents[1]))
from digit_prompts import COLOURS, MAX_TOKENS, draw_digits, paint
from motion_prompts import (
    MOTIONS,
    NUM_FRAMES,
    VIDEO_SIZE,
    draw_videos,
    example_prompts,
    film,
    motion_accuracy,
    motion_prompt_words,
    random_prompt,
)
from teacher_training import add_arguments, autoencoder_loss, fit, make_word_tokenizer, save


KL_WEIGHT = 2e-5  # weight of the mean per latent, relative to the mean squared error per pixel


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small Wan of coloured digits that move.")
    add_arguments(parser, output_dir="moving_digits_teacher", max_train_steps=2_500)
    parser.add_argument("--autoencoder_train_steps", type=int, default=2_000)
    parser.add_argument("--autoencoder_train_batch_size", type=int, default=8)
    parser.set_defaults(lr_warmup_steps=50)
    return parser.parse_args()


def build_pipeline() -> WanPipeline:
    """The components of Wan and its schedule for small videos, with latents of 16x3x2x2.

    As in Wan 2.2, the autoencoder turns patches of pixels into channels. The patches are 4x4 here, so that it computes at a
    sixteenth of the positions.
    """
    tokenizer = make_word_tokenizer(motion_prompt_words(), MAX_TOKENS)
    text_config = UMT5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    z_dim, patch, heads, head_dim = 16, 4, 4, 24
    return WanPipeline(
        vae=AutoencoderKLWan(
            base_dim=24,
            z_dim=z_dim,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * z_dim,
            latents_std=[1.0] * z_dim,
            in_channels=3 * patch**2,
            out_channels=3 * patch**2,
            patch_size=patch,
            scale_factor_spatial=4 * patch,
        ),
        text_encoder=UMT5EncoderModel(text_config),
        tokenizer=tokenizer,
        transformer=WanTransformer3DModel(
            patch_size=(1, 1, 1),
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=z_dim,
            out_channels=z_dim,
            text_dim=text_config.d_model,
            freq_dim=64,
            ffn_dim=192,
            num_layers=3,
            rope_max_seq_len=32,
        ),
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    )


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The output of the decoder without the clamping of `vae.decode`, which has no gradient for pixels darker than black."""
    vae.clear_cache()
    frames = []
    for i, frame in enumerate(vae.post_quant_conv(latents).split(1, dim=2)):
        vae._conv_idx = [0]
        frames.append(vae.decoder(frame, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, 2), vae.config.patch_size)


def train_autoencoder(vae: AutoencoderKLWan, videos: Tensor, args: argparse.Namespace) -> None:
    """Squared error, plus a small weight times the Kullback-Leibler divergence."""
    torch.nn.init.constant_(vae.decoder.conv_out.bias, -1.0)  # most of a video is black

    def loss(index: Tensor) -> Tensor:
        return autoencoder_loss(vae, partial(decode_unclamped, vae), videos[index].to(vae.device), KL_WEIGHT)

    steps, batch_size = args.autoencoder_train_steps, args.autoencoder_train_batch_size
    fit({"the autoencoder": vae}, loss, len(videos), args, steps, batch_size)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, videos: Tensor) -> Tensor:
    """Latents, drawn from the distribution of the encoder, with zero mean and unit variance in every channel."""
    latents = torch.cat([vae.encode(batch.to(vae.device)).latent_dist.sample() for batch in videos.split(64)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    device = Accelerator().device
    pipe = build_pipeline().to(device)
    drawings, digits = draw_digits(copies=3, seed=args.seed)
    images, colours = paint(drawings, args.seed)
    videos, motions = film(images, torch.Generator().manual_seed(args.seed))
    train_autoencoder(pipe.vae, videos, args)
    latents = encode(pipe.vae, videos)
    names, directions, rng = list(COLOURS), list(MOTIONS), random.Random(args.seed)

    def loss(index: Tensor) -> Tensor:
        prompts = [random_prompt(digits[i].item(), names[colours[i]], directions[motions[i]], rng) for i in index]
        noise = torch.randn_like(latents[index])
        sigmas = torch.randn(len(index), device=device).sigmoid()  # logit-normal, as Stable Diffusion 3's
        prompt_embeds, _ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS, device=device
        )
        noisy_latents = torch.lerp(latents[index], noise, sigmas.view(-1, 1, 1, 1, 1))
        timesteps = sigmas * pipe.scheduler.config.num_train_timesteps
        velocity = pipe.transformer(noisy_latents, timesteps, prompt_embeds).sample
        return functional.mse_loss(velocity, noise - latents[index])

    modules = {"the transformer": pipe.transformer, "its text encoder": pipe.text_encoder}
    fit(modules, loss, len(latents), args, args.max_train_steps)

    call = {"height": VIDEO_SIZE, "width": VIDEO_SIZE, "num_frames": NUM_FRAMES, "max_sequence_length": MAX_TOKENS}
    call |= {"guidance_scale": args.guidance_scale}
    pipe = save(pipe, example_prompts(), args)
    (args.output_dir / "pipeline_arguments.json").write_text(json.dumps(call) + "\n", encoding="utf-8")
    call |= {"num_inference_steps": args.num_sample_steps}
    draw_videos(pipe, args.seed, **call).quantize(64).save(args.output_dir / "samples.png", optimize=True)
    digit_share, colour_share, motion_share = motion_accuracy(pipe, seed=args.seed, **call)
    print(
        f"Saved {args.output_dir}; of 400 samples' frames {digit_share:.1%} show their digit and {colour_share:.1%} "
        f"their colour, and {motion_share:.1%} of the samples move as asked"
    )


if __name__ == "__main__":
    main()
