"""Shared parts of the teachers that follow prompts: coloured digits, prompts, training and evaluation.

The data are the 1797 grey 8x8 images of `sklearn.datasets.load_digits`, turned and shifted a little, drawn at 16x16 in
one of five colours. Nothing is downloaded: even the tokenizer's vocabulary is made from the prompts.
"""

import argparse
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Tokenizer


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {  # the strongest channel is 1, so that it shows the drawing in every colour
    "white": (1.0, 1.0, 1.0),
    "red": (1.0, 0.2, 0.2),
    "yellow": (1.0, 0.9, 0.1),
    "green": (0.2, 1.0, 0.3),
    "blue": (0.2, 0.4, 1.0),
}
TEMPLATES = (
    "{colour} {digit}",
    "a handwritten {colour} {digit}",
    "the {colour} digit {digit}",
    "the number {digit} in {colour}",
    "a drawing of the {colour} {digit}",
)
MAX_TOKENS = 12
IMAGE_SIZE = 16


def make_prompt(digit: int, colour: str | None, template: str, numeral: bool) -> str:
    """A prompt: a template with a digit, in words or as a numeral, and with or without a colour."""
    if colour is None:
        template = template.replace(" in {colour}", "").replace("{colour} ", "")
    return template.format(digit=digit if numeral else NAMES[digit], colour=colour)


