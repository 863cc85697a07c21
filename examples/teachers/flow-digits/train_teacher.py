"""Trains the small flow-matching text-to-image model that ships in this folder: a Stable Diffusion 3 of coloured digits.

The data are those of ../digit_prompts.py and the autoencoder is text-to-digits', so nothing is downloaded. The result is
a pipeline folder with half-precision weights, to be loaded with `StableDiffusion3Pipeline.from_pretrained(output_dir)`,
its prompts.txt and a picture of its samples. The shipped teacher was made with the defaults:

    OMP_NUM_THREADS=1 python examples/teachers/flow-digits/train_teacher.py --output_dir my_teacher

Ctrl-C ends the training early. The teacher is saved as it is then.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel


sys.path.append(str(Path(__file__).resolve().parents[1]))
from digit_prompts import finish, make_tokenizer, prompt_words, train_to_follow_prompts
from teacher_training import add_arguments, make_word_tokenizer, text_encoder_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small Stable Diffusion 3 of coloured digits.")
    add_arguments(parser, output_dir="flow_digits_teacher", max_train_steps=6_000)
    parser.add_argument(
        "--autoencoder",
        default=str(Path(__file__).resolve().parents[1] / "text-to-digits"),
        help="Pipeline folder whose autoencoder is used.",
    )
    return parser.parse_args()


def build_pipeline(autoencoder: str) -> StableDiffusion3Pipeline:
    """The components of Stable Diffusion 3, for latents of 4x8x8 in 16 patches of 2x2.

    The pipeline cannot be loaded without a third text encoder. It has no layers and embeds single words.
    """
    tokenizer = make_tokenizer()
    text_config = text_encoder_config(tokenizer, hidden_size=32)
    tokenizer_3 = make_word_tokenizer(prompt_words(), max_length=256)
    heads, head_dim = 4, 16
    vae = AutoencoderKL.from_pretrained(autoencoder, subfolder="vae")
    vae.register_to_config(_name_or_path=Path(autoencoder).name)  # saved configs have no local paths
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(
            T5Config(vocab_size=len(tokenizer_3), d_model=2 * text_config.hidden_size, num_layers=0, dropout_rate=0.0)
        ),
        tokenizer_3=tokenizer_3,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            caption_projection_dim=heads * head_dim,
            joint_attention_dim=2 * text_config.hidden_size,
            pooled_projection_dim=2 * text_config.projection_dim,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def random_length() -> int:
    """A random number of tokens for the third text encoder: 8, 16, 32, ..., 256. Small numbers are more frequent.

    The pipeline pads prompts to `max_sequence_length` tokens, by default 256, and computes with all of them. Eight tokens
    are enough for every prompt and ten times faster. A network that was trained with all lengths draws nearly the same with
    any of them.
    """
    lengths = 8 * 2 ** torch.arange(6)
    return lengths[torch.multinomial(1 / lengths, 1)].item()


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    device = Accelerator().device
    pipe = build_pipeline(args.autoencoder).to(device)

    def loss(latents: Tensor, prompts: list[str]) -> Tensor:
        noise = torch.randn_like(latents)
        sigmas = torch.randn(len(latents), device=device).sigmoid()  # logit-normal, as Stable Diffusion 3's
        prompt_embeds, _, pooled_prompt_embeds, _ = pipe.encode_prompt(
            prompts, None, None, device, do_classifier_free_guidance=False, max_sequence_length=random_length()
        )
        noisy_latents = torch.lerp(latents, noise, sigmas.view(-1, 1, 1, 1))
        timesteps = sigmas * pipe.scheduler.config.num_train_timesteps
        velocity = pipe.transformer(noisy_latents, prompt_embeds, pooled_prompt_embeds, timesteps).sample
        return functional.mse_loss(velocity, noise - latents)

    modules = {
        "the transformer": pipe.transformer,
        "its text encoders": torch.nn.ModuleList([pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]),
    }
    train_to_follow_prompts(modules, pipe.vae, loss, args)
    finish(pipe, pipe.scheduler, args, max_sequence_length=8)


if __name__ == "__main__":
    main()
