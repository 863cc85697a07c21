"""Noise levels at equal increments of a measured cost: N-step resampling, and the score-difference schedule."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..time_grids import check_choice, check_sigmas
from ..utils.tensors import FLOAT64
from .probability_flow import DenoiserRequests


Spacing: TypeAlias = Literal["edm", "loglinear"]


def resample_sigmas(
    sigmas: Tensor,
    eta: Tensor,
    num_steps: int,
    *,
    power: float = 0.5,
    q: float = 0.25,
    spacing: Spacing = "edm",
    append_zero: bool = True,
) -> Tensor:
    """Places `num_steps` noise levels at equal increments of the weighted error length eta^power (sigma_max / sigma)^q.

    Source: SDM, arXiv 2602.12624, N-step resampling; published power 0.5, q 0.1 or 0.25. The errors of resampled
    steps have no bound.

    Args:
        sigmas (`Tensor` of shape `(K + 1,)`): The measured list, descending, the last may be 0.
        eta (`Tensor` of shape `(K,)`): Error of each of its steps, not negative. That of a step to 0 is not used.
        num_steps (`int`): Number of non-zero noise levels, at least 2; of steps, once 0 is appended.
        power (`float`): Exponent of the error.
        q (`float`): A positive exponent moves noise levels towards low noise.
        spacing (`str`): Interpolate sigma^(1/7) (`"edm"`, for any rho of the measured list) or log sigma (`"loglinear"`).
        append_zero (`bool`): End the list with 0.

    Returns:
        `Tensor` of shape `(num_steps + 1,)`, or `(num_steps,)` without the 0: float64, descending, with the ends of
        the measured list exactly.
    """
    path, eta = check_sigmas(sigmas), torch.as_tensor(eta, **FLOAT64)
    if eta.shape != (len(path) - 1,) or not (eta.isfinite() & (eta >= 0)).all():
        raise ValueError(
            f"{len(path)} noise levels need {len(path) - 1} finite errors that are not negative, got {eta.tolist()}."
        )
    if path[-1] == 0:
        path, eta = path[:-1], eta[:-1]
    if len(path) < 2 or not eta.any():
        raise ValueError(
            "There is nothing to redistribute: at least one step between positive noise levels must have an error."
        )
    lengths = eta**power * (path[0] / path[1:]) ** q
    # A step without any error still needs some length, or two noise levels would have the same position.
    lengths = lengths.clamp(min=1e-12 * lengths.sum())
    positions = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return _levels_at_equal_increments(positions, path, num_steps, spacing, append_zero)


def score_difference_costs(
    batches: Iterable[Tensor], probe_sigmas: Tensor, *, draw_noise: Callable[[Tensor], Tensor] = torch.randn_like
) -> DenoiserRequests[Tensor]:
    """Cumulative cost of moving between neighbouring noise levels, averaged over batches of data.

    The cost of an interval is sigma_high sqrt(mean ||score(y; sigma_high) - score(y; sigma_low)||^2) with
    y = data + sigma_high * noise and score = (D - y) / sigma^2. Two evaluations for each interval and batch.

    Source: the COS baseline of SDM, arXiv 2602.12624.

    Args:
        batches (iterable of `Tensor` of shape `(B, ...)`): Data as the network knows it, usually in [-1, 1].
        probe_sigmas (`Tensor` of shape `(K + 1,)`): Noise levels, descending and positive.
        draw_noise (`Callable`): Unit normal noise like its argument; called for each batch from the lowest interval
            upwards.

    Returns:
        `Tensor` of shape `(K + 1,)`: costs accumulated from the lowest level, for the levels in **ascending** order;
        the first is 0.
    """
    ascending = check_sigmas(probe_sigmas).flip(0)
    if ascending[0] == 0:
        raise ValueError("The score exists at positive noise levels only; drop the 0 from `probe_sigmas`.")
    totals = []
    for data in batches:
        interval_costs = []
        for low, high in pairwise(ascending):
            y = data + high * draw_noise(data)
            score_high = ((yield y, high) - y) / high**2
            score_low = ((yield y, low) - y) / low**2
            squares = (score_high - score_low).flatten(1).square().sum(1)
            interval_costs.append(high * squares.mean().cpu().double().sqrt())
        totals.append(torch.stack(interval_costs))
    if not totals:
        raise ValueError("`batches` is empty; at least one batch of data is needed.")
    costs = torch.stack(totals).mean(0)
    return torch.cat([costs.new_zeros(1), costs.cumsum(0)])


def score_difference_schedule(
    probe_sigmas: Tensor,
    cumulative_cost: Tensor,
    num_steps: int,
    *,
    spacing: Spacing = "edm",
    published: bool = False,
) -> Tensor:
    """Places `num_steps` noise levels at equal increments of the cumulative score-difference cost.

    Args:
        probe_sigmas (`Tensor` of shape `(K + 1,)`): As passed to `score_difference_costs`, descending.
        cumulative_cost (`Tensor` of shape `(K + 1,)`): Its result, for ascending noise levels.
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
        return _levels_at_equal_increments(reversed_cost, ascending.flip(0), num_steps, spacing)
    at = torch.linspace(0, 1, num_steps, **FLOAT64) * cumulative_cost[-1]
    levels = _interpolate_sigmas(cumulative_cost[1:], ascending[1:], at, spacing).flip(0)
    levels[0], levels[-1] = max(levels[0], ascending[-1]), min(levels[-1], ascending[0])
    return torch.cat([levels, levels.new_zeros(1)])


