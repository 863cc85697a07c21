"""Shared parts of the teachers that draw digits as prompts say: coloured digits, prompts and evaluation.

The data are the 1797 grey 8x8 images of `sklearn.datasets.load_digits`, turned and shifted a little, drawn at 16x16 in
one of five colours. Nothing is downloaded: even the tokenizer's vocabulary is made from the prompts.
"""

import argparse
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from teacher_training import encode, fit, make_byte_pair_tokenizer, save
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer


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
    """A tokenizer with one token for every word of the prompts."""
    return make_byte_pair_tokenizer(prompt_words(), MAX_TOKENS)


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
