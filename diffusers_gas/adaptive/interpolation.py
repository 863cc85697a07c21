"""Shape-preserving interpolation, for lists of noise levels that must stay monotone."""

import torch
from torch import Tensor


def pchip(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Monotone piecewise cubic Hermite interpolation; outside the knots the end cubics go on.

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
    widths = x.diff()
    secants = y.diff() / widths
    slopes = _slopes(widths, secants)
    k = (torch.searchsorted(x, at.contiguous(), right=True) - 1).clamp(0, len(x) - 2)
    h, m, s = widths[k], secants[k], at - x[k]
    quadratic = (3 * m - 2 * slopes[k] - slopes[k + 1]) / h
    cubic = (slopes[k] + slopes[k + 1] - 2 * m) / h**2
    return y[k] + s * (slopes[k] + s * (quadratic + s * cubic))


def _slopes(widths: Tensor, secants: Tensor) -> Tensor:
    if len(secants) == 1:
        return secants.repeat(2)
    left, right = secants[:-1], secants[1:]
    weight_left = 2 * widths[1:] + widths[:-1]
    weight_right = widths[1:] + 2 * widths[:-1]
    harmonic_mean = (weight_left + weight_right) / (weight_left / left + weight_right / right)
    interior = torch.where(left * right > 0, harmonic_mean, 0.0)
    first = _end_slope(widths[0], widths[1], secants[0], secants[1])
    last = _end_slope(widths[-1], widths[-2], secants[-1], secants[-2])
    return torch.cat([first[None], interior, last[None]])


def _end_slope(width: Tensor, next_width: Tensor, secant: Tensor, next_secant: Tensor) -> Tensor:
    """Three-point estimate, limited so that the end interval stays monotone."""
    slope = ((2 * width + next_width) * secant - width * next_secant) / (width + next_width)
    if slope.sign() != secant.sign():
        return torch.zeros_like(slope)
    if secant.sign() != next_secant.sign() and slope.abs() > 3 * secant.abs():
        return 3 * secant
    return slope
