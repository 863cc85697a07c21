"""Solvers of mixed order: single-step (Euler, Heun) and multistep (DPM-Solver++ 2M, UniPC)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ..time_grids import check_choice, check_sigmas
from ..utils.tensors import FLOAT64
from .probability_flow import SIGMA_TIME, DenoiserRequests, ProbabilityFlow
from .stepping import (
    Churn,
    CurvatureSwitch,
    MultistepForm,
    StepTable,
    Watch,
    follow,
    multistep_table,
    single_step_table,
    step_weights,
)


OrderRule: TypeAlias = CurvatureSwitch | Sequence[float] | Tensor
"""A switch, or for each of N steps the weight in [0, 1] of the first-order candidate (1: first order, 0: second)."""


@dataclass
class Trajectory:
    """The result of a solver. N steps, batch of B; all states unscaled, x0 + sigma * noise."""

    sample: Tensor
    """Final state, shape `(B, ...)`."""
    weights: Tensor
    """Weight of the first-order candidate in each step, shape `(N,)`."""
    absolute_curvature: Tensor
    """Shape `(N, B)`; 0 where there is none, as at step 0 of a lagged proxy."""
    relative_curvature: Tensor
    """Shape `(N, B)`."""
    switch_index: int | None
    """First step at which the curvature had reached the threshold; None if it never did, and for fixed weights."""
    num_evaluations: int
    states: list[Tensor]
    """With `keep_states`: the state at the start of each step, then the final one. Otherwise empty."""


def adaptive_heun(
    x: Tensor,
    sigmas: Tensor,
    rule: OrderRule,
    *,
    alpha: float = 1.0,
    flow: ProbabilityFlow = SIGMA_TIME,
    churn: Churn | None = None,
    keep_states: bool = False,
) -> DenoiserRequests[Trajectory]:
    """Euler steps where the trajectory is straight, alpha-Heun steps where it bends, or a blend of both.

    The predictor of Heun is the Euler point, so that the next evaluation is at the same place for either order. A step to
    sigma = 0 is always Euler's. A switch at step k of N costs 2N - 1 - k evaluations.

    Source: SDM, arXiv 2602.12624, adaptive solver; alpha-Heun: EDM, arXiv 2206.00364, algorithm 3.

    Args:
        x (`Tensor` of shape `(B, ...)`): x0 + sigmas[0] * noise.
        sigmas (`Tensor` of shape `(N + 1,)`): Descending noise levels, the last may be 0.
        rule (`CurvatureSwitch` or `(N,)` weights): Order of each step. The decision is one for the whole batch.
        alpha (`float`): Position of the second evaluation within the step: 1 Heun, 2/3 Ralston, 1/2 midpoint.
        flow (`ProbabilityFlow`): Time and scaling in which steps are straight; tau is in units of 1 / its time.
        churn (`Churn`, *optional*): Add noise before steps.
        keep_states (`bool`): Return the state of every step, too.

    Returns:
        `Trajectory`.
    """
    levels = check_sigmas(sigmas)
    if not 0 < alpha <= 1:
        raise ValueError(f"`alpha` must be in (0, 1], got {alpha}; 1 is Heun, 1/2 the midpoint rule.")
    if _looks_ahead(rule) and (alpha != 1 or churn is not None):
        raise ValueError("A switch with `lagged=False` needs `alpha=1` and no churn; use `lagged=True`.")
    starts = levels[:-1] if churn is None else churn.growth(levels[:-1]) * levels[:-1]
    starts, ends = flow.inverse_sigma(starts), flow.inverse_sigma(levels[1:])
    make_table = partial(single_step_table, starts=starts, ends=ends, flow=flow, alpha=alpha)
    return (yield from _trajectory(x, levels, rule, make_table, 0, flow, churn, keep_states))


def euler(
    x: Tensor, sigmas: Tensor, *, flow: ProbabilityFlow = SIGMA_TIME, keep_states: bool = False
) -> DenoiserRequests[Trajectory]:
    """First order throughout; in sigma time the same as DDIM. N evaluations. Arguments as in [`adaptive_heun`]."""
    return adaptive_heun(x, sigmas, step_weights(len(sigmas) - 1, None), flow=flow, keep_states=keep_states)


def heun(
    x: Tensor, sigmas: Tensor, *, flow: ProbabilityFlow = SIGMA_TIME, keep_states: bool = False
) -> DenoiserRequests[Trajectory]:
    """EDM's second-order solver; 2N - 1 evaluations to sigma = 0. Arguments as in [`adaptive_heun`]."""
    return adaptive_heun(x, sigmas, step_weights(len(sigmas) - 1, 0), flow=flow, keep_states=keep_states)


