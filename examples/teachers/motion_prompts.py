"""The video teacher's additions to digit_prompts.py: moving digits, prompts with a motion, and their evaluation.

In nine frames of 32x32 pixels, a drawing, enlarged to 22x22 pixels, crosses the middle of the picture at a constant speed.
"""

import random
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from digit_prompts import COLOURS, IMAGE_SIZE, TEMPLATES, Judge, make_prompt, prompt_words
from digit_prompts import example_prompts as still_prompts
from digit_prompts import random_prompt as random_still_prompt
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional


MOTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}  # x, and y downwards
NUM_FRAMES = 9
VIDEO_SIZE = 32
DRAWING_SIZE = 22


def add_motion(prompt: str, motion: str | None) -> str:
    """A prompt with the motion of its digit."""
    return prompt if motion is None else f"{prompt} moving {motion}"


def example_prompts() -> list[str]:
    """The fifty prompts of digit_prompts.py with motions, except for every fifth."""
    return [add_motion(prompt, [None, *MOTIONS][(i + i // 5) % 5]) for i, prompt in enumerate(still_prompts())]


def random_prompt(digit: int, colour: str, motion: str, rng: random.Random) -> str:
    """A training prompt. One in ten is empty, for guidance; one in four of the others has no motion."""
    prompt = random_still_prompt(digit, colour, rng)
    return add_motion(prompt, motion if prompt and rng.random() < 0.75 else None)


def motion_prompt_words() -> list[str]:
    """All words of the prompts."""
    return sorted({*prompt_words(), "moving", *MOTIONS})


def film(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Makes videos in which images move across a larger black picture.

    Args:
        images: Of shape `(batch_size, 3, 16, 16)` in [-1, 1].
        generator: Random numbers for directions, speeds and places.

    Returns:
        `(Tensor, Tensor)`: videos of shape `(batch_size, 3, 9, 32, 32)` and their positions in `MOTIONS`.
    """
    count = len(images)
    motions = torch.randint(len(MOTIONS), (count,), generator=generator)
    reach = torch.rand(count, 1, 1, generator=generator) * 0.04 + 0.28
    middle = torch.rand(count, 1, 2, generator=generator) * 0.1 - 0.05
    times = torch.linspace(-1, 1, NUM_FRAMES).view(1, -1, 1)
    places = middle + times * reach * torch.tensor(list(MOTIONS.values()))[motions].unsqueeze(1)
    frames = _window(
        (images + 1).repeat_interleave(NUM_FRAMES, 0),
        -VIDEO_SIZE / DRAWING_SIZE * places.flatten(0, 1),
        VIDEO_SIZE,
        VIDEO_SIZE / DRAWING_SIZE,
    )
    return frames.unflatten(0, (count, NUM_FRAMES)).transpose(1, 2) - 1, motions


def _window(images: Tensor, centres: Tensor, size: int, scale: float) -> Tensor:
    """Cuts out squares of `size` pixels around `centres`, of shape `(batch_size, 2)` in [-1, 1]. Outside the images is zero."""
    theta = torch.cat([scale * torch.eye(2).expand(len(images), 2, 2), centres.unsqueeze(2)], 2)
    grid = functional.affine_grid(theta, [*images.shape[:2], size, size], False)
    return functional.grid_sample(images, grid, align_corners=False)


def _centre_of_mass(drawings: Tensor) -> Tensor:
    """The centres of mass of drawings of shape `(batch_size, 1, size, size)`: x and y in [-1, 1], of shape `(batch_size, 2)`."""
    size = drawings.shape[-1]
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    mass = drawings.sum((1, 2, 3)).clamp(min=1e-6)
    return torch.stack([(drawings.sum((1, 2)) @ axis) / mass, (drawings.sum((1, 3)) @ axis) / mass], 1)


class MotionJudge(Judge):
    """Recognizes the digit and colour of every frame, in a cut-out around the centre of mass, and the motion."""

    @staticmethod
    def _features(drawings: Tensor) -> np.ndarray:
        shown = min(DRAWING_SIZE / drawings.shape[-1], 1.0)  # the judge learns from drawings without surroundings
        return Judge._features(_window(drawings, _centre_of_mass(drawings), IMAGE_SIZE, shown))

    def __call__(self, videos: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns digits and positions in `COLOURS` by frame, and positions in `MOTIONS`.

        Args:
            videos: Videos of shape `(batch_size, 9, 3, 32, 32)` in [0, 1].
        """
        videos = videos.detach().float().cpu()
        digits, colours = super().__call__(videos.flatten(0, 1))
        ends = [_centre_of_mass(videos[:, frame].amax(1, keepdim=True)) for frame in (0, -1)]
        motions = ((ends[1] - ends[0]) @ torch.tensor(list(MOTIONS.values())).T).argmax(1)
        return digits.reshape(videos.shape[:2]), colours.reshape(videos.shape[:2]), motions.numpy()


def motion_accuracy(
    pipe: DiffusionPipeline, batches: int = 4, seed: int = 0, **call: Any
) -> tuple[float, float, float]:
    """Shares of frames that show the digit and the colour of their prompts, and of samples that show the motion.

    Args:
        pipe: The teacher.
        batches: Number of batches of a hundred samples. Each has every digit and colour twice, in all motions and templates.
        seed: Seed of the noise.
        call: Further arguments of the pipeline.
    """
    judge, generator, right = MotionJudge(), torch.Generator().manual_seed(seed), []
    wanted = [(digit, colour, numeral) for digit in range(10) for colour in COLOURS for numeral in (False, True)]
    names, colour_names = list(MOTIONS), np.array(list(COLOURS))
    for batch in range(batches):
        asked = [names[(i + i // 10 + batch) % 4] for i in range(len(wanted))]
        prompts = [
            add_motion(make_prompt(digit, colour, TEMPLATES[(i + batch) % 5], numeral), motion)
            for i, ((digit, colour, numeral), motion) in enumerate(zip(wanted, asked))
        ]
        digits, colours, motions = judge(pipe(prompts, generator=generator, output_type="pt", **call).frames)
        right.append(
            (
                np.mean(digits == np.array([digit for digit, _, _ in wanted])[:, None]),
                np.mean(colour_names[colours] == np.array([colour for _, colour, _ in wanted])[:, None]),
                np.mean(np.array(names)[motions] == asked),
            )
        )
    digit_accuracy, colour_accuracy, motion_share = np.mean(right, axis=0)
    return float(digit_accuracy), float(colour_accuracy), float(motion_share)


def draw_videos(pipe: DiffusionPipeline, seed: int, **call: Any) -> Image.Image:
    """Draws a row of frames for each of ten prompts, labelled with the prompt."""
    side, left = 48, 250
    prompts = [
        add_motion(
            make_prompt(digit, list(COLOURS)[digit % 5], TEMPLATES[digit // 2], False), list(MOTIONS)[digit % 4]
        )
        for digit in range(10)
    ]
    videos = pipe(prompts, generator=torch.Generator().manual_seed(seed), output_type="pil", **call).frames
    picture = Image.new("RGB", (left + NUM_FRAMES * side, len(prompts) * side), "#202020")
    pen = ImageDraw.Draw(picture)
    for row, (prompt, frames) in enumerate(zip(prompts, videos)):
        pen.text((6, (row + 0.5) * side), prompt, anchor="lm")
        for column, frame in enumerate(frames):
            frame = frame.resize((side - 2, side - 2), Image.Resampling.NEAREST)
            picture.paste(frame, (left + column * side + 1, row * side + 1))
    return picture
