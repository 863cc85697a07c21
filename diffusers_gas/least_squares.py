"""Marquardt's damped Gauss-Newton step, for the fits of solvers and of plans."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .utils.tensors import FLOAT64


# Damping, relative to the diagonal of the normal equations: the start, which is the least, the most, and the factors after a
# step that succeeded at once and after one that failed. Less damping would follow directions that few samples do not determine.
# At the most, steps are too short to matter.
DAMPING_START, DAMPING_MAX = 1e-2, 1e4
DAMPING_DECREASE, DAMPING_INCREASE = 5, 8
MOST_TRIALS = 1 + math.floor(math.log(DAMPING_MAX / DAMPING_START, DAMPING_INCREASE))


def damped_step(
    normal: Tensor, gradient: Tensor, loss_of: Callable[[Tensor], float], current: float, damping: float
) -> tuple[Tensor, float, float]:
    """A step downhill of a sum of squares. The damping grows until a step succeeds.

    Args:
        normal (`Tensor` of shape `(K, K)`), gradient (`Tensor` of shape `(K,)`): J^T J and J^T r of residuals r; float64.
        loss_of: The loss after a step `(K,)`. Its last call is with the step that is returned, unless that is 0.
        current: The loss before it.
        damping: The first damping to try.

    Returns:
        `tuple`: the step, 0 if none succeeded, the loss after it, and the damping to begin the next one with.
    """
    # Marquardt's scaling. Parameters without any effect (unused entries) get a step of 0.
    diagonal = normal.diagonal()
    scale = diagonal.clamp_min(1e-12 * diagonal.max()).rsqrt()
    scaled = scale[:, None] * normal * scale
    first = damping
    while damping <= DAMPING_MAX:
        system = scaled + damping * torch.eye(len(scaled), **FLOAT64)
        step = -scale * torch.linalg.solve(system, scale * gradient)
        loss = loss_of(step)
        if loss < current:
            return step, loss, max(damping / DAMPING_DECREASE, DAMPING_START) if damping == first else damping
        damping *= DAMPING_INCREASE
    return torch.zeros_like(gradient), current, first * DAMPING_INCREASE
