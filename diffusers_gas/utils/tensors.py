"""Precision and place of the package's own mathematics, whatever the process has as its default dtype and device.

Every tensor that is made by the package says its device, and its dtype unless it is of integers.
"""

from typing import Any

import torch


FLOAT64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
"""Of numbers that are computed with: times, noise levels, coefficients."""

FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Of what programs read of a scheduler, and of new weights."""
