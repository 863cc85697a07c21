"""Trains the small text-to-video model that ships in this folder: a Wan of coloured digits that move.

The data are made by ../digit_prompts.py and ../motion_prompts.py, so nothing is downloaded. First the autoencoder is
trained, then transformer and text encoder together on its latents. The result is a pipeline folder with half-precision
weights, to be loaded with `WanPipeline.from_pretrained(output_dir)`, its prompts.txt and a picture of its samples. The
shipped teacher was made with these defaults, but for what its README says:

    OMP_NUM_THREADS=1 python examples/teachers/moving-digits/train_teacher.py --output_dir my_teacher

A run that was killed goes on from its last checkpoint when the same command is given again. Ctrl-C ends the current training
early. The teacher is saved as it is then.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn
from torch.nn import functional
from transformers import UMT5Config, UMT5EncoderModel


sys.path.append(str(Path(__file__).resolve().parents[1]))
from digit_prompts import COLOURS, MAX_TOKENS, draw_digits, paint
from motion_prompts import (
    MOTIONS,
    NUM_FRAMES,
    VIDEO_SIZE,
    MotionJudge,
    draw_videos,
    example_prompts,
    film,
    motion_accuracy,
    motion_prompt_words,
    random_prompt,
)
from teacher_training import (
    add_arguments,
    autoencoder_loss,
    fit,
    make_word_tokenizer,
    parse_with_checkpoints,
    save,
)


INK_WEIGHT = 4.0
KL_WEIGHT = 2e-5  # weight of the mean per latent, relative to the mean squared error per pixel


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small Wan of coloured digits that move.")
    add_arguments(parser, output_dir="moving_digits_teacher", max_train_steps=2_500)
    add = parser.add_argument
    add("--autoencoder_train_steps", type=int, default=1_400)
    add("--autoencoder_train_batch_size", type=int, default=16)
    add("--mixed_precision", choices=("no", "bf16"), default="bf16", help="Of the autoencoder's training.")
    parser.set_defaults(lr_warmup_steps=50)
    return parse_with_checkpoints(parser, checkpointing_steps=100)


def build_pipeline() -> WanPipeline:
    """The components of Wan and its schedule for small videos, with latents of 16x5x4x4, of which the transformer takes 1x2x2.

    As in Wan 2.2, the autoencoder turns patches of pixels into channels, and has shortcuts around its blocks. The patches are
    4x4 here, so that it computes at a sixteenth of the positions.
    """
    tokenizer = make_word_tokenizer(motion_prompt_words(), MAX_TOKENS)
    text_config = UMT5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    z_dim, patch, heads, head_dim = 16, 4, 4, 32
    return WanPipeline(
        vae=AutoencoderKLWan(
            base_dim=64,
            z_dim=z_dim,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.0] * z_dim,
            latents_std=[1.0] * z_dim,
            in_channels=3 * patch**2,
            out_channels=3 * patch**2,
            patch_size=patch,
            scale_factor_spatial=2 * patch,
            scale_factor_temporal=2,
            is_residual=True,
        ),
        text_encoder=UMT5EncoderModel(text_config),
        tokenizer=tokenizer,
        transformer=WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            in_channels=z_dim,
            out_channels=z_dim,
            text_dim=text_config.d_model,
            freq_dim=64,
            ffn_dim=256,
            num_layers=3,
            rope_max_seq_len=32,
        ),
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    )


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The output of the decoder without the clamping of `vae.decode`, which has no gradient for pixels darker than black.

    All frames but the first are decoded at once, which gives the same as one by one, in less time.
    """
    vae.clear_cache()
    frames = []
    for i, part in enumerate(vae.post_quant_conv(latents).split([1, latents.shape[2] - 1], dim=2)):
        vae._conv_idx = [0]
        frames.append(vae.decoder(part, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, 2), vae.config.patch_size)


def train_autoencoder(
    vae: AutoencoderKLWan, videos: Tensor, accelerator: Accelerator, args: argparse.Namespace
) -> None:
    """Squared error, of which a bright pixel weighs `1 + INK_WEIGHT` times as much as a black one, plus a small divergence."""
    torch.nn.init.constant_(vae.decoder.conv_out.bias, -1.0)  # most of a video is black

    def distance(decoded: Tensor, samples: Tensor) -> Tensor:
        ink = (samples.amax(1, keepdim=True) + 1) / 2
        return ((1 + INK_WEIGHT * ink) * (decoded.float() - samples).square()).mean()

    def loss(index: Tensor) -> Tensor:
        samples = videos[index].to(vae.device)
        with accelerator.autocast():
            return autoencoder_loss(vae, lambda z: decode_unclamped(vae, z), samples, KL_WEIGHT, distance)

    steps, batch_size = args.autoencoder_train_steps, args.autoencoder_train_batch_size
    fit({"autoencoder": vae}, loss, len(videos), args, steps, batch_size, args.checkpoint_dir / "autoencoder.pt")


