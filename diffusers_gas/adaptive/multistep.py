"""Multistep solvers: first or second order from the same single evaluation a step."""

import math
from itertools import pairwise
from typing import Literal

from torch import Tensor

from .evaluation import Algorithm
from .grids import check_sigmas
from .order_rules import OrderRule, OrderSelector, Trajectory
from .probability_flow import SIGMA_TIME, Evaluation


SOLVER_TYPES = ("midpoint", "heun")


def adaptive_dpmsolver(
    x: Tensor,
    sigmas: Tensor,
    rule: OrderRule,
    *,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    keep_states: bool = False,
) -> Algorithm[Trajectory]:
    """DPM-Solver++ with first-order steps (DDIM) where the trajectory is straight, second-order (2M) where it bends.

    N evaluations whatever is decided. The first step, and a step to sigma = 0, have no second-order candidate and are
    not tested. The update is the same in every scaling of the ODE; curvature is measured in sigma time.

    Source: SDM, arXiv 2602.12624; DPM-Solver++(2M): arXiv 2211.01095, algorithm 2.

    Args:
        x (`Tensor` of shape `(B, ...)`): x0 + sigmas[0] * noise.
        sigmas (`Tensor` of shape `(N + 1,)`): Descending noise levels, the last may be 0.
        rule (`CurvatureSwitch` or `(N,)` weights): Order of each step. The decision is one for the whole batch.
        solver_type (`str`): `"midpoint"` or `"heun"`, as in Diffusers' `DPMSolverMultistepScheduler`.
        keep_states (`bool`): Return the state of every step, too.

    Returns:
        `Trajectory`.
    """
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"`solver_type` = {solver_type!r} is unknown; choose one of {', '.join(SOLVER_TYPES)}.")
    return _adaptive_multistep(x, sigmas, rule, solver_type, with_corrector=False, keep_states=keep_states)


def adaptive_unipc(x: Tensor, sigmas: Tensor, rule: OrderRule, *, keep_states: bool = False) -> Algorithm[Trajectory]:
    """UniPC (B(h) = expm1(-h), data prediction) whose steps are first order, or second order with the corrector.

    The second-order predictor is DPM-Solver++(2M); the corrector improves the step just taken with the evaluation at
    its end, so that there is still one evaluation a step. First-order steps are not corrected: while the trajectory is
    straight this is DDIM. With weight 0 throughout it is second-order UniPC. Curvature is measured in sigma time.

    Source: UniPC, arXiv 2302.04867, algorithms 5 and 7. SDM's code has UniPC as a baseline only.

    Arguments as in `adaptive_dpmsolver`; with `keep_states` the states are those before correction.
    """
    return _adaptive_multistep(x, sigmas, rule, "midpoint", with_corrector=True, keep_states=keep_states)


def _adaptive_multistep(
    x: Tensor, sigmas: Tensor, rule: OrderRule, solver_type: str, with_corrector: bool, keep_states: bool
) -> Algorithm[Trajectory]:
    levels = check_sigmas(sigmas).tolist()
    num_steps = len(levels) - 1
    selector = OrderSelector(rule, num_steps)
    if selector.looks_ahead:
        raise ValueError("A switch with `lagged=False` needs a single-step solver; use `lagged=True`.")
    history: list[Evaluation] = []  # the newest three, oldest first
    departure = x  # the state that the last step was taken from
    states: list[Tensor] = []

    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        if keep_states:
            states.append(x)
        here = yield from SIGMA_TIME.evaluate(x, sigma)
        history = [*history[-2:], here]
        last = history[-2] if i > 0 else None
        selector.observe(here.drift, last.drift if last else None, last.sigma - sigma if last else 0.0)
        if with_corrector and i > 1 and selector.weights[-1] < 1:
            x = x.lerp(_correct(departure, *history), 1 - selector.weights[-1])

        ratio = sigma_next / sigma
        departure = x
        x = ratio * x - (ratio - 1) * here.denoised
        weight = 1.0
        if last is not None and sigma_next > 0:
            weight = selector.first_order_weight(i)
        selector.weights.append(weight)
        if weight < 1:
            x = x + (1 - weight) * second_order_term(here, last, sigma_next, solver_type)

    if keep_states:
        states.append(x)
    return selector.trajectory(x, num_steps, states)


def second_order_term(here: Evaluation, last: Evaluation, sigma_next: float, solver_type: str = "midpoint") -> Tensor:
    """What DPM-Solver++(2M) adds to the first-order step; h and the earlier step are in log sigma, E = exp(-h) - 1."""
    h = math.log(here.sigma / sigma_next)
    expm1 = sigma_next / here.sigma - 1
    slope = (here.denoised - last.denoised) * (h / math.log(last.sigma / here.sigma))
    return (-0.5 * expm1 if solver_type == "midpoint" else expm1 / h + 1) * slope


def _correct(departure: Tensor, before: Evaluation, last: Evaluation, here: Evaluation) -> Tensor:
    """UniC-2: the step from `last` to `here`, taken again from `departure` with the evaluation at its end."""
    h = math.log(last.sigma / here.sigma)
    expm1 = here.sigma / last.sigma - 1
    r = math.log(last.sigma / before.sigma) / h
    phi_1 = -expm1 / h - 1
    b_1, b_2 = phi_1 / expm1, 2 * (-phi_1 / h - 0.5) / expm1
    weight_before = (b_1 - b_2) / (1 - r)
    weight_here = b_1 - weight_before
    slope = weight_before / r * (before.denoised - last.denoised) + weight_here * (here.denoised - last.denoised)
    return here.sigma / last.sigma * departure - expm1 * (last.denoised + slope)
