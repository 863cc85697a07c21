"""A sampler as a table of numbers, the one rule that applies it, and the theory (DDIM, DPM-Solver++) that fills one.

Every deterministic sampler of this package is a [`SolverTable`]: the times of its states, the times that the network is told,
and the weights of one sum per step. Sampling, driving, differentiating and finite differences all apply it with [`History`].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

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
        self.terms: list[Tensor] = []
        """What the sums are of, x[0], D[0], D[1], ...; an empty tensor in the place of one that no later step needs."""

    @property
    def num_steps_begun(self) -> int:
        """How many data predictions have been made."""
        return max(0, len(self.terms) - 1)

    def after(self, num_steps: int) -> "History":
        """The history as it was after some steps, to go on from there in another way. Both share their tensors."""
        other = History(self.weights, self.prediction_weights, self.last_uses)
        other.terms = self.terms[: num_steps + 1]
        return other

    def step(self, state: Tensor, model_output: Tensor) -> Tensor:
        """The next state from the newest one and what the network returned for it."""
        self.predict(state, model_output)
        return self.update(state)

    def predict(self, state: Tensor, model_output: Tensor) -> Tensor:
        """First half of a step: the data prediction, in the precision of `state`."""
        if not self.terms:
            self.terms.append(state.clone())  # a pipeline may write into its tensor later on
        weights = (0.0, 1.0) if self.prediction_weights is None else self.prediction_weights[self.num_steps_begun]
        self.terms.append(weighted_sum(weights, [state, model_output]))
        return self.terms[-1]

    def update(self, state: Tensor) -> Tensor:
        """Second half of a step: the next state."""
        k = self.num_steps_begun - 1
        next_state = weighted_sum(self.weights[k], [state, *self.terms])
        if self.last_uses is not None:
            self.terms = [FORGOTTEN if last <= k else tensor for last, tensor in zip(self.last_uses, self.terms)]
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


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of every step of a sampling. `set_timesteps` computes them once, in float64 on the CPU.

    Attributes:
        noise_schedule: The forward process, with the shift of this sampling.
        timesteps (`Tensor` of shape `(n,)`): What the network is told, float32.
        evaluation_times (`Tensor` of shape `(n,)`): The same as times in the noise schedule, float64.
        evaluation_sigmas: Noise levels of the n evaluations as Diffusers has them. Some pipelines (Cosmos) tell these to their
            networks.
        sigmas: Likewise of the n + 1 states.
        alphas, noise_levels: alpha and sigma of the n + 1 states. A state at sigma = 0 has alpha = 1.
        input_scales: Factor of the state that the network is given, for each of n steps.
        weights, prediction_weights: Of the [`SolverTable`], as plain numbers or, to differentiate, as tensors.
        last_uses: See [`last_uses`]; `None` to differentiate.
    """

    noise_schedule: NoiseSchedule
    timesteps: Tensor
    evaluation_times: Tensor
    evaluation_sigmas: list[float]
    sigmas: list[float]
    alphas: list[float]
    noise_levels: list[float]
    input_scales: Tensor | list[float]
    weights: Weights
    prediction_weights: Weights
    last_uses: list[int] | None

    @classmethod
    def of(
        cls, table: SolverTable, noise_schedule: NoiseSchedule, prediction_type: str, differentiable: bool = False
    ) -> Self:
        """The numbers of a table for one kind of network."""
        at_zero = table.times.isnan()
        times = table.times.detach().where(~at_zero, 0.5)
        input_scales = noise_schedule.input_scale(table.evaluation_times)
        weights, prediction_weights = table.weights, table.prediction_weights(noise_schedule, prediction_type)
        rows = weights.tolist()
        return cls(
            noise_schedule,
            timesteps=noise_schedule.timestep(table.evaluation_times).float(),
            evaluation_times=table.evaluation_times.detach(),
            evaluation_sigmas=noise_schedule.diffusers_sigma(table.evaluation_times).tolist(),
            sigmas=noise_schedule.diffusers_sigma(times).where(~at_zero, noise_schedule.final_sigma).float().tolist(),
            alphas=noise_schedule.alpha(times).where(~at_zero, 1.0).tolist(),
            noise_levels=noise_schedule.sigma(times).where(~at_zero, 0.0).tolist(),
            input_scales=input_scales if differentiable else input_scales.tolist(),
            weights=weights if differentiable else rows,
            prediction_weights=prediction_weights if differentiable else prediction_weights.tolist(),
            last_uses=None if differentiable else last_uses(rows),
        )

    @cached_property
    def index_of(self) -> dict[float, int]:
        """The step of every timestep. Of equal ones it is the last, but for those of a whole sampling's first step.

        With second-order steps a timestep is the end of one step and the start of the next, where a sampling may begin.
        """
        timesteps = self.timesteps.tolist()
        return {**{timestep: k for k, timestep in enumerate(timesteps)}, timesteps[0]: 0}

    def index_of_truncated(self, timestep: float) -> int | None:
        """The step of the only timestep whose integer part this is: some pipelines truncate them."""
        found = [index for exact, index in self.index_of.items() if int(exact) == timestep]
        return found[0] if len(found) == 1 else None

    def levels_at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of the states of steps with these timesteps, and at other network times. The shapes are the same."""
        alphas, sigmas = self.noise_schedule.levels_at(timesteps)
        rows = [(timestep, self.alphas[k], self.noise_levels[k]) for timestep, k in self.index_of.items()]
        numbers = torch.tensor(rows, dtype=timesteps.dtype, device="cpu").to(timesteps.device, non_blocking=True)
        timesteps_of_steps, alphas_of_steps, sigmas_of_steps = numbers.unbind(1)
        same = timesteps[..., None] == timesteps_of_steps
        found, row = same.any(-1), same.long().argmax(-1)
        return alphas_of_steps[row].where(found, alphas), sigmas_of_steps[row].where(found, sigmas)

    def history(self) -> History:
        """A sampling by these numbers that has not begun."""
        return History(self.weights, self.prediction_weights, self.last_uses)


class ExponentialIntegrator:
    """Exponential integrators for every step from t_k to t_{k+1} (DPM-Solver++, arXiv 2211.01095).

    The third order is the published 3M. It gives the second difference half of its weight in Taylor's formula, and so
    converges with order 2 and a smaller constant than 2M.

    History items are counted from the newest. Step sizes appear as inverse ratios. Where alpha = 0 puts the oldest lambda at
    -inf, such a ratio is 0 and the step falls to a lower order, its limit, without NaN. Where sigma = 0 puts the last lambda
    at +inf, no higher order exists: the theory is of first order, and the differences are not scaled by the step size.

    Args:
        alpha, sigma, lambdas (`Tensor` of shape `(n + 1,)`): The noise schedule at the states, lambda = log(alpha / sigma).
    """

    def __init__(self, alpha: Tensor, sigma: Tensor, lambdas: Tensor):
        self.lambdas, self.alpha_next = lambdas, alpha[1:]
        self.h = self.lambdas[1:] - self.lambdas[:-1]
        self.sigma_ratio = sigma[1:] / sigma[:-1]
        self.data_scale = self.alpha_next * -torch.expm1(-self.h)  # -alpha_{k+1} phi_1(h), the first-order weight

    @classmethod
    def on_times(cls, noise_schedule: NoiseSchedule, times: Tensor) -> "ExponentialIntegrator":
        return cls(noise_schedule.alpha(times), noise_schedule.sigma(times), noise_schedule.lambda_(times))

    def differences(self, k: int, m: int) -> tuple[Tensor, Tensor]:
        """First and second divided differences at the newest of m >= 2 data predictions, as weights `(m,)` of them."""
        unit = torch.eye(3, m, **FLOAT64)
        newest_gap = self.lambdas[k] - self.lambdas[k - 1]
        first, h = unit[0] - unit[1], newest_gap
        if self.h[k].isfinite():
            h = self.h[k]
            first = h / newest_gap * first
        if m == 2:
            return first, torch.zeros(m, **FLOAT64)
        older = h / (self.lambdas[k - 1] - self.lambdas[k - 2]) * (unit[1] - unit[2])
        second = h / (self.lambdas[k] - self.lambdas[k - 2]) * (first - older)
        return first + newest_gap / h * second, second

    def theory_weights(self, k: int, order: int, m: int) -> Tensor:
        """Weights `(m,)` of the data predictions in DPM-Solver++ of an order <= m."""
        newest = torch.eye(1, m, **FLOAT64)[0]
        if order == 1 or not self.h[k].isfinite():
            return self.data_scale[k] * newest
        if order == 2:
            difference, _ = self.differences(k, 2)
            return self.data_scale[k] * (newest + nn.functional.pad(difference, (0, m - 2)) / 2)
        h = self.h[k]
        phi_2 = torch.expm1(-h) / h + 1
        phi_3 = phi_2 / h - 0.5
        first, second = self.differences(k, m)
        return self.data_scale[k] * newest + self.alpha_next[k] * (phi_2 * first - phi_3 * second)

    def correction_weights(self, k: int, c: Tensor) -> Tensor:
        """Weights `(m,)` of the data predictions that the coefficients c `(m,)` add, with the published signs.

        c_1 to c_3 act on the value and the divided differences, later coefficients on single predictions.
        """
        m = len(c)
        weights = torch.cat([-c[:1], torch.zeros(min(m, 3) - 1, **FLOAT64), c[3:]])
        if m == 1:
            return weights
        first, second = self.differences(k, m)
        return weights - c[1] * first if m == 2 else weights + c[1] * first - c[2] * second
