"""N-step resampling: a measured schedule, redistributed over a wanted number of steps."""

from typing import Literal

import torch
from torch import Tensor

from .grids import check_sigmas
from .interpolation import pchip


SPACINGS = ("edm", "loglinear")


def resample_sigmas(
    sigmas: Tensor,
    eta: Tensor,
    num_steps: int,
    *,
    power: float = 0.5,
    q: float = 0.25,
    spacing: Literal["edm", "loglinear"] = "edm",
    append_zero: bool = True,
) -> Tensor:
    """Place `num_steps` noise levels at equal increments of the weighted error length eta^power (sigma_max / sigma)^q.

    Source: SDM, arXiv 2602.12624, N-step resampling; published power 0.5, q 0.1 or 0.25. Resampled steps keep no
    bound.

    Args:
        sigmas (`Tensor` of shape `(K + 1,)`): The measured list, descending, the last may be 0.
        eta (`Tensor` of shape `(K,)`): Error of each of its steps, not negative. That of a step to 0 is not used.
        num_steps (`int`): Number of non-zero noise levels, at least 2; of steps, once 0 is appended.
        power (`float`): Exponent of the error.
        q (`float`): More than 0 moves noise levels towards low noise.
        spacing (`str`): Interpolate sigma^(1/7) (`"edm"`, whatever the rho of the measured list) or log sigma
            (`"loglinear"`).
        append_zero (`bool`): End the list with 0.

    Returns:
        `Tensor` of shape `(num_steps + 1,)`, or `(num_steps,)` without the 0: float64, descending, with the ends of
        the measured list exactly.
    """
    path, eta = check_sigmas(sigmas), torch.as_tensor(eta, dtype=torch.float64, device="cpu")
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
    return levels_at_equal_increments(positions, path, num_steps, spacing, append_zero)


def levels_at_equal_increments(
    positions: Tensor, sigmas: Tensor, num_steps: int, spacing: str, append_zero: bool = True
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
    at = torch.linspace(0, 1, num_steps, dtype=torch.float64) * (positions[-1] - positions[0]) + positions[0]
    levels = interpolate_sigmas(positions, sigmas, at, spacing)
    levels[[0, -1]] = sigmas[[0, -1]]
    return torch.cat([levels, levels.new_zeros(1)]) if append_zero else levels


def interpolate_sigmas(positions: Tensor, sigmas: Tensor, at: Tensor, spacing: str) -> Tensor:
    """PCHIP of sigma^(1/7) or log sigma over `positions`, at `at`."""
    if spacing not in SPACINGS:
        raise ValueError(f"`spacing` = {spacing!r} is unknown; choose one of {', '.join(SPACINGS)}.")
    if spacing == "edm":
        return pchip(positions, sigmas ** (1 / 7), at) ** 7
    return pchip(positions, sigmas.log(), at).exp()
