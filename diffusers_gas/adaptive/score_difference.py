"""The cumulative score-difference ("cos") schedule, a baseline of SDM that needs data samples."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .evaluation import Algorithm
from .grids import check_sigmas
from .resampling import interpolate_sigmas, levels_at_equal_increments


def score_difference_costs(
    batches: Iterable[Tensor], probe_sigmas: Tensor, *, draw_noise: Callable[[Tensor], Tensor] = torch.randn_like
) -> Algorithm[Tensor]:
    """Cumulative cost of moving between neighbouring noise levels, averaged over batches of data.

    The cost of an interval is sigma_high sqrt(mean ||score(y; sigma_high) - score(y; sigma_low)||^2) with
    y = data + sigma_high * noise and score = (D - y) / sigma^2. Two evaluations for each interval and batch.

    Source: the COS baseline of SDM, arXiv 2602.12624.

    Args:
        batches (iterable of `Tensor` of shape `(B, ...)`): Data as the network knows it, usually in [-1, 1].
        probe_sigmas (`Tensor` of shape `(K + 1,)`): Noise levels, descending and positive.
        draw_noise (`Callable`): Unit normal noise like its argument; called for each batch from the lowest interval
            up.

    Returns:
        `Tensor` of shape `(K + 1,)`: cost accumulated from the lowest level, for the levels in **ascending** order;
        the first is 0.
    """
    ascending = check_sigmas(probe_sigmas).flip(0)
    if ascending[0] == 0:
        raise ValueError("The score exists at positive noise levels only; drop the 0 from `probe_sigmas`.")
    totals = []
    for data in batches:
        costs = []
        for low, high in pairwise(ascending):
            y = data + high * draw_noise(data)
            score_high = ((yield y, high) - y) / high**2
            score_low = ((yield y, low) - y) / low**2
            squares = (score_high - score_low).flatten(1).square().sum(1)
            costs.append(high * squares.mean().double().cpu().sqrt())
        totals.append(torch.stack(costs))
    if not totals:
        raise ValueError("`batches` is empty; at least one batch of data is needed.")
    costs = torch.stack(totals).mean(0)
    return torch.cat([costs.new_zeros(1), costs.cumsum(0)])


def score_difference_schedule(
    probe_sigmas: Tensor,
    cumulative_cost: Tensor,
    num_steps: int,
    *,
    spacing: Literal["edm", "loglinear"] = "edm",
    published: bool = False,
) -> Tensor:
    """Place `num_steps` noise levels at equal increments of the cumulative score-difference cost.

    Args:
        probe_sigmas (`Tensor` of shape `(K + 1,)`): As passed to `score_difference_costs`, descending.
        cumulative_cost (`Tensor` of shape `(K + 1,)`): What it returned, for ascending noise levels.
        num_steps (`int`): Number of non-zero noise levels, at least 2.
        spacing (`str`): Interpolate sigma^(1/7) (`"edm"`) or log sigma (`"loglinear"`).
        published (`bool`): Leave the lowest level out of the interpolation, as SDM's code does, and extrapolate below
            the second-lowest.

    Returns:
        `Tensor` of shape `(num_steps + 1,)`: float64, descending, ending with 0.
    """
    ascending = check_sigmas(probe_sigmas).flip(0)
    if not published:
        reversed_cost = cumulative_cost[-1] - cumulative_cost.flip(0)
        return levels_at_equal_increments(reversed_cost, ascending.flip(0), num_steps, spacing)
    at = torch.linspace(0, 1, num_steps, dtype=torch.float64) * cumulative_cost[-1]
    levels = interpolate_sigmas(cumulative_cost[1:], ascending[1:], at, spacing).flip(0)
    levels[0], levels[-1] = max(levels[0], ascending[-1]), min(levels[-1], ascending[0])
    return torch.cat([levels, levels.new_zeros(1)])
