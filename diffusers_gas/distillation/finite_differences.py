"""Derivatives of a student's final state by finite differences of driven rollouts.

A step in terms of the network's outputs is `x[k+1] = w[k, 0] x[0] + sum_j w[k, 1 + j] output[j]`. A solver's
parameters act only through these weights and the evaluation times. A difference in a weight of step k needs the
evaluations after step k only, and at the last step no evaluation at all.
"""

from collections.abc import Generator
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from ..generalized_solver import GeneralizedSolver
from ..noise_schedules import NoiseSchedule
from ..pipelines.driving import Evaluation
from ..solver_table import History, SolverTable, weighted_sum
from ..utils.tensors import FLOAT64


# Sizes of finite differences of states, relative to the states, and of t. They are far above rounding on purpose. Networks are
# rough on small scales: a time embedding oscillates between its training times, which are a thousandth apart. The useful
# slope is the one over the distance of an optimization step. On the digits teacher, 4 steps reach a training loss of 0.0038
# in 8 iterations with these sizes, and 0.0081 with 1e-3.
STATE_DIFFERENCE = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}
TIME_DIFFERENCE = 1e-2

T = TypeVar("T")

StateRequests: TypeAlias = Generator[tuple[Tensor | None, float], Evaluation, T]


def table_of_outputs(solver: GeneralizedSolver, noise_schedule: NoiseSchedule, prediction_type: str) -> SolverTable:
    """A solver's table for one kind of network in terms of the network's outputs, differentiable."""
    table = solver.table(noise_schedule)
    return table.of_outputs(table.prediction_weights(noise_schedule, prediction_type))


def num_evaluations(num_inference_steps: int, from_start: bool = False) -> int:
    """Network evaluations that `sensitivities` spends on a batch."""
    n = num_inference_steps
    if from_start:
        return n + n * sum(k + 2 for k in range(n - 1)) + n * n
    return n + sum((k + 2) * (n - 1 - k) + n - k for k in range(n))


def sensitivities(
    table: SolverTable, mixing: Tensor | None = None, from_start: bool = False
) -> StateRequests[tuple[Tensor, list[tuple[Tensor, float]], Tensor]]:
    """The final state and final states beside it, from which the derivatives of all weights and times follow.

    The weights are varied along an orthonormal basis of initial state and outputs. At the first steps these nearly
    coincide. Differences along each of them would lose in rounding the one direction in which they differ.

    Args:
        table: In terms of the network's outputs; see [`table_of_outputs`].
        mixing: The basis of an earlier batch. Derivatives of several batches add up in one basis only.
        from_start: Whether every neighbour is sampled from the start, for a network whose outputs depend on its earlier evaluations
            (feature caches).

    Returns:
        `tuple`: the final state, pairs of a neighbouring final state and the size of the variation that led to it, in the
        order of [`orthonormal_parameters`], and the basis: column b of `mixing` `(n + 1, n + 1)`, upper triangular, holds
        the weights of its b-th vector.
    """
    times, history = table.evaluation_times.tolist(), History(table.weights.tolist())
    states: list[Tensor] = []
    for t in times:
        answer = yield states[-1] if states else None, t
        if not states:
            states.append(answer.sample.to(torch.promote_types(answer.sample.dtype, torch.float32)))
        states.append(history.step(states[-1], answer.model_output))
    basis, n = history.terms, len(times)
    if mixing is None:
        mixing = _orthonormalize(basis)
    directions = [weighted_sum(mixing[: b + 1, b].tolist(), basis) for b in range(n + 1)]
    size = STATE_DIFFERENCE[answer.model_output.dtype]
    neighbours = []
    for k in range(n):
        for direction in directions[: k + 2]:
            before = states[: k + 1] if from_start else []
            final = yield from _finish(history.after(k + 1), states[k + 1] + size * direction, times, before)
            neighbours.append((final, size))
    for k in range(n):
        # Towards the inside: a network was not trained beyond t = 1 or t = 0.
        size = -TIME_DIFFERENCE if times[k] > 2 * TIME_DIFFERENCE else TIME_DIFFERENCE
        changed = [*times[:k], times[k] + size, *times[k + 1 :]]
        final = yield from _finish(history.after(k), states[k], changed, states[:k] if from_start else [])
        neighbours.append((final, size))
    return states[-1], neighbours, mixing


def _finish(history: History, state: Tensor, times: list[float], before: list[Tensor]) -> StateRequests[Tensor]:
    """The final state from a state in the middle, before which the network is evaluated again at the states `before`."""
    begun, n = history.num_steps_begun, len(times)
    for k, earlier in enumerate(before if begun < n else []):
        yield earlier if k else None, times[k]
    for k in range(begun, n):
        answer = yield state if k else None, times[k]
        state = history.step(state, answer.model_output)
    return state


def orthonormal_parameters(
    solver: GeneralizedSolver, noise_schedule: NoiseSchedule, prediction_type: str, mixing: Tensor
) -> Tensor:
    """A solver's weights in the basis of [`sensitivities`], row by row, and its evaluation times; differentiable."""
    table, unmixing = table_of_outputs(solver, noise_schedule, prediction_type), torch.linalg.inv(mixing)
    rows = [unmixing[: k + 2, : k + 2] @ row[1 : k + 3] for k, row in enumerate(table.weights)]
    return torch.cat([*rows, table.evaluation_times])


def _orthonormalize(basis: list[Tensor]) -> Tensor:
    """Upper triangular float64 weights that make tensors orthonormal (in the mean over all entries)."""
    vectors = torch.stack([tensor.flatten().cpu().double() for tensor in basis])
    gram = vectors @ vectors.T / vectors.shape[1]
    gram += 1e-12 * gram.diagonal().max() * torch.eye(len(gram), **FLOAT64)
    return torch.linalg.inv(torch.linalg.cholesky(gram)).T