@torch.no_grad()
def encode(vae: AutoencoderKLWan, videos: Tensor) -> Tensor:
    """Latents, drawn from the distribution of the encoder, with zero mean and unit variance in every channel."""
    latents = torch.cat([vae.encode(batch.to(vae.device)).latent_dist.sample() for batch in videos.split(64)])
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return (latents - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


@torch.no_grad()
def judge_reconstructions(vae: AutoencoderKLWan, seed: int, count: int = 400) -> tuple[float, float, float]:
    """The mean squared error of `count` videos that no training has seen, and the shares of frames that the judge reads.

    Returns:
        `(float, float, float)`: the error, and the shares of the videos and of what the autoencoder makes of them.
    """
    drawings, digits = draw_digits(copies=1, seed=seed + 2)  # the judge has learned from those of seed + 1
    chosen = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))[:count]
    images, _ = paint(drawings[chosen], seed + 2)
    videos, _ = film(images, torch.Generator().manual_seed(seed + 2))
    decoded = torch.cat(
        [vae.decode(vae.encode(batch).latent_dist.sample()).sample for batch in videos.to(vae.device).split(50)]
    )
    judge = MotionJudge()
    shares = [
        float((judge(video.transpose(1, 2) / 2 + 0.5)[0] == digits[chosen, None].numpy()).mean())
        for video in (videos, decoded)
    ]
    return functional.mse_loss(decoded.cpu(), videos).item(), shares[0], shares[1]


def train_to_follow_prompts(
    pipe: WanPipeline,
    latents: Tensor,
    prompt: Callable[[int, random.Random], str],
    args: argparse.Namespace,
) -> None:
    """Predicts velocities, in float32: with so few tokens, CPUs spend more time on the conversions of bfloat16 than it saves.

    Args:
        pipe: The teacher.
        latents: Of shape `(videos, 16, 5, 4, 4)`.
        prompt: Makes a prompt for a video.
        args: The script's arguments.
    """

    def loss(index: Tensor) -> Tensor:
        rng = random.Random(torch.randint(2**31, ()).item())  # a resumed training has the random numbers of PyTorch
        clean = latents[index.to(latents.device)]
        noise = torch.randn_like(clean)
        sigmas = torch.randn(len(index), device=clean.device).sigmoid()  # logit-normal, as Stable Diffusion 3's
        prompt_embeds, _ = pipe.encode_prompt(
            [prompt(i, rng) for i in index.tolist()],
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_TOKENS,
            device=clean.device,
        )
        noisy = torch.lerp(clean, noise, sigmas.view(-1, 1, 1, 1, 1))
        timesteps = sigmas * pipe.scheduler.config.num_train_timesteps
        velocity = pipe.transformer(noisy, timesteps, prompt_embeds).sample
        return functional.mse_loss(velocity, noise - clean)

    modules: dict[str, nn.Module] = {"transformer": pipe.transformer, "text encoder": pipe.text_encoder}
    fit(modules, loss, len(latents), args, args.max_train_steps, checkpoint=args.checkpoint_dir / "transformer.pt")


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    drawings, digits = draw_digits(copies=3, seed=args.seed)
    images, colours = paint(drawings, args.seed)
    videos, motions = film(images, torch.Generator().manual_seed(args.seed))

    # Both trainings have their own seeds, because a resumed run skips the random numbers of one that is done.
    set_seed(args.seed)
    pipe = build_pipeline().to(accelerator.device)
    train_autoencoder(pipe.vae, videos, accelerator, args)
    error, originals, reconstructions = judge_reconstructions(pipe.vae, args.seed)
    print(
        f"The digits of {originals:.1%} of the frames of 400 unseen videos are judged right, and of {reconstructions:.1%} of "
        f"their reconstructions (mean squared error {error:.4f})"
    )

    set_seed(args.seed + 1)
    latents = encode(pipe.vae, videos)
    names, directions = list(COLOURS), list(MOTIONS)

    def prompt(i: int, rng: random.Random) -> str:
        return random_prompt(digits[i].item(), names[colours[i]], directions[motions[i]], rng)

    train_to_follow_prompts(pipe, latents, prompt, args)

    call = {"height": VIDEO_SIZE, "width": VIDEO_SIZE, "num_frames": NUM_FRAMES, "max_sequence_length": MAX_TOKENS}
    call |= {"guidance_scale": args.guidance_scale}
    pipe = save(pipe, example_prompts(), args)
    (args.output_dir / "pipeline_arguments.json").write_text(json.dumps(call) + "\n", encoding="utf-8")
    call |= {"num_inference_steps": args.num_sample_steps}
    draw_videos(pipe, args.seed, **call).quantize(256).save(args.output_dir / "samples.png", optimize=True)
    digit_share, colour_share, motion_share = motion_accuracy(pipe, seed=args.seed, **call)
    print(
        f"Saved {args.output_dir}; of 400 samples' frames {digit_share:.1%} show their digit and {colour_share:.1%} "
        f"their colour, and {motion_share:.1%} of the samples move as asked"
    )


if __name__ == "__main__":
    main()