def example_prompts() -> list[str]:
    """Fifty prompts: each digit with every template, with most colours, and without any."""
    return [
        make_prompt(i % 10, [None, *COLOURS][(i + i // 10) % 6], TEMPLATES[(i + i // 10) % 5], i // 10 % 2 == 1)
        for i in range(50)
    ]


def random_prompt(digit: int, colour: str, rng: random.Random) -> str:
    """A training prompt: empty one time in ten, for guidance, and without the colour one time in four."""
    if rng.random() < 0.1:
        return ""
    return make_prompt(digit, colour if rng.random() < 0.75 else None, rng.choice(TEMPLATES), rng.random() < 0.5)


def prompt_words() -> list[str]:
    """All words of the prompts."""
    parts = (*TEMPLATES, *COLOURS, *NAMES, *map(str, range(10)))
    return sorted({word for part in parts for word in part.split() if "{" not in word})


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, with merges that make one token of every word of the prompts.

    The trainer of Tokenizers breaks ties at random. Here the same prompts always give the same tokens.
    """
    words = prompt_words()
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
    return CLIPTokenizer(vocab, merges, model_max_length=MAX_TOKENS)


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
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def draw_digits(copies: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws each digit `copies` times, turned, scaled and shifted a little.

    Returns:
        `(Tensor, Tensor)`: drawings of shape `(1797 * copies, 1, 16, 16)` in [0, 1] and the digits that they show.
    """
    generator = torch.Generator().manual_seed(seed)
    data = load_digits()
    small = torch.from_numpy(data.images).float().unsqueeze(1).repeat(copies, 1, 1, 1) / 16

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(small), generator=generator) * (high - low) + low

    angle, zoom = uniform(-math.pi / 18, math.pi / 18), uniform(1.05, 1.2)
    rows = [zoom * angle.cos(), -zoom * angle.sin(), uniform(-0.1, 0.1)]
    rows += [zoom * angle.sin(), zoom * angle.cos(), uniform(-0.1, 0.1)]
    grid = functional.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), [len(small), 1, IMAGE_SIZE, IMAGE_SIZE], False)
    drawings = functional.grid_sample(small, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    return drawings, torch.from_numpy(data.target).repeat(copies)


def paint(drawings: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Paints drawings in random colours on black.

    Returns:
        `(Tensor, Tensor)`: images of shape `(batch_size, 3, 16, 16)` in [-1, 1] and the indices of their colours.
    """
    colours = torch.randint(len(COLOURS), (len(drawings),), generator=torch.Generator().manual_seed(seed))
    return drawings * torch.tensor(list(COLOURS.values()))[colours][..., None, None] * 2 - 1, colours


class Judge:
    """Recognizes digits with a support vector machine on 8x8 drawings, and colours by the nearest one."""

    def __init__(self) -> None:
        drawings, digits = draw_digits(copies=2, seed=1)
        self.digits = SVC(C=10).fit(self._features(drawings), digits)

    @staticmethod
    def _features(drawings: Tensor) -> np.ndarray:
        return functional.avg_pool2d(drawings, 2).flatten(1).numpy()

    def __call__(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Digits, and positions in `COLOURS`, of images of shape `(batch_size, 3, 16, 16)` in [0, 1]."""
        images = images.detach().float().cpu()
        drawings = images.amax(1, keepdim=True)
        ink = functional.normalize((images * drawings).sum((2, 3)), p=torch.inf)
        colours = torch.cdist(ink, torch.tensor(list(COLOURS.values()))).argmin(1)
        return self.digits.predict(self._features(drawings)), colours.numpy()


def prompt_accuracy(pipe: DiffusionPipeline, batches: int = 4, seed: int = 0, **call: Any) -> tuple[float, float]:
    """Shares of samples that show the digit and the colour of their prompts, among `batches` times 100 samples.

    Args:
        pipe: The teacher.
        batches: Number of batches. Each has every digit and colour once in words and once as a numeral, in all templates.
        seed: Seed of the noise.
        call: Further arguments of the pipeline.
    """
    judge, generator, right = Judge(), torch.Generator().manual_seed(seed), []
    wanted = [(digit, colour, numeral) for digit in range(10) for colour in COLOURS for numeral in (False, True)]
    for batch in range(batches):
        prompts = [make_prompt(*what[:2], TEMPLATES[(i + batch) % 5], what[2]) for i, what in enumerate(wanted)]
        digits, colours = judge(pipe(prompts, generator=generator, output_type="pt", **call).images)
        right.append(
            (
                np.mean(digits == [digit for digit, _, _ in wanted]),
                np.mean(np.array(list(COLOURS))[colours] == [colour for _, colour, _ in wanted]),
            )
        )
    digit_accuracy, colour_accuracy = np.mean(right, axis=0)
    return float(digit_accuracy), float(colour_accuracy)


def add_arguments(parser: argparse.ArgumentParser, output_dir: str, max_train_steps: int) -> None:
    """The arguments of all training scripts, with the defaults of one of them."""
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path(output_dir), help="Pipeline folder to write.")
    add("--max_train_steps", type=int, default=max_train_steps)
    add("--train_batch_size", type=int, default=64)
    add("--learning_rate", type=float, default=2e-3, help="Peak of the cosine schedule.")
    add("--lr_warmup_steps", type=int, default=200)
    add("--ema_decay", type=float, default=0.999)
    add("--num_sample_steps", type=int, default=50, help="Solver steps for samples.png and the accuracy.")
    add("--guidance_scale", type=float, default=4.0, help="For samples.png and the accuracy.")
    add("--seed", type=int, default=0)


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
) -> None:
    """Minimizes a loss with AdamW and a cosine schedule, and loads the moving average of the weights into the modules.

    Ctrl-C ends the training early and keeps its result so far.

    Args:
        modules: The trained modules by name.
        loss: From indices of samples to their mean loss.
        size: Number of samples.
        args: The script's arguments.
        steps: Number of steps.
        batch_size: Samples per step; the default is that of `args`.
    """
    batch_size = batch_size or args.train_batch_size
    parameters = [p for module in modules.values() for p in module.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-4)
    lr_scheduler = get_cosine_schedule_with_warmup(optimizer, args.lr_warmup_steps, steps)
    ema = EMAModel(parameters, decay=args.ema_decay)
    print(
        f"Training {', '.join(modules)}: {sum(p.numel() for p in parameters):,} parameters, {size:,} samples, "
        f"{steps:,} steps of {batch_size} on {parameters[0].device}"
    )
    losses: deque[float] = deque(maxlen=1000)
    progress = tqdm(range(steps), mininterval=1.0)
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
            progress.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", refresh=False)
    except KeyboardInterrupt:
        print("Interrupted: keeping what is learned so far.")
    ema.copy_to(parameters)
    for module in modules.values():
        module.eval()
    print(f"Mean loss of the last {len(losses)} steps: {sum(losses) / max(len(losses), 1):.4f}")


