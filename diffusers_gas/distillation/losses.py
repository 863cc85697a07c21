"""Distances between the final samples of student and teacher, as weighted least squares."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor


LossKind: TypeAlias = Literal["l2", "l1", "huber", "mixed"]


@dataclass(frozen=True)
class Loss:
    """Mean over all entries of rho(r), r = features(student) - features(teacher).

    Args:
        kind (`"l2"`, `"l1"`, `"huber"` or `"mixed"`): rho(r) = r^2, |r|, Huber's, which is r^2 below `delta` and linear above, or
            r^2 + delta |r|.
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
            raise ValueError(f"`kind` must be 'l2', 'l1', 'huber' or 'mixed', got '{self.kind}'.")

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
        if self.kind == "l1":
            return size
        if self.kind == "mixed":
            return residual.square() + self.delta * size
        return torch.where(size < self.delta, residual.square(), self.delta * (2 * size - self.delta))

    def weight(self, residual: Tensor) -> Tensor:
        """rho'(r) / (2 r). Least squares with these weights has the gradient of the loss (iterative reweighting)."""
        if self.kind == "l2":
            return torch.ones_like(residual)
        size = residual.abs()
        if self.kind in ("l1", "mixed"):
            # Entries with nearly no error would get nearly infinite weights, which make steps too short. Errors count as at least a share of
            # their mean: beside the squared error a large one.
            least = 1e-3 if self.kind == "l1" else 0.3
            weight = 0.5 / size.clamp_min(least * size.mean() + torch.finfo(size.dtype).tiny)
            return weight if self.kind == "l1" else 1 + self.delta * weight
        return (self.delta / size.clamp_min(self.delta)).clamp_max(1)
