"""What a loss compares: final states, decoded images, or features of either."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..pipelines.decoding import StateDecoder
from .lpips import LPIPS


FEATURES = ("states", "pixels", "lpips", "pyramid")


def make_features(
    name: Literal["states", "pixels", "lpips", "pyramid"],
    pipe: DiffusionPipeline,
    *,
    weights: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    size: int | None = 224,
    pipeline_inputs: Mapping[str, Any] | None = None,
) -> Callable[[Tensor], Tensor] | None:
    """The `features` of a [`Loss`].

    Args:
        name: What to compare:

            - `"states"`: the final states, latents or pixels; `None` is returned.
            - `"pixels"`: decoded images, not clamped.
            - `"lpips"`: LPIPS of decoded images, for which the loss must be `"l2"`.
            - `"pyramid"`: all scales of the states equally, see [`laplacian_pyramid`]; needs no decoding and no weights.
        pipe: The pipeline whose final states are compared.
        weights, size: Of [`LPIPS`]: `files` of its weights, and the size to resize images to.
        pipeline_inputs: Arguments of the pipeline's call for one sample; a latent pipeline needs them, see
            [`StateDecoder`].

    Raises:
        ValueError: If there are no such features, or the pipeline or LPIPS's weights do not allow them.
    """
    if name not in FEATURES:
        raise ValueError(f"`name` must be one of {FEATURES}, got '{name}'.")
    if name == "states":
        return None
    decoder = StateDecoder(pipe, **(pipeline_inputs or {}))
    if name == "pixels":
        return decoder
    if name == "pyramid":
        return lambda states: laplacian_pyramid(decoder.latents(states))
    lpips = LPIPS.from_pretrained(weights, size)

    def perceptual(states: Tensor) -> Tensor:
        images = decoder(states)
        return lpips.to(images.device)(images)

    return perceptual


def laplacian_pyramid(x: Tensor) -> Tensor:
    """All scales of signals, images or volumes with equal weights: linear features, nothing lost.

    Every level is the difference between the last one, smoothed with binomial weights (1, 2, 1) / 4 and halved (Burt and
    Adelson 1983), and that interpolated back; the last level is what remains as a single entry. A distance of single
    entries, by contrast, hardly sees the large scales, which have few degrees of freedom.

    Args:
        x: `(batch_size, channels, ...)` with any number of further dimensions.

    Returns:
        `(batch_size, num_features)`; the mean of their squares is the mean over levels of the levels' mean squares.
    """
    levels = []
    while max(x.shape[2:], default=1) > 1:
        halved = _halve(x)
        levels.append((x - _double(halved, x.shape)).flatten(1))
        x = halved
    levels.append(x.flatten(1))
    total = sum(level.shape[1] for level in levels)
    return torch.cat([level * math.sqrt(total / (len(levels) * level.shape[1])) for level in levels], dim=1)


def _halve(x: Tensor) -> Tensor:
    for dim in range(2, x.ndim):
        last = x.shape[dim] - 1
        middle = torch.arange(0, last + 1, 2, device=x.device)
        before, after = (middle - 1).clamp_min(0), (middle + 1).clamp_max(last)
        before, middle, after = (x.index_select(dim, index) for index in (before, middle, after))
        x = (before + 2 * middle + after) / 4
    return x


def _double(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Linear interpolation to `shape` from every second entry."""
    for dim in range(2, x.ndim):
        position = torch.arange(shape[dim], device=x.device)
        before, after = position // 2, ((position + 1) // 2).clamp_max(x.shape[dim] - 1)
        x = (x.index_select(dim, before) + x.index_select(dim, after)) / 2
    return x