def normalized_time(sigmas: Tensor, knot_sigmas: Tensor, cumulative_cost: Tensor, rho: float = 7.0) -> Tensor:
    """u-hat: share of the cumulative score-difference cost that lies below each noise level, from 1 down to 0.

    It is a criterion for the switch that depends on the noise level only: pass the first index where u-hat is below a cut
    to [`step_weights`]. Source: SDM, arXiv 2602.12624, the `uhat` metric.

    Args:
        sigmas (`Tensor` of shape `(N,)`): Descending, positive noise levels; u-hat is 1 at the first and 0 at the
            last.
        knot_sigmas (`Tensor` of shape `(K,)`): Where the cost is known, strictly ascending.
        cumulative_cost (`Tensor` of shape `(K,)`): As `score_difference_costs` returns it.
        rho (`float`): The cost is interpolated over sigma^(1/rho).
    """
    cost = pchip(knot_sigmas ** (1 / rho), cumulative_cost, sigmas ** (1 / rho))
    return (cost - cost[-1]) / (cost[0] - cost[-1])


def _levels_at_equal_increments(
    positions: Tensor, sigmas: Tensor, num_steps: int, spacing: Spacing, append_zero: bool = True
) -> Tensor:
    """Noise levels at `num_steps` equally spaced positions between the first and the last of `positions`.

    Args:
        positions (`Tensor` of shape `(K,)`): Strictly ascending.
        sigmas (`Tensor` of shape `(K,)`): Positive noise level at each position.
        num_steps (`int`): At least 2.
        spacing (`str`): `"edm"` or `"loglinear"`.
        append_zero (`bool`): End the list with 0.
    """
    if num_steps < 2:
        raise ValueError(f"`num_steps` must be at least 2, got {num_steps}.")
    at = torch.linspace(0, 1, num_steps, **FLOAT64) * (positions[-1] - positions[0]) + positions[0]
    levels = _interpolate_sigmas(positions, sigmas, at, spacing)
    levels[[0, -1]] = sigmas[[0, -1]]
    return torch.cat([levels, levels.new_zeros(1)]) if append_zero else levels


def _interpolate_sigmas(positions: Tensor, sigmas: Tensor, at: Tensor, spacing: Spacing) -> Tensor:
    """PCHIP of sigma^(1/7) or log sigma over `positions`, at `at`."""
    check_choice("spacing", spacing, Spacing)
    if spacing == "edm":
        return pchip(positions, sigmas ** (1 / 7), at) ** 7
    return pchip(positions, sigmas.log(), at).exp()


def pchip(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Monotone piecewise cubic Hermite interpolation; outside the knots the end cubics continue.

    Source: Fritsch & Carlson 1980, with the harmonic-mean slopes of Fritsch & Butland 1984, as SciPy's
    `PchipInterpolator`.

    Args:
        x (`Tensor` of shape `(K,)`): Knots, strictly ascending, K >= 2.
        y (`Tensor` of shape `(K,)`): Values at the knots.
        at (`Tensor` of any shape): Where to evaluate.

    Returns:
        `Tensor` of the shape of `at`.
    """
    x, y, at = x.double(), y.double(), at.double()
    if len(x) < 2 or len(x) != len(y) or not (x.diff() > 0).all():
        raise ValueError(
            "Interpolation needs two or more strictly ascending knots and one value for each, "
            f"got knots {x.tolist()} and {len(y)} values."
        )
    h, m = x.diff(), y.diff() / x.diff()
    slopes = m.repeat(2)
    if len(m) > 1:
        left, right = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
        inner = torch.where(m[:-1] * m[1:] > 0, (left + right) / (left / m[:-1] + right / m[1:]), 0.0)
        # Three-point estimates at the ends, limited so that the end intervals stay monotone.
        (h_0, h_1), (m_0, m_1) = (torch.stack([v[[0, -1]], v[[1, -2]]]) for v in (h, m))
        ends = ((2 * h_0 + h_1) * m_0 - h_0 * m_1) / (h_0 + h_1)
        ends = torch.where((m_0 * m_1 < 0) & (ends.abs() > 3 * m_0.abs()), 3 * m_0, ends)
        ends = ends.where(ends.sign() == m_0.sign(), 0.0)
        slopes = torch.cat([ends[:1], inner, ends[1:]])
    k = (torch.searchsorted(x, at.contiguous(), right=True) - 1).clamp(0, len(x) - 2)
    s = at - x[k]
    quadratic = (3 * m[k] - 2 * slopes[k] - slopes[k + 1]) / h[k]
    cubic = (slopes[k] + slopes[k + 1] - 2 * m[k]) / h[k] ** 2
    return y[k] + s * (slopes[k] + s * (quadratic + s * cubic))
