"""Reads and writes the image files of a folder."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ...utils.files import replacing


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def image_paths(folder: str | os.PathLike) -> list[Path]:
    """Paths of the images in a folder and in the folders below it, sorted.

    Raises:
        ValueError: If there are none.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}).")
    return paths


def read_images(paths: Sequence[Path]) -> Tensor:
    """Images of shape `(num_images, 3, height, width)` in [0, 1].

    Raises:
        ValueError: If an image cannot be read, or if images differ in size. They are not resized here, because distances
            between images depend on how they were resized.
    """
    images = []
    for path in paths:
        try:
            images.append(np.asarray(Image.open(path).convert("RGB")))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an image ({error}).") from error
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"The images beside {paths[0]} have sizes {sorted(sizes)}: resize all to that of the samples."
        )
    return torch.from_numpy(np.stack(images)).movedim(-1, 1).float() / 255


def save_image(image: Tensor, path: Path) -> None:
    """Writes an image of shape `(channels, height, width)` in [0, 1] as a PNG file, complete or not at all."""
    (picture,) = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image[None]))
    with replacing(path) as partial:
        picture.save(partial, format="PNG")
