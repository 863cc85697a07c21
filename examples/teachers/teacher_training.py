"""Shared parts of the teachers that follow prompts, whatever they draw: tokenizer, text encoder, training and saving."""

import argparse
import json
import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Tokenizer

from diffusers_gas.utils.files import load_state, save_state


TIMED_STEPS = 10  # before the duration is estimated


def make_byte_pair_tokenizer(words: list[str], max_length: int) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, with merges that make one token of every word.

    The trainer of Tokenizers breaks ties at random. Here the same words always give the same tokens.
    """
    alphabet = sorted({letter for word in words for letter in word})
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        pair = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(pair)
        for word in pieces:
            for i in range(len(word) - 2, -1, -1):
                if (*word[i : i + 2],) == pair:
                    word[i : i + 2] = ["".join(pair)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*special, *alphabet, *(f"{letter}</w>" for letter in alphabet), *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab, merges, model_max_length=max_length)


def make_word_tokenizer(words: list[str], max_length: int) -> T5Tokenizer:
    """A T5 tokenizer whose vocabulary is the given words."""
    tokens = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in words)]
    return T5Tokenizer([(token, 0.0) for token in tokens], extra_ids=0, model_max_length=max_length)


def text_encoder_config(tokenizer: CLIPTokenizer, hidden_size: int) -> CLIPTextConfig:
    """A CLIP text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        projection_dim=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def add_arguments(
    parser: argparse.ArgumentParser, output_dir: str, max_train_steps: int, learning_rate: float = 2e-3
) -> None:
    """The arguments of all training scripts, with the defaults of one of them."""
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path(output_dir), help="Pipeline folder to write.")
    add("--max_train_steps", type=int, default=max_train_steps)
    add("--train_batch_size", type=int, default=64)
    add("--learning_rate", type=float, default=learning_rate, help="Peak of the cosine schedule.")
    add("--lr_warmup_steps", type=int, default=200)
    add("--ema_decay", type=float, default=0.999)
    add("--num_sample_steps", type=int, default=50, help="Solver steps for samples.png and the accuracy.")
    add("--guidance_scale", type=float, default=4.0, help="For samples.png and the accuracy.")
    add("--seed", type=int, default=0)


