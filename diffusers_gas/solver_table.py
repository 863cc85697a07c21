"""A sampler as a table of numbers, and the one rule that applies it.

Every deterministic sampler of this package is a [`SolverTable`]: the times of its states, the times that the network is told,
and the weights of one sum per step. Sampling, driving, differentiating and finite differences all apply it with [`History`].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .noise_schedules import NoiseSchedule, data_prediction_weights
from .utils.tensors import FLOAT32, FLOAT64


Weights: TypeAlias = Tensor | Sequence[Sequence[float]]
"""A row of weights for every step: plain numbers to sample with, or a tensor to differentiate."""

FORGOTTEN = torch.empty(0, **FLOAT32)

# A bound on the memory that a number of steps can ask for: a table has its square of weights.
MOST_STEPS = 1000


@dataclass(frozen=True)
class SolverTable:
    """The sampler `x[k+1] = w[k, 0] x[k] + w[k, 1] x[0] + sum_j w[k, 2 + j] D[j]` for steps k = 0 .. n-1.

    x[0] is the initial noise and D[j] the data (x0) prediction at step j <= k. The newest state x[k] has a weight of its own
    because a pipeline may change it between two steps (inpainting). All tensors are float64.

    Attributes:
        times (`Tensor` of shape `(n + 1,)`): Time of every state in the noise schedule, descending. The last is NaN for a
            sampler that ends at sigma = 0, a noise level that most noise schedules do not have.
        evaluation_times (`Tensor` of shape `(n,)`): Time that the network is told at every step, one that it can be told.
        weights (`Tensor` of shape `(n, n + 2)`): w. Weights of predictions that do not exist yet are 0.
    """

    times: Tensor
    evaluation_times: Tensor
    weights: Tensor

    def prediction_weights(self, noise_schedule: NoiseSchedule, prediction_type: str) -> Tensor:
        """Weights (p, q) of `D[k] = p[k] x[k] + q[k] output[k]`, shape `(n, 2)`; see [`data_prediction_weights`].

        Raises:
            ValueError: If the network's output does not determine the data at one of the steps.
        """
        pairs = data_prediction_weights(prediction_type, noise_schedule, self.times[:-1], self.evaluation_times)
        weights = torch.stack(pairs, dim=1)
        if not weights.isfinite().all():
            raise ValueError(
                f"A `prediction_type` of '{prediction_type}' does not determine the data where the noise schedule has "
                f"alpha = 0, as it has at t = {self.times[0].item()}."
            )
        return weights

    def of_outputs(self, prediction_weights: Tensor) -> "SolverTable":
        """The same sampler with the network's outputs in the place of the data predictions, and no weight on x[k].

        A step is then a sum of x[0] and the outputs alone, so that its derivatives by the weights are x[0] and the outputs.

        Args:
            prediction_weights (`Tensor` of shape `(n, 2)`): Those of this table.
        """
        n = len(self.weights)
        unit = torch.eye(n + 1, **FLOAT64)
        state, predictions = unit[0], []  # in terms of x[0], output[0], ..., output[n-1]
        rows = []
        for k, (p, q) in enumerate(prediction_weights):
            predictions.append(p * state + q * unit[k + 1])
            newest, first, *others = self.weights[k]
            state = newest * state + first * unit[0] + sum(w * D for w, D in zip(others, predictions))
            rows.append(torch.cat([state.new_zeros(1), state]))
        return SolverTable(self.times, self.evaluation_times, torch.stack(rows))


class History:
    """What a sampling remembers: its first state and its data predictions. `step` is the one rule that applies a table.

    Args:
        weights (`(n, n + 2)`): Of the table; plain numbers, or a tensor whose gradients are wanted.
        prediction_weights (`(n, 2)`): Likewise. `None` stands for the network's outputs themselves, p = 0 and q = 1.
        last_uses (`Sequence[int]`, *optional*): See [`last_uses`]; what no later step needs is then forgotten.
    """

    def __init__(
        self, weights: Weights, prediction_weights: Weights | None = None, last_uses: Sequence[int] | None = None
    ):
        self.weights, self.prediction_weights, self.last_uses = weights, prediction_weights, last_uses
        self.known: list[Tensor] = []
        """x[0], D[0], D[1], ...; an empty tensor in the place of one that no later step needs."""

    @property
    def num_steps_begun(self) -> int:
        """How many data predictions have been made."""
        return max(0, len(self.known) - 1)

    def after(self, num_steps: int) -> "History":
        """The history as it was after some steps, to go on from there in another way. Both share their tensors."""
        other = History(self.weights, self.prediction_weights, self.last_uses)
        other.known = self.known[: num_steps + 1]
        return other

    def step(self, state: Tensor, model_output: Tensor) -> Tensor:
        """The next state from the newest one and what the network returned for it."""
        self.predict(state, model_output)
        return self.update(state)

    def predict(self, state: Tensor, model_output: Tensor) -> Tensor:
        """First half of a step: the data prediction, in the precision of `state`."""
        if not self.known:
            self.known.append(state.clone())  # a pipeline may write into its tensor later on
        weights = (0.0, 1.0) if self.prediction_weights is None else self.prediction_weights[self.num_steps_begun]
        self.known.append(weighted_sum(weights, [state, model_output]))
        return self.known[-1]

    def update(self, state: Tensor) -> Tensor:
        """Second half of a step: the next state."""
        k = self.num_steps_begun - 1
        next_state = weighted_sum(self.weights[k], [state, *self.known])
        if self.last_uses is not None:
            self.known = [FORGOTTEN if last <= k else tensor for last, tensor in zip(self.last_uses, self.known)]
        return next_state


def last_uses(weights: Sequence[Sequence[float]]) -> list[int]:
    """The last step that needs x[0], D[0], D[1], ... by a table's weights.

    Every prediction is kept for one step after its own, because a decision on the order of that step may need it.
    """
    last_step = len(weights) - 1
    uses = [[k for k, row in enumerate(weights) if row[1 + column] != 0] for column in range(len(weights) + 1)]
    return [max([min(column, last_step), *steps]) for column, steps in enumerate(uses)]


def weighted_sum(weights: Tensor | Sequence[float | Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """`sum(weight * tensor)` as a new tensor in the precision of the first tensor.

    Tensors whose weight is the number 0 are not read. Weights beyond the last tensor are not used.
    """
    dtype, total = tensors[0].dtype, None
    for weight, tensor in zip(weights, tensors):
        if isinstance(weight, Tensor):
            # Devices may lack float64, also for gradients.
            term = weight.to(dtype) * tensor.to(dtype)
            total = term if total is None else total + term
        elif weight != 0:
            total = weight * tensor.to(dtype) if total is None else total.add_(tensor, alpha=weight)
    return torch.zeros_like(tensors[0]) if total is None else total
