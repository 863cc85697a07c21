"""Base grids of noise levels, and the checks of arguments."""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..utils.tensors import FLOAT64
from .probability_flow import vp_schedule


Grid: TypeAlias = Literal["edm", "loglinear", "vp", "iddpm"]


def sigma_grid(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, kind: Grid = "edm", rho: float = 7.0
) -> Tensor:
    """Noise levels from `sigma_max` down to `sigma_min`, without the final 0.

    Args:
        num_steps (`int`): Number of values, at least 2; the number of steps once 0 is appended.
        sigma_min (`float`): Lowest value.
        sigma_max (`float`): Highest value.
        kind (`str`): `"edm"`: equal steps of sigma^(1/rho) (EDM, arXiv 2206.00364, eq. 5), also known as Karras' noise
            levels; `"loglinear"`: equal steps of log sigma, the grid of VE models; `"vp"`: equal steps of the time of
            [`vp_schedule`]; `"iddpm"`: entries of the cosine schedule within the range, whose ends may therefore lie inside
            it (EDM, appendix C.3).
        rho (`float`): Exponent of `"edm"`.

    Returns:
        `Tensor` of shape `(num_steps,)`: float64, descending.
    """
    if num_steps < 2:
        raise ValueError(f"`num_steps` must be at least 2, got {num_steps}.")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"0 < sigma_min < sigma_max must hold, got sigma_min = {sigma_min}, sigma_max = {sigma_max}.")
    check_choice("kind", kind, Grid)
    ends = torch.tensor([sigma_max, sigma_min], **FLOAT64)
    u = torch.linspace(0, 1, num_steps, **FLOAT64)
    if kind == "iddpm":
        kept = iddpm_noise_levels()
        kept = kept[(kept >= sigma_min) & (kept <= sigma_max)]
        if len(kept) < num_steps:
            raise ValueError(
                f"The cosine schedule has {len(kept)} noise levels in the range, but `num_steps` is {num_steps}."
            )
        return kept[(u * (len(kept) - 1)).round().long()]
    if kind == "edm":
        high, low = ends ** (1 / rho)
        grid = (high + u * (low - high)) ** rho
    elif kind == "loglinear":
        high, low = ends.log()
        grid = (high + u * (low - high)).exp()
    else:
        t_end = 1e-3
        schedule = vp_schedule(sigma_min, sigma_max, t_end)
        t = 1 + u * (t_end - 1)
        grid = schedule.sigma(t) / schedule.alpha(t)
    grid[[0, -1]] = ends
    return grid


def clean_sigmas(sigmas: Sequence[float] | Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Makes a list usable: clamps its non-zero values to the range, sorts, drops repetitions, and appends 0.

    Solvers refuse a list that is not in order. The published code repairs it silently, in this way.

    Returns:
        `Tensor` of shape `(N + 1,)`: float64, descending, the last value 0.
    """
    levels = torch.as_tensor(sigmas, **FLOAT64)
    levels = levels[levels != 0].clamp(sigma_min, sigma_max).unique().flip(0)
    return check_sigmas(torch.cat([levels, levels.new_zeros(1)]))


def check_sigmas(sigmas: Sequence[float] | Tensor) -> Tensor:
    """`sigmas` as a float64 CPU tensor of shape `(N + 1,)`, N >= 1; strictly descending, the last value may be 0.

    Raises:
        ValueError: If it is anything else.
    """
    levels = torch.as_tensor(sigmas, **FLOAT64)
    in_order = levels.ndim == 1 and len(levels) >= 2 and bool((levels.diff() < 0).all())
    if not in_order or not levels.isfinite().all() or levels[-1] < 0:
        raise ValueError(
            "Noise levels must be at least two finite, strictly descending numbers, only the last of which may be 0, "
            f"got {levels.tolist()}. `clean_sigmas` sorts and clamps a list."
        )
    return levels


def check_choice(name: str, value: str, literal: Any) -> None:
    """Raises a `ValueError` if the argument `name` is none of the values of a `Literal`."""
    if value not in get_args(literal):
        raise ValueError(f"`{name}` = {value!r} is unknown; choose one of {', '.join(get_args(literal))}.")


def iddpm_noise_levels() -> Tensor:
    """Noise levels u_0 > ... > u_1000 = 0 of iDDPM's cosine schedule (arXiv 2102.09672).

    In the form of EDM (arXiv 2206.00364, table 1 and appendix C.3): u_{j-1}^2 + 1 = (u_j^2 + 1) / r_j, with r_j the ratio of
    successive alpha_bar, at least C_1 = 0.001.

    Returns:
        `Tensor` of shape `(1001,)`: float64, descending.
    """
    alpha_bar = (0.5 * math.pi * torch.arange(1001, **FLOAT64) / 1000 / 1.008).sin().square()
    ratios = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=0.001)
    levels = (1 / ratios.flip(0).cumprod(0).flip(0) - 1).sqrt()
    return torch.cat([levels, levels.new_zeros(1)])
