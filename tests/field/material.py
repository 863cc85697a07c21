"""Random images, videos, sounds and embeddings, always the same, that calls of the pipelines are given."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .sizes import LATENT, SIZE, WIDTH


FRAMES = 5
TOKENS = 16


def rows(seed: int, *shape: int) -> Tensor:
    """A random tensor."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 0, size: int = SIZE) -> Image.Image:
    """An image."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def other_picture() -> Image.Image:
    """Another image."""
    return picture(1)


def pictures() -> list[Image.Image]:
    """A list of one image."""
    return [picture(1)]


def examples() -> list[list[Image.Image | None]]:
    """A pair of images that shows a task, and a pair whose second image is to be made."""
    return [[picture(1), picture(2)], [picture(3), None]]


def half_mask() -> Image.Image:
    """A mask of the lower half of an image."""
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[SIZE // 2 :] = 255
    return Image.fromarray(mask)


def film() -> list[Image.Image]:
    """A video."""
    return [picture(seed) for seed in range(FRAMES)]


def large_film() -> list[Image.Image]:
    """A video of twice the size."""
    return [picture(seed, 2 * SIZE) for seed in range(FRAMES)]


def film_tensor() -> Tensor:
    """A video as a tensor."""
    return rows(9, 1, 3, FRAMES, SIZE, SIZE).sigmoid()


def film_mask() -> Tensor:
    """A mask of all pixels of a video."""
    return torch.ones(1, 1, FRAMES, SIZE, SIZE)


def frames() -> list[Tensor]:
    """The frames of a video as tensors."""
    return list(rows(7, FRAMES, 3, SIZE, SIZE))


def film_latents() -> Tensor:
    """Latents of a video."""
    return rows(8, 1, LATENT, FRAMES, SIZE // 2, SIZE // 2)


def short_film_latents() -> Tensor:
    """Latents of a short and small video."""
    return rows(8, 1, LATENT, 2, 3, 3)


def hint() -> Tensor:
    """An image that a network reduces to an eighth and joins with latents."""
    return rows(4, 1, 3, 4 * SIZE, 4 * SIZE)


def depth() -> Tensor:
    """A map of depths."""
    return rows(6, 1, SIZE, SIZE)


def poses() -> np.ndarray:
    """The poses of a camera that does not move."""
    return np.tile(np.eye(4, dtype=np.float32), (9, 1, 1))


def sound() -> Tensor:
    """A sound of two channels."""
    return rows(5, 1, 2, 16)


def embeddings() -> Tensor:
    """The states of a text encoder."""
    return rows(1, 1, TOKENS, WIDTH)


def other_embeddings() -> Tensor:
    """Other states of a text encoder."""
    return rows(2, 1, TOKENS, WIDTH)


def embedding() -> Tensor:
    """A vector for an image or a text."""
    return rows(3, 1, WIDTH)


def token_mask() -> Tensor:
    """A mask of all tokens."""
    return torch.ones(1, TOKENS, dtype=torch.bool)


def tokens() -> Tensor:
    """Numbers of discrete tokens."""
    return torch.arange(64)[None]


def nothing() -> None:
    """`None` as an argument, where that is not the default."""
