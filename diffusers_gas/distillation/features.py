"""Features that a loss compares: the final samples, decoded images, or features of either."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..pipelines.decoding import StateDecoder
from .lpips import LPIPS


FeatureName: TypeAlias = Literal["states", "pixels", "lpips", "pyramid"]


def make_features(
    name: FeatureName,
    pipe: DiffusionPipeline,
    *,
    weights: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    size: int | None = 224,
    pipeline_inputs: Mapping[str, Any] | None = None,
) -> Callable[[Tensor], Tensor] | None:
    """The `features` of a [`Loss`]: a function of final samples, with the batch as the first dimension of both.

    Args:
        name: What to compare:

            - `"states"`: the final samples, latents or pixels. `None` is returned.
            - `"pixels"`: decoded images, not clamped.
            - `"lpips"`: LPIPS of decoded images. The loss must be `"l2"`.
            - `"pyramid"`: all scales of the final samples with equal weights, see [`laplacian_pyramid`]. It needs no decoding and
              no weights.
        pipe: The pipeline whose final samples are compared.
        weights, size: See `files` and `size` of [`LPIPS.from_pretrained`].
        pipeline_inputs: Arguments of the pipeline's call for one sample, which a latent pipeline needs; see [`StateDecoder`].

    Raises:
        ValueError: If there are no features of this name, if the pipeline's samples cannot be decoded, or if LPIPS's weights
            cannot be had.
    """
    if name not in get_args(FeatureName):
        raise ValueError(f"`name` must be one of {get_args(FeatureName)}, got '{name}'.")
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
    """All scales of signals, images or volumes with equal weights (Burt and Adelson, 1983).

    The signal is smoothed with binomial weights (1, 2, 1) / 4 and halved in size, until a single entry remains. A level is the
    signal of one size minus the interpolated signal of the next size, and the last level is the single entry. The features are
    linear and lose nothing. A distance of pixels, by contrast, hardly sees large scales, which have few degrees of freedom.

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
        middle = torch.arange(0, x.shape[dim], 2, device=x.device)
        before, after = (middle - 1).clamp_min(0), (middle + 1).clamp_max(x.shape[dim] - 1)
        x = (x.index_select(dim, before) + 2 * x.index_select(dim, middle) + x.index_select(dim, after)) / 4
    return x


def _double(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Linear interpolation to `shape` from every second entry."""
    for dim in range(2, x.ndim):
        position = torch.arange(shape[dim], device=x.device)
        before, after = position // 2, ((position + 1) // 2).clamp_max(x.shape[dim] - 1)
        x = (x.index_select(dim, before) + x.index_select(dim, after)) / 2
    return x
