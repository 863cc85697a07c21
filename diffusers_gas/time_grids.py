"""The usual grids of noise levels and times, and the checks of lists of noise levels."""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from .noise_schedules import NoiseSchedule, VPLinearSchedule
from .utils.tensors import FLOAT64


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


def vp_schedule(sigma_min: float, sigma_max: float, t_end: float = 1e-3) -> VPLinearSchedule:
    """The VP schedule, linear in beta, whose noise level is `sigma_max` at t = 1 and `sigma_min` at `t_end`.

    Source: EDM, arXiv 2206.00364, appendix C.1; SDM's `vp` schedule.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"0 < sigma_min < sigma_max must hold, got sigma_min = {sigma_min}, sigma_max = {sigma_max}.")
    log_low, log_high = torch.tensor([sigma_min, sigma_max], **FLOAT64).square().log1p().tolist()
    beta_slope = 2 * (log_low / t_end - log_high) / (t_end - 1)
    beta_0 = log_high - beta_slope / 2
    return VPLinearSchedule(beta_0, beta_0 + beta_slope)


def initial_times(
    spacing: Literal["uniform", "logsnr", "karras"],
    num_inference_steps: int,
    noise_schedule: NoiseSchedule,
    t_start: float = 1.0,
    t_end: float = 1e-3,
) -> Tensor:
    """Usual time grids, float64 `(num_inference_steps + 1,)` descending from `t_start` to `t_end`.

    `"uniform"` in t, `"logsnr"` uniform in lambda (DPM-Solver), `"karras"` uniform in (sigma / alpha)^(1/7) (EDM). The
    last two need alpha(t_start) > 0.
    """
    ends = torch.tensor([t_start, t_end], **FLOAT64)
    if spacing == "uniform":
        return torch.lerp(ends[0], ends[1], torch.linspace(0, 1, num_inference_steps + 1, **FLOAT64))
    kinds: dict[str, Grid] = {"logsnr": "loglinear", "karras": "edm"}
    if spacing not in kinds:
        raise ValueError(f"`spacing` must be 'uniform', 'logsnr' or 'karras', got '{spacing}'.")
    high, low = (-noise_schedule.lambda_(ends)).exp().tolist()
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"'{spacing}' spacing (`use_karras_sigmas`, `use_lu_lambdas`) needs a finite log-SNR at t = {t_start} and "
            f"t = {t_end}; use 'uniform'."
        )
    levels = sigma_grid(num_inference_steps + 1, low, high, kinds[spacing])
    times = noise_schedule.inverse_lambda(-levels.log())
    times[[0, -1]] = ends
    return times


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
