"""The figure of a scheduler's times for its model card. It needs matplotlib, which the extra `train` installs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which changes the user's backend
from matplotlib.ticker import MaxNLocator

from ..utils.files import replacing
from .time_grids import SOME_SHIFT, TimeGrid, dpm_solver


# The width of the narrowest figure and the height of a row of times, in inches.
WIDTH, ROW_HEIGHT = 8.0, 0.27


def draw_time_grids(scheduler: SchedulerMixin, step_counts: Sequence[int], path: Path) -> None:
    """Draws the times of a scheduler and of Diffusers' DPM-Solver++ 2M for the same network.

    A row has the log-SNR of the states and the log-SNR that the network is told at each evaluation.
    """
    figure = Figure(figsize=(WIDTH, times_height(step_counts)), layout="constrained")
    draw_times(figure.subplots(), scheduler, step_counts)
    save_figure(figure, path)


def draw_times(axis: Axes, scheduler: SchedulerMixin, step_counts: Sequence[int]) -> None:
    """Draws what [`draw_time_grids`] describes into an axis."""
    noise_schedule = scheduler.noise_schedule(SOME_SHIFT)
    schedulers = {type(scheduler).__name__: scheduler, "DPM-Solver++ 2M": dpm_solver(scheduler)}
    rows = {
        f"{n} steps, {name}": TimeGrid.of(drawn, n, noise_schedule)
        for n in step_counts
        for name, drawn in schedulers.items()
    }
    log_snr = torch.cat([torch.cat([grid.log_snr, grid.evaluation_log_snr]) for grid in rows.values()])
    low, high = (f(log_snr[log_snr.isfinite()]).item() for f in (torch.min, torch.max))
    # The log-SNR is -inf where flow matching starts, and inf where there is no noise.
    ends = low - 2, high + 2
    for row, grid in enumerate(rows.values()):
        states, told = (values.clamp(*ends) for values in (grid.log_snr, grid.evaluation_log_snr))
        state_color, told_color = ("C0", "C3") if row % 2 == 0 else ("0.55", "0.2")
        labels = ("state", "evaluation") if row == 0 else ("", "")
        axis.plot(states, [row] * len(states), color=state_color, marker="o", linewidth=0.7, label=labels[0])
        axis.plot(told, [row] * len(told), color=told_color, marker="x", linewidth=0, label=labels[1], zorder=3)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    ticks = {tick: f"{tick:g}" for tick in MaxNLocator(10).tick_values(low, high) if low <= tick <= high}
    ticks |= {end: f"{value}" for end, value in zip(ends, (-torch.inf, torch.inf)) if (log_snr == value).any()}
    axis.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    axis.set(xlim=(ends[0] - 0.5, ends[1] + 0.5), ylim=(len(rows) - 0.5, -0.6))
    axis.set_xlabel("log-SNR, log(alpha\u00b2 / sigma\u00b2)", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)


def times_height(step_counts: Sequence[int]) -> float:
    """The height of the figure in inches."""
    return 1.1 + 2 * ROW_HEIGHT * len(step_counts)


def save_figure(figure: Figure, path: Path, dpi: float = 120, **settings: Any) -> None:
    """Writes a figure atomically, in the format that the ending of the path names, or as PNG."""
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix.removeprefix(".") or "png", **settings)
