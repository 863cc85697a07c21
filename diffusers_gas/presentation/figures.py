"""Figures: times, coefficients and plans of schedulers, and samples. They need matplotlib, which the extra `train` installs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which changes the user's backend
from matplotlib.ticker import MaxNLocator

from ..generalized_solver import GeneralizedSolver
from ..guided_solver import GuidedSolver
from ..noise_schedules import NoiseSchedule
from ..pipelines.named_schedulers import EXAMPLE_MU
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.sdm_plan import SDMPlan
from ..utils.files import replacing
from .description import followed_table, log_snr


# In inches: the width of the narrowest figure of times, the height of a row of times, a cell of a coefficient table.
WIDTH, ROW_HEIGHT = 8.0, 0.27
CELL_WIDTH, CELL_HEIGHT = 0.44, 0.32
# The most characters in a line of an image's title, the width of an image in inches, and its most pixels.
TITLE_WIDTH, IMAGE_WIDTH, LARGEST_IMAGE = 13, 0.9, 384


def draw_solvers(scheduler: GASScheduler, step_counts: Sequence[int], path: Path) -> None:
    """Draws the times and the coefficients of learned solvers, beside those of DPM-Solver++.

    A number of steps without a learned solver has the coefficients of DPM-Solver++ only. A solver for a range of guidance scales is
    drawn at the usual one, and below at all.
    """
    guided = {n: solver for n in step_counts if isinstance(solver := scheduler.solvers.get(n), GuidedSolver)}
    heights = [
        1.1 + 2 * ROW_HEIGHT * len(step_counts),
        *(1.0 + CELL_HEIGHT * n for n in step_counts),
        *(2.6 for _ in guided),
    ]
    columns = 2 if scheduler.solvers else 1
    width = max(WIDTH, 1.5 + columns * CELL_WIDTH * (2 + max(step_counts)))
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    top, *rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_times(top.subplots(), scheduler, step_counts)
    noise_schedule = scheduler.noise_schedule(EXAMPLE_MU)
    for row, n in zip(rows, step_counts):
        theory = scheduler.theory_solver(n, EXAMPLE_MU)
        tables = {f"{n} steps, DPM-Solver++ theory": theory}
        if n in scheduler.solvers:
            tables = {f"{n} steps, learned": scheduler.solvers[n].at(), **tables}
        _draw_tables(row.subplots(1, columns, squeeze=False)[0], tables, noise_schedule)
    for row, (n, solver) in zip(rows[len(step_counts) :], guided.items()):
        row.suptitle(f"{n} steps, learned", fontsize=9)
        _draw_scales(row.subplots(1, 2), solver, noise_schedule)
    save_figure(figure, path)


def draw_plans(plans: Sequence[SDMPlan], path: Path) -> None:
    """Draws the noise levels of plans, and what calibration measured: the bounds on the errors of their steps, the curvature.

    Dashed lines are for the same number of steps on Karras' spacing. Rings mark the first step of higher order. The last part
    shows how many evaluations have been spent on the way to a noise level. Sampling goes from left to right.
    """
    measured = any("curvature" in plan.provenance for plan in plans)
    figure = Figure(figsize=(12, 8) if measured else (6, 4), layout="constrained")
    levels, *others = figure.subplots(2, 2).flat if measured else [figure.subplots()]
    ring: dict[str, Any] = {"marker": "o", "markersize": 10, "fillstyle": "none", "linewidth": 0}
    for i, plan in enumerate(plans):
        label = f"{plan.num_inference_steps} evaluations, {plan.solver}"
        solid: dict[str, Any] = {"color": f"C{i}", "marker": ".", "linewidth": 1, "label": label}
        dashed: dict[str, Any] = {"color": f"C{i}", "linestyle": "--", "linewidth": 1, "alpha": 0.6}
        found, sigmas = plan.provenance, plan.sigmas[:-1]
        curves: list[tuple[Axes, Any, Any]] = [(levels, range(plan.num_steps), sigmas)]
        if "curvature" in found:
            errors, curvature, cost = others
            # The last step has no bound, and there is no curvature before the first.
            curves.append((errors, sigmas, [*found["eta"][:-1], np.nan]))
            curves.append((curvature, sigmas, [np.nan, *found["curvature"][1:]]))
            spent = plan.evaluation_sigmas()
            curves.append((cost, spent, range(1, len(spent) + 1)))
            levels.plot(found["karras_sigmas"][:-1], **dashed)
            errors.plot(found["karras_sigmas"][:-2], found["karras_eta"][:-1], **dashed)
            if "measured_curvature" in found:
                curvature.plot(found["measured_sigmas"][1:], found["measured_curvature"], color="0.7", zorder=0)
        for axis, x, y in curves:
            axis.plot(x, y, drawstyle="steps-post" if axis in others[2:] else "default", **solid)
            if max(plan.orders) > 1:
                axis.plot(x[plan.switch_index], y[plan.switch_index], color=f"C{i}", **ring)
    if measured:
        levels.plot([], [], color="0.5", linestyle="--", linewidth=1, label="as many steps spaced by Karras")
        errors.set(title="Bound on the error of each step", ylabel="eta (RMS)", yscale="log")
        curvature.set(
            title="Curvature of the trajectories, grey as measured", ylabel="relative, 1 / sigma", yscale="log"
        )
        cost.set(title="Evaluations down to a noise level", ylabel="evaluations")
        cost.yaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in others:
            axis.set(xlabel="sigma / alpha", xscale="log")
            axis.invert_xaxis()
    levels.plot([], [], color="0.5", label="first step of higher order", **ring)
    levels.set(title="Noise levels", xlabel="step", ylabel="sigma / alpha", yscale="log")
    levels.xaxis.set_major_locator(MaxNLocator(integer=True))
    levels.legend(fontsize=8)
    save_figure(figure, path)


def comparison_picture(rows: Mapping[str, Sequence[np.ndarray]], path: Path, titles: Sequence[str] = ()) -> None:
    """Draws a row of images for each sampler.

    Args:
        rows: Images by the label of their row, arrays of shape `(height, width, channels)` in [0, 1].
        titles: Titles of the columns, e.g. prompts.
    """
    num_columns = max(map(len, rows.values()))
    height = len(rows) + 0.16 * max((len(wrap(title, TITLE_WIDTH)) for title in titles), default=0)
    figure = Figure(figsize=(IMAGE_WIDTH * num_columns + 2.2, height), layout="compressed")
    axes = figure.subplots(len(rows), num_columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, title in zip(axes[0], titles):
        axis.set_title("\n".join(wrap(title, TITLE_WIDTH)), fontsize=7, parse_math=False)
    for row, (label, images) in zip(axes, rows.items()):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, parse_math=False)
        for axis, image in zip(row, images):
            axis.axis("on")  # a frame, for images with a white background
            axis.set(xticks=[], yticks=[])
            axis.imshow(np.squeeze(np.clip(image, 0, 1)), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    # Small images are magnified, about 2.5 times at least. Large ones keep their pixels up to a limit.
    largest = max(np.shape(image)[1] for images in rows.values() for image in images)
    dpi = max(120, min(3 * largest, LARGEST_IMAGE) / IMAGE_WIDTH)
    save_figure(figure, path, dpi=dpi, bbox_inches="tight")


def save_figure(figure: Figure, path: Path, dpi: float = 120, **settings: Any) -> None:
    """Writes a figure atomically, in the format that the ending of the path names, or as PNG."""
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix.removeprefix(".") or "png", **settings)


def _draw_times(axis: Axes, scheduler: GASScheduler, step_counts: Sequence[int]) -> None:
    """Draws the times of a scheduler and of DPM-Solver++, an untrained `GASScheduler`, for the same network.

    A row has the log-SNR of the states and the log-SNR of the network evaluations.
    """
    untrained = GASScheduler.from_config(dict(scheduler.config))
    schedulers = {type(scheduler).__name__: scheduler, "DPM-Solver++": untrained}
    noise_schedule, rows = scheduler.noise_schedule(EXAMPLE_MU), {}
    for n in step_counts:
        for name, drawn in schedulers.items():
            table = followed_table(drawn, n)
            rows[f"{n} steps, {name}"] = [log_snr(noise_schedule, t) for t in (table.times, table.evaluation_times)]
    drawn_levels = torch.cat([levels for row in rows.values() for levels in row])
    low, high = (f(drawn_levels[drawn_levels.isfinite()]).item() for f in (torch.min, torch.max))
    # The log-SNR is -inf where flow matching starts, and inf where there is no noise.
    ends = low - 2, high + 2
    for row, levels in enumerate(rows.values()):
        state_color, evaluation_color = ("C0", "C3") if row % 2 == 0 else ("0.55", "0.2")
        states, evaluations = ((x.clamp(*ends), [row] * len(x)) for x in levels)
        axis.plot(*states, color=state_color, marker="o", linewidth=0.7, label="state")
        axis.plot(*evaluations, color=evaluation_color, marker="x", linewidth=0, label="evaluation", zorder=3)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    ticks = {tick: f"{tick:g}" for tick in MaxNLocator(10).tick_values(low, high) if low <= tick <= high}
    ticks |= {end: f"{value}" for end, value in zip(ends, (-torch.inf, torch.inf)) if (drawn_levels == value).any()}
    axis.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    axis.set(xlim=(ends[0] - 0.5, ends[1] + 0.5), ylim=(len(rows) - 0.5, -0.6))
    axis.set_xlabel("log-SNR, log(alpha\u00b2 / sigma\u00b2)", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(
        handles=axis.lines[:2], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False
    )


def _draw_tables(axes: Sequence[Axes], solvers: dict[str, GeneralizedSolver], noise_schedule: NoiseSchedule) -> None:
    """Draws the weights of each solver's steps as a heat map with numbers. All maps have the same colour scale."""
    tables = {title: solver.table(noise_schedule).weights.detach() for title, solver in solvers.items()}
    largest = max(1.0, *(table.abs().max().item() for table in tables.values()))
    for axis, (title, table) in zip(axes, tables.items()):
        n = len(table)
        axis.imshow(table, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        for k in range(n):
            for column in range(3 + k):
                value = table[k, column].item()
                color = "white" if abs(value) > 0.6 * largest else "black" if value else "0.7"
                axis.text(column, k, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=color)
        # The tensors that the columns are the weights of.
        axis.set_xticks(range(n + 2), ["x[k]", "x[0]", *(f"D[{j}]" for j in range(n))], fontsize=7)
        axis.set_yticks(range(n), [f"x[{k + 1}]" for k in range(n)], fontsize=7)
        axis.tick_params(length=0, labeltop=True, labelbottom=False)
        axis.set_title(title, fontsize=9)
    for axis in axes[len(tables) :]:
        axis.axis("off")


def _draw_scales(axes: Sequence[Axes], solver: GuidedSolver, noise_schedule: NoiseSchedule) -> None:
    """Draws how the times of the evaluations and the weights of the steps move with the guidance scale."""
    scales = np.geomspace(solver.scales[0], solver.scales[-1], 33)
    with torch.no_grad():
        tables = [solver.at(scale).table(noise_schedule) for scale in scales]
    for k in range(solver.num_inference_steps):
        axes[0].plot(scales, [table.evaluation_times[k].item() for table in tables], color=f"C{k}")
        weights = torch.stack([table.weights[k, : 3 + k] for table in tables])
        axes[1].plot(scales, weights, color=f"C{k}", linewidth=0.8)
    for axis, title in zip(axes, ("t of the evaluations, a colour for each step", "weights")):
        axis.set_title(title, fontsize=8)
        axis.set(xscale="log", xticks=solver.scales, xticklabels=[f"{scale:.3g}" for scale in solver.scales])
        axis.minorticks_off()
        axis.set_xlabel(solver.argument, fontsize=8)
        axis.tick_params(labelsize=7)