def autoencoder_loss(vae: ModelMixin, decode: Callable[[Tensor], Tensor], samples: Tensor, kl_weight: float) -> Tensor:
    """Squared error per pixel, plus a small weight times the Kullback-Leibler divergence per latent."""
    posterior = vae.encode(samples).latent_dist
    divergence = posterior.kl().sum() / posterior.mean.numel()
    return functional.mse_loss(decode(posterior.sample()), samples) + kl_weight * divergence


def train_to_follow_prompts(
    modules: dict[str, nn.Module],
    vae: AutoencoderKL,
    loss: Callable[[Tensor, list[str]], Tensor],
    args: argparse.Namespace,
) -> None:
    """Trains a network and its text encoders on the latents of coloured digits.

    Args:
        modules: The trained modules by name.
        vae: The autoencoder of the latents.
        loss: Mean loss of a batch of latents of shape `(batch_size, 4, 8, 8)` and its prompts.
        args: The script's arguments.
    """
    drawings, digits = draw_digits(copies=20, seed=args.seed)
    images, colours = paint(drawings, args.seed)
    latents, names, rng = encode(vae, images.to(vae.device)), list(COLOURS), random.Random(args.seed)

    def batch_loss(index: Tensor) -> Tensor:
        prompts = [random_prompt(digits[i].item(), names[colours[i]], rng) for i in index]
        return loss(latents[index], prompts)

    fit(modules, batch_loss, len(latents), args, args.max_train_steps)


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


def finish(pipe: DiffusionPipeline, sampler: SchedulerMixin, args: argparse.Namespace, **call: Any) -> None:
    """Saves a teacher of images, loads it again, draws samples.png and measures the accuracy.

    Args:
        pipe: The teacher.
        sampler: Scheduler for the samples.
        args: The script's arguments.
        call: Further arguments of the pipeline.
    """
    pipe = save(pipe, example_prompts(), args)
    pipe.scheduler = sampler
    call |= {"guidance_scale": args.guidance_scale, "num_inference_steps": args.num_sample_steps}
    draw_samples(pipe, args.seed, **call).save(args.output_dir / "samples.png", optimize=True)
    digits, colours = prompt_accuracy(pipe, seed=args.seed, **call)
    print(f"Saved {args.output_dir}; of 400 samples {digits:.1%} show their digit and {colours:.1%} their colour")


def draw_samples(pipe: DiffusionPipeline, seed: int, **call: Any) -> Image.Image:
    """Draws a row of the ten digits for every colour, labelled with their prompts."""
    side, left, top = 48, 190, 24
    picture = Image.new("RGB", (left + 10 * side, top + len(COLOURS) * side), "#202020")
    pen = ImageDraw.Draw(picture)
    generator = torch.Generator().manual_seed(seed)
    for column, name in enumerate(NAMES):
        pen.text((left + (column + 0.5) * side, 12), name, fill="white", anchor="mm")
    for row, (template, colour) in enumerate(zip(TEMPLATES, COLOURS)):
        pen.text((6, top + (row + 0.5) * side), template.format(colour=colour, digit="..."), anchor="lm")
        prompts = [make_prompt(digit, colour, template, False) for digit in range(10)]
        for column, image in enumerate(pipe(prompts, generator=generator, **call).images):
            image = image.resize((side - 2, side - 2), Image.Resampling.NEAREST)
            picture.paste(image, (left + column * side + 1, top + row * side + 1))
    return picture
