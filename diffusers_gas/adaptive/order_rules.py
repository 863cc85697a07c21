"""Which steps are of second order: fixed blends of first and second order, or a switch on the measured curvature."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from .curvature import absolute_curvature, relative_curvature


@dataclass(frozen=True)
class CurvatureSwitch:
    """First order until the batch mean of the curvature reaches `tau`, second order from that step on, for good.

    Source: SDM, arXiv 2602.12624, the adaptive solver with `step` switching; tau 1e-4 to 1e-3 there, for data of
    standard deviation 0.5 and sigma up to 80. The unit of kappa is 1 / sigma: data c times as wide need tau / c.

    Args:
        tau (`float`): Threshold. Not positive: second order wherever possible; infinite: first order throughout.
        relative (`bool`): Compare `relative_curvature` with it (else `absolute_curvature`).
        lagged (`bool`): Measure over the step before, as published. Otherwise over the step to be taken, through the
            evaluation at its Euler end point, which the next step needs anyway; single-step solvers with alpha = 1
            only.
    """

    tau: float
    relative: bool = True
    lagged: bool = True

    def __post_init__(self) -> None:
        if math.isnan(self.tau):
            raise ValueError("`tau` is NaN; give the curvature from which steps are second order.")


OrderRule: TypeAlias = CurvatureSwitch | Sequence[float] | Tensor
"""A switch, or for each of N steps the weight in [0, 1] of the first-order candidate (1: first order, 0: second)."""


def step_weights(num_steps: int, switch_index: int | None) -> Tensor:
    """First order before step `switch_index`, second from there on; None: always first. Shape `(num_steps,)`."""
    index = num_steps if switch_index is None else switch_index
    return (torch.arange(num_steps) < index).double()


def linear_weights(num_steps: int) -> Tensor:
    """From 1 at the first step to 0 at the last, linearly. Shape `(num_steps,)`."""
    return torch.linspace(1, 0, num_steps, dtype=torch.float64)


def cosine_weights(num_steps: int) -> Tensor:
    """From 1 at the first step to 0 at the last, along half a cosine. Shape `(num_steps,)`."""
    return 0.5 * (1 + (math.pi * torch.linspace(0, 1, num_steps, dtype=torch.float64)).cos())


@dataclass
class Trajectory:
    """What a solver returns. N steps, batch of B; all states unscaled, x0 + sigma * noise."""

    sample: Tensor
    """Final state, shape `(B, ...)`."""
    weights: Tensor
    """Weight of the first-order candidate that each step was taken with, shape `(N,)`."""
    absolute_curvature: Tensor
    """Shape `(N, B)`; 0 where there is none, as at step 0 of a lagged proxy."""
    relative_curvature: Tensor
    """Shape `(N, B)`."""
    switch_index: int | None
    """First step at which the curvature had reached the threshold; None if it never did, and for fixed weights."""
    num_evaluations: int
    states: list[Tensor]
    """With `keep_states`: the state from which each step was taken, then the final one. Otherwise empty."""


@dataclass
class OrderSelector:
    """Collects the curvature along one trajectory and decides each step's first-order weight."""

    rule: OrderRule
    num_steps: int
    switch_index: int | None = None
    weights: list[float] = field(default_factory=list)
    absolute: list[Tensor] = field(default_factory=list)
    relative: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.rule, CurvatureSwitch):
            return
        self.rule = torch.as_tensor(self.rule, dtype=torch.float64).tolist()
        if len(self.rule) != self.num_steps or not all(0 <= weight <= 1 for weight in self.rule):
            raise ValueError(f"{self.num_steps} weights in [0, 1] are needed, one for each step, got {self.rule}.")

    @property
    def looks_ahead(self) -> bool:
        return isinstance(self.rule, CurvatureSwitch) and not self.rule.lagged

    def observe(self, drift: Tensor, earlier_drift: Tensor | None, dt: float) -> None:
        """Record the curvature between two drifts; `earlier_drift` is None where there is no earlier one."""
        if earlier_drift is None:
            zeros = drift.new_zeros(len(drift))
            self.absolute.append(zeros)
            self.relative.append(zeros)
        else:
            self.absolute.append(absolute_curvature(drift, earlier_drift, dt))
            self.relative.append(relative_curvature(drift, earlier_drift, dt))

    def first_order_weight(self, step: int) -> float:
        """Weight of `step` by the rule, from the curvature observed last."""
        if not isinstance(self.rule, CurvatureSwitch):
            return self.rule[step]
        if self.switch_index is None:
            curvature = self.relative[-1] if self.rule.relative else self.absolute[-1]
            if curvature.mean().item() >= self.rule.tau:
                self.switch_index = step
        return 1.0 if self.switch_index is None else 0.0

    def trajectory(self, sample: Tensor, num_evaluations: int, states: list[Tensor]) -> Trajectory:
        return Trajectory(
            sample,
            torch.tensor(self.weights, dtype=torch.float64),
            torch.stack(self.absolute),
            torch.stack(self.relative),
            self.switch_index,
            num_evaluations,
            states,
        )
