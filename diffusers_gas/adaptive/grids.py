"""Base grids of noise levels, and the checks that every list of noise levels passes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .probability_flow import vp_schedule


GRIDS = ("edm", "loglinear", "vp", "iddpm")


def sigma_grid(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, kind: str = "edm", rho: float = 7.0
) -> Tensor:
    """Noise levels from `sigma_max` down to `sigma_min`, without the final 0.

    Args:
        num_steps (`int`): Number of values, at least 2; the number of steps once 0 is appended.
        sigma_min (`float`): Lowest value.
        sigma_max (`float`): Highest value.
        kind (`str`): `"edm"`: equal steps of sigma^(1/rho) (EDM, eq. 5); `"loglinear"`: equal steps of log sigma, the
            grid of VE models; `"vp"`: equal steps of the time of `vp_schedule`; `"iddpm"`: entries of the cosine
            schedule within the range, whose ends may therefore lie inside it (EDM, appendix C.3).
        rho (`float`): Exponent of `"edm"`.

    Returns:
        `Tensor` of shape `(num_steps,)`: float64, descending.
    """
    if num_steps < 2:
        raise ValueError(f"`num_steps` must be at least 2, got {num_steps}.")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"0 < sigma_min < sigma_max must hold, got sigma_min = {sigma_min}, sigma_max = {sigma_max}.")
    if kind not in GRIDS:
        raise ValueError(f"`kind` = {kind!r} is not a grid; choose one of {', '.join(GRIDS)}.")
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64)
    u = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    if kind == "iddpm":
        kept = _cosine_sigmas()
        kept = kept[(kept >= sigma_min) & (kept <= sigma_max)]
        if len(kept) < num_steps:
            raise ValueError(
                f"The cosine schedule has {len(kept)} noise levels in the range, {num_steps} were asked for."
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
    """Make a user's list usable: clamp its non-zero values to the range, sort descending, drop repetitions, append 0.

    Solvers refuse a list that is not in order; call this to have it repaired, as the published code does silently.

    Returns:
        `Tensor` of shape `(N + 1,)`: float64, descending, the last value 0.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    sigmas = sigmas[sigmas != 0].clamp(sigma_min, sigma_max).unique().flip(0)
    return check_sigmas(torch.cat([sigmas, sigmas.new_zeros(1)]))


def check_sigmas(sigmas: Sequence[float] | Tensor) -> Tensor:
    """`sigmas` as a float64 CPU tensor of shape `(N + 1,)`, N >= 1; strictly descending, the last value may be 0.

    Raises:
        ValueError: if it is anything else.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    in_order = sigmas.ndim == 1 and len(sigmas) >= 2 and bool((sigmas.diff() < 0).all())
    if not in_order or not sigmas.isfinite().all() or sigmas[-1] < 0:
        raise ValueError(
            "Noise levels must be at least two finite, strictly descending numbers, only the last of which may be 0, "
            f"got {sigmas.tolist()}. `clean_sigmas` sorts and clamps a list."
        )
    return sigmas


def _cosine_sigmas() -> Tensor:
    """The 1000 noise levels of the iDDPM cosine schedule (arXiv 2102.09672; EDM, appendix C.3), descending."""
    alpha_bar = (0.5 * math.pi * torch.arange(1001, dtype=torch.float64) / 1000 / 1.008).sin().square()
    ratios = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=0.001)
    # u[j-1]^2 + 1 = (u[j]^2 + 1) / ratio[j-1] with u[1000] = 0.
    return (1 / ratios.flip(0).cumprod(0).flip(0) - 1).sqrt()