def adaptive_dpmsolver(
    x: Tensor,
    sigmas: Tensor,
    rule: OrderRule,
    *,
    solver_type: MultistepForm = "midpoint",
    keep_states: bool = False,
) -> DenoiserRequests[Trajectory]:
    """DPM-Solver++ with first-order steps (DDIM) where the trajectory is straight, second-order (2M) where it bends.

    N evaluations for any orders. The first step, and a step to sigma = 0, have no second-order candidate and are of first
    order. The update is the same in every scaling of the ODE; curvature is measured in sigma time.

    Source: SDM's adaptive DPM-Solver++; DPM-Solver++(2M): arXiv 2211.01095, algorithm 2.

    Args:
        x (`Tensor` of shape `(B, ...)`): x0 + sigmas[0] * noise.
        sigmas (`Tensor` of shape `(N + 1,)`): Descending noise levels, the last may be 0.
        rule (`CurvatureSwitch` or `(N,)` weights): Order of each step.
        solver_type (`str`): `"midpoint"` or `"heun"`, as in Diffusers' `DPMSolverMultistepScheduler`.
        keep_states (`bool`): Return the state of every step, too.

    Returns:
        `Trajectory`.
    """
    check_choice("solver_type", solver_type, MultistepForm)
    return _multistep(x, sigmas, rule, keep_states, solver_type)


def adaptive_unipc(
    x: Tensor, sigmas: Tensor, rule: OrderRule, *, keep_states: bool = False
) -> DenoiserRequests[Trajectory]:
    """UniPC (B(h) = expm1(-h), data prediction) whose steps are first order, or second order with the corrector.

    With weight 0 throughout it is second-order UniPC. Curvature is measured in sigma time.

    Source: UniPC, arXiv 2302.04867, algorithms 5 and 7. SDM's code has UniPC as a baseline only.

    Arguments as in [`adaptive_dpmsolver`]; with `keep_states` the states are those before correction.
    """
    return _multistep(x, sigmas, rule, keep_states, corrected=True)


def _multistep(
    x: Tensor,
    sigmas: Tensor,
    rule: OrderRule,
    keep_states: bool,
    solver_type: MultistepForm = "midpoint",
    corrected: bool = False,
) -> DenoiserRequests[Trajectory]:
    levels = check_sigmas(sigmas)
    if _looks_ahead(rule):
        raise ValueError("A switch with `lagged=False` needs a single-step solver; use `lagged=True`.")
    make_table = partial(multistep_table, levels=levels, corrected=corrected, solver_type=solver_type)
    return (yield from _trajectory(x, levels, rule, make_table, 1, SIGMA_TIME, None, keep_states))


def _looks_ahead(rule: OrderRule) -> bool:
    return isinstance(rule, CurvatureSwitch) and not rule.lagged


def _trajectory(
    x: Tensor,
    levels: Tensor,
    rule: OrderRule,
    make_table: Callable[[Tensor], StepTable],
    earliest: int,
    flow: ProbabilityFlow,
    churn: Churn | None,
    keep_states: bool,
) -> DenoiserRequests[Trajectory]:
    n = len(levels) - 1
    switch = rule if isinstance(rule, CurvatureSwitch) else None
    weights = torch.ones(n, **FLOAT64) if switch else torch.as_tensor(rule, **FLOAT64)
    if weights.shape != (n,) or not ((weights >= 0) & (weights <= 1)).all():
        raise ValueError(f"{n} weights in [0, 1] are needed, one for each step, got {weights.tolist()}.")
    watch = Watch(switch, earliest, looks_ahead=_looks_ahead(rule))
    sample, table, states = yield from follow(x, levels[:-1], make_table, weights, watch, flow, churn, keep_states)
    none = x.new_zeros(2, len(x))
    absolute, relative = zip(*(watch.records.get(i, none) for i in range(n)))
    return Trajectory(
        sample,
        table.order_weights,
        torch.stack(absolute),
        torch.stack(relative),
        watch.switch_index,
        len(table.times),
        states,
    )
