"""Rollouts of a student on a driven pipeline, and their derivatives by finite differences.

A sampler on model outputs alone, `x[k+1] = w[k, 0] x[0] + sum_j w[k, 1 + j] output[j]`, is its weights and evaluation
times: everything that a solver's parameters do, they do through these. A difference in a weight of step k needs the
steps after k only, and at the last step no evaluation at all.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..generalized_solver import GeneralizedSolver
from ..noise_schedules import NoiseSchedule, data_prediction_weights
from ..pipelines.driving import Evaluation
from ..schedulers.scheduling_utils import weighted_sum


# Sizes of finite differences of states, relative to their own, and of t. Far above rounding, on purpose: networks are
# rough on small scales (between its training times, a thousandth apart, a time embedding oscillates), and the slope that
# leads downhill is that over the distance of a step. On the digits teacher 4 steps get to a training loss of 0.0038 in 8
# iterations with these, and to 0.0081 with differences of 1e-3.
STATE_DIFFERENCE = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}
TIME_DIFFERENCE = 1e-2

Requests = Generator[tuple[Tensor | None, float], Evaluation, Tensor]


@dataclass(frozen=True)
class Sampler:
    """A solver for one kind of network, as plain numbers.

    Attributes:
        weights: `weights[k][0]` of the initial state, `weights[k][1 + j]` of the output at step j <= k.
        times: Evaluation time of every step.
    """

    weights: list[list[float]]
    times: list[float]

    @property
    def num_inference_steps(self) -> int:
        return len(self.times)

    @staticmethod
    def cost(num_inference_steps: int) -> int:
        """Network evaluations that `sensitivities` spends on a batch."""
        n = num_inference_steps
        return n + sum((k + 2) * (n - 1 - k) + n - k for k in range(n))

    @classmethod
    def of(cls, solver: GeneralizedSolver, noise_schedule: NoiseSchedule, prediction_type: str) -> "Sampler":
        """The sampler that a solver is."""
        with torch.no_grad():
            weights, times = _weights_and_times(solver, noise_schedule, prediction_type)
        return cls([row[: k + 2].tolist() for k, row in enumerate(weights)], times.tolist())

    def rollout(self) -> Requests:
        """The final state from the pipeline's own noise."""
        states, _ = yield from self._states_and_outputs()
        return states[-1]

    def sensitivities(
        self, mixing: Tensor | None = None
    ) -> Generator[tuple[Tensor | None, float], Evaluation, tuple[Tensor, list[tuple[Tensor, float]], Tensor]]:
        """The final state and final states beside it, from which the derivatives of all weights and times follow.

        The weights are varied along an orthonormal basis of initial state and outputs: at the first steps these nearly
        coincide, and differences along each of them would drown the direction that matters in rounding.

        Args:
            mixing: The basis of an earlier batch; derivatives of several batches add up in one basis only.

        Returns:
            `tuple`: the final state, pairs of a neighbouring final state and the size of the variation that led to it, in
            the order of [`orthonormal_parameters`], and the basis: column b of `mixing` `(n + 1, n + 1)`, upper
            triangular, holds the weights of its b-th vector.
        """
        n = self.num_inference_steps
        states, basis = yield from self._states_and_outputs()
        if mixing is None:
            mixing = _orthonormalize(basis)
        directions = [weighted_sum(list(zip(mixing[: b + 1, b].tolist(), basis))) for b in range(n + 1)]
        size = STATE_DIFFERENCE[basis[1].dtype]
        neighbours = []
        for k in range(n):
            for direction in directions[: k + 2]:
                state = states[k + 1] + size * direction
                neighbours.append(((yield from self._finish(state, basis[: k + 2], self.times)), size))
        for k in range(n):
            times = list(self.times)
            # Towards the inside: a network was not trained beyond t = 1 or t = 0.
            size = -TIME_DIFFERENCE if times[k] > 2 * TIME_DIFFERENCE else TIME_DIFFERENCE
            times[k] += size
            neighbours.append(((yield from self._finish(states[k], basis[: k + 1], times)), size))
        return states[-1], neighbours, mixing

    def _states_and_outputs(self):
        evaluation = yield None, self.times[0]
        states = [evaluation.sample.to(torch.promote_types(evaluation.sample.dtype, torch.float32))]
        basis = [states[0], evaluation.model_output]
        for k in range(self.num_inference_steps):
            if k > 0:
                evaluation = yield states[k], self.times[k]
                basis.append(evaluation.model_output)
            states.append(self._next_state(basis))
        return states, basis

    def _finish(self, state: Tensor, basis: list[Tensor], times: list[float]) -> Requests:
        """The final state from a state after which `basis` holds the initial state and the outputs so far."""
        basis = list(basis)
        while len(basis) <= self.num_inference_steps:
            evaluation = yield state, times[len(basis) - 1]
            basis.append(evaluation.model_output)
            state = self._next_state(basis)
        return state

    def _next_state(self, basis: list[Tensor]) -> Tensor:
        return weighted_sum(list(zip(self.weights[len(basis) - 2], basis)))


def orthonormal_parameters(
    solver: GeneralizedSolver, noise_schedule: NoiseSchedule, prediction_type: str, mixing: Tensor
) -> Tensor:
    """A solver's weights in the basis of `Sampler.sensitivities`, row by row, and its evaluation times; differentiable."""
    weights, times = _weights_and_times(solver, noise_schedule, prediction_type)
    unmixing = torch.linalg.inv(mixing)
    rows = [unmixing[: k + 2, : k + 2] @ row[: k + 2] for k, row in enumerate(weights)]
    return torch.cat([*rows, times])


def _weights_and_times(
    solver: GeneralizedSolver, noise_schedule: NoiseSchedule, prediction_type: str
) -> tuple[Tensor, Tensor]:
    table = solver.table(noise_schedule)
    p, q = data_prediction_weights(prediction_type, noise_schedule, table.times[:-1], table.evaluation_times)
    return table.in_model_outputs(p, q), table.evaluation_times


def _orthonormalize(basis: list[Tensor]) -> Tensor:
    """Upper triangular float64 weights that make tensors orthonormal (in the mean over all entries)."""
    vectors = torch.stack([tensor.flatten().cpu().double() for tensor in basis])
    gram = vectors @ vectors.T / vectors.shape[1]
    gram += 1e-12 * gram.diagonal().max() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.inv(torch.linalg.cholesky(gram)).T