def parse_with_checkpoints(parser: argparse.ArgumentParser, checkpointing_steps: int) -> argparse.Namespace:
    """Adds the arguments of trainings that can be resumed, with the default of one of them, and parses all."""
    add = parser.add_argument
    add("--checkpoint_dir", type=Path, help="The default is OUTPUT_DIR with the ending .checkpoints.")
    add("--checkpointing_steps", type=int, default=checkpointing_steps)
    args = parser.parse_args()
    args.checkpoint_dir = args.checkpoint_dir or args.output_dir.with_name(f"{args.output_dir.name}.checkpoints")
    if args.checkpointing_steps < 1:
        parser.error(f"--checkpointing_steps must be at least 1, got {args.checkpointing_steps}.")
    return args


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents of unit variance, drawn from the distribution of the encoder."""
    latents = torch.cat([vae.encode(batch).latent_dist.sample() for batch in images.split(256)])
    return latents * vae.config.scaling_factor


def fit(
    modules: dict[str, nn.Module],
    loss: Callable[[Tensor], Tensor],
    size: int,
    args: argparse.Namespace,
    steps: int,
    batch_size: int | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Minimizes a loss with AdamW and a cosine schedule, and loads the moving average of the weights into the modules.

    Ctrl-C ends the training early and keeps its result so far.

    Args:
        modules: The trained modules by name.
        loss: From indices of samples to their mean loss. Its random numbers must be those of PyTorch if it is to be resumed.
        size: Number of samples.
        args: The script's arguments.
        steps: Number of steps.
        batch_size: Samples per step; the default is that of `args`.
        checkpoint: The file that is written every `args.checkpointing_steps` steps and at the end. If it is there, the training
            goes on from it, as if it had not been killed.

    Raises:
        ValueError: If the checkpoint is that of a training with other settings.
    """
    batch_size = batch_size or args.train_batch_size
    parameters = [p for module in modules.values() for p in module.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-4)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, args.lr_warmup_steps, steps)
    ema = EMAModel(parameters, decay=args.ema_decay)
    parts = {**modules, "optimizer": optimizer, "lr_scheduler": lr_scheduler, "ema": ema}
    counts = {"steps": steps, "batch_size": batch_size, "samples": size, "parameters": [len(p) for p in parameters]}
    settings = {
        **counts,
        **{key: getattr(args, key) for key in ("learning_rate", "lr_warmup_steps", "ema_decay", "seed")},
    }
    losses: deque[float] = deque(maxlen=1000)
    done, ended = 0, False

    def save(ended: bool) -> None:
        if checkpoint is not None:
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"settings": json.dumps(settings), "random": torch.get_rng_state(), "losses": list(losses)}
            save_state({**state, "done": done, "ended": ended}, checkpoint)

    if checkpoint is not None and checkpoint.exists():
        state = load_state(checkpoint)
        if state["settings"] != json.dumps(settings):
            raise ValueError(
                f"{checkpoint} has a training with the settings {state['settings']}, this one has {json.dumps(settings)}. "
                "Give the same settings to go on with it, or another --checkpoint_dir."
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        ema.to(parameters[0].device)
        torch.set_rng_state(state["random"])
        losses.extend(state["losses"])
        done, ended = state["done"], state["ended"]
    print(
        f"Training {', '.join(modules)}: {sum(p.numel() for p in parameters):,} parameters, {size:,} samples, "
        f"{steps:,} steps of {batch_size} on {parameters[0].device}{f', {done:,} of them are done' if done else ''}"
    )
    progress = tqdm(range(done, steps if not ended else done), mininterval=1.0, initial=done, total=steps)
    begin, first = time.monotonic(), done
    try:
        for _ in progress:
            value = loss(torch.randint(size, (batch_size,)))
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            ema.step(parameters)
            losses.append(value.item())
            done += 1
            progress.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", refresh=False)
            if done == first + TIMED_STEPS:
                seconds = (time.monotonic() - begin) / TIMED_STEPS
                tqdm.write(f"{seconds:.2f} s a step: about {seconds * (steps - done) / 60:.0f} minutes")
            if checkpoint is not None and done % args.checkpointing_steps == 0:
                save(ended=False)
    except KeyboardInterrupt:
        print("Interrupted: keeping what is learned so far.")
    if not ended:
        save(ended=True)
    ema.copy_to(parameters)
    for module in modules.values():
        module.eval()
    print(f"Mean loss of the last {len(losses)} steps: {sum(losses) / max(len(losses), 1):.4f}")


def autoencoder_loss(
    vae: ModelMixin,
    decode: Callable[[Tensor], Tensor],
    samples: Tensor,
    kl_weight: float,
    distance: Callable[[Tensor, Tensor], Tensor] = functional.mse_loss,
) -> Tensor:
    """The distance per pixel, plus a small weight times the Kullback-Leibler divergence per latent."""
    posterior = vae.encode(samples).latent_dist
    divergence = posterior.kl().sum() / posterior.mean.numel()
    return distance(decode(posterior.sample()), samples) + kl_weight * divergence


def use_long_names(path: Path) -> None:
    """Renames the weights of a CLIP text encoder, because early releases of Transformers 5 ignore the short names."""
    tensors = load_file(path)
    save_file({f"text_model.{name}": tensor for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def save(pipe: DiffusionPipeline, prompts: list[str], args: argparse.Namespace) -> DiffusionPipeline:
    """Saves a teacher and its prompts, and loads it again.

    Args:
        pipe: The teacher.
        prompts: The prompts for prompts.txt.
        args: The script's arguments.
    """
    for component in pipe.components.values():
        if isinstance(component, ModelMixin):  # Transformers loads models in the precision of their files
            component.to(torch.float16)
    pipe.save_pretrained(args.output_dir)
    for component in pipe.components.values():
        if isinstance(component, CLIPTextModel):
            use_long_names(args.output_dir / "text_encoder" / "model.safetensors")
    (args.output_dir / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    pipe = DiffusionPipeline.from_pretrained(args.output_dir).to(pipe.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe
