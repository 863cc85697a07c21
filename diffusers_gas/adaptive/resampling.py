"""N-step resampling: noise levels at equal increments of a measured error."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..time_grids import check_choice, check_sigmas
from ..utils.tensors import FLOAT64


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
    check_choice("spacing", spacing, Spacing)
    if num_steps < 2:
        raise ValueError(f"`num_steps` must be at least 2, got {num_steps}.")
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
    at = torch.linspace(0, 1, num_steps, **FLOAT64) * positions[-1]
    levels = pchip(positions, path ** (1 / 7), at) ** 7 if spacing == "edm" else pchip(positions, path.log(), at).exp()
    levels[[0, -1]] = path[[0, -1]]
    return torch.cat([levels, levels.new_zeros(1)]) if append_zero else levels


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
