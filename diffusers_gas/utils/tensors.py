"""Precision and place of the package's own mathematics, whatever the process has as its default dtype and device; tensors of files.

Every tensor that is made by the package says its device, and its dtype unless it is of integers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


FLOAT64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
"""Of numbers that are computed with: times, noise levels, coefficients."""

FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Of what programs read of a scheduler, and of new weights."""


@contextmanager
def cpu_by_default() -> Iterator[None]:
    """Inside, or in a function that is decorated with this, tensors of other packages that do not say their device are on the CPU."""
    with torch.device("cpu"):
        yield


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a `ValueError` that names what is missing, unexpected or of another shape."""
    missing, unexpected = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unexpected:
        raise ValueError(f"missing tensors {missing}, unexpected tensors {unexpected}.")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"'{name}' should be of shape {shape}, got {tuple(tensors[name].shape)}.")
