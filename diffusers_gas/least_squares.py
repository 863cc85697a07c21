"""Least squares, for the fits of solvers and of plans: distances as weighted sums of squares, and Marquardt's damped step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .utils.tensors import FLOAT64


LossKind: TypeAlias = Literal["l2", "l1", "mixed"]

# Damping, relative to the diagonal of the normal equations: the start, which is the least, the most, and the factors after a
# step that succeeded at once and after one that failed. Less damping would follow directions that few samples do not determine.
# At the most, steps are too short to matter.
DAMPING_START, DAMPING_MAX = 1e-2, 1e4
DAMPING_DECREASE, DAMPING_INCREASE = 5, 8
MOST_TRIALS = 1 + math.floor(math.log(DAMPING_MAX / DAMPING_START, DAMPING_INCREASE))


def check_finite(*values: Tensor | float) -> None:
    """Raises a `ValueError` if values that were made of samples are not finite."""
    if not all(value.isfinite().all() if isinstance(value, Tensor) else math.isfinite(value) for value in values):
        raise ValueError(
            "The teacher's or the student's samples are not finite. Check the pipeline's output in this precision: some "
            "networks overflow in float16."
        )


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
    if not normal.any():  # as nothing was finite yet: there is nowhere to go
        return torch.zeros_like(gradient), current, damping
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


@dataclass(frozen=True)
class Loss:
    """A distance of final samples: the mean over all entries of rho(r), r = features(student) - features(teacher).

    Args:
        kind (`"l2"`, `"l1"` or `"mixed"`): rho(r) = r^2, |r|, or r^2 + delta |r|.
        delta (`float`, defaults to 0.1): In units of the features.
        features (`Callable`, *optional*): Maps a batch of final samples to a tensor whose first dimension is the batch. A
            perceptual distance is an L2 distance of features. By default the samples themselves are compared.

    Raises:
        ValueError: If `kind` is unknown.
    """

    kind: LossKind = "l2"
    delta: float = 0.1
    features: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(LossKind):
            raise ValueError(f"`kind` must be 'l2', 'l1' or 'mixed', got '{self.kind}'.")

    def embed(self, states: Tensor) -> Tensor:
        """Features of final samples, of shape `(batch_size, num_features)`."""
        return (states if self.features is None else self.features(states)).flatten(1)

    def residual(self, student: Tensor, teacher: Tensor) -> Tensor:
        """r, of shape `(batch_size, num_features)`."""
        return self.embed(student) - self.embed(teacher)

    def value(self, residual: Tensor) -> Tensor:
        """rho(r) of each entry."""
        if self.kind == "l2":
            return residual.square()
        size = residual.abs()
        return size if self.kind == "l1" else residual.square() + self.delta * size

    def weight(self, residual: Tensor) -> Tensor:
        """rho'(r) / (2 r). Least squares with these weights has the gradient of the loss (iterative reweighting)."""
        if self.kind == "l2":
            return torch.ones_like(residual)
        size = residual.abs()
        # Entries with nearly no error would get nearly infinite weights, which make steps too short. Errors count as at least a share of
        # their mean: beside the squared error a large one.
        least = 1e-3 if self.kind == "l1" else 0.3
        weight = 0.5 / size.clamp_min(least * size.mean() + torch.finfo(size.dtype).tiny)
        return weight if self.kind == "l1" else 1 + self.delta * weight
