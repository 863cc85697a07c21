"""Figures of schedulers: times, coefficients and plans. They need matplotlib, which the extra `train` installs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which changes the user's backend
from matplotlib.ticker import MaxNLocator

from .generalized_solver import GeneralizedSolver
from .noise_schedules import NoiseSchedule
from .schedulers.scheduling_gas import GASScheduler
from .schedulers.sdm_plan import SDMPlan
from .schedulers.time_grid_figure import WIDTH, draw_times, save_figure, times_height
from .schedulers.time_grids import SOME_SHIFT


# The size of a cell of a coefficient table, in inches.
CELL_WIDTH, CELL_HEIGHT = 0.44, 0.32


def draw_solvers(scheduler: GASScheduler, step_counts: Sequence[int], path: Path) -> None:
    """Draws the times and the coefficients of learned solvers, beside those of DPM-Solver++.

    A number of steps without a learned solver has the coefficients of DPM-Solver++ only.
    """
    heights = [times_height(step_counts), *(1.0 + CELL_HEIGHT * n for n in step_counts)]
    columns = 2 if scheduler.solvers else 1
    width = max(WIDTH, 1.5 + columns * CELL_WIDTH * (2 + max(step_counts)))
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    top, *rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    draw_times(top.subplots(), scheduler, step_counts)
    noise_schedule = scheduler.noise_schedule(SOME_SHIFT)
    for row, n in zip(rows, step_counts):
        theory = scheduler.theory_solver(n, SOME_SHIFT)
        tables = {f"{n} steps, DPM-Solver++ theory": theory}
        if n in scheduler.solvers:
            tables = {f"{n} steps, learned": scheduler.solvers[n], **tables}
        _draw_tables(row.subplots(1, columns, squeeze=False)[0], tables, noise_schedule)
    save_figure(figure, path)


def draw_plans(plans: Sequence[SDMPlan], path: Path) -> None:
    """Draws the noise levels of plans, and what calibration measured: the bounds on the errors of their steps, the curvature.

    Dashed lines are for the same number of steps on Karras' spacing. Rings mark the first step of higher order. The last part
    shows how many evaluations have been spent on the way to a noise level. Sampling goes from left to right.
    """
    measured = any("curvature" in plan.provenance for plan in plans)
    figure = Figure(figsize=(12, 8) if measured else (6, 4), layout="constrained")
    levels, *others = figure.subplots(2, 2).flat if measured else [figure.subplots()]
    for color, plan in enumerate(plans):
        solid: dict[str, Any] = {"color": f"C{color}", "marker": ".", "linewidth": 1}
        dashed: dict[str, Any] = {"color": f"C{color}", "linestyle": "--", "linewidth": 1, "alpha": 0.6}
        ring = {**solid, "marker": "o", "markersize": 10, "fillstyle": "none"}
        sigmas = plan.sigmas[:-1]
        here = plan.switch_index if max(plan.orders) > 1 else len(sigmas)
        first = slice(here, here + 1)
        levels.plot(sigmas, label=f"{plan.num_inference_steps} evaluations, {plan.solver}", **solid)
        levels.plot(range(len(sigmas))[first], sigmas[first], **ring)
        if "curvature" in plan.provenance:
            (errors, curvature, cost), found = others, plan.provenance
            levels.plot(found["karras_sigmas"][:-1], **dashed)
            errors.plot(sigmas[:-1], found["eta"][:-1], **solid)
            errors.plot(sigmas[first], found["eta"][first], **ring)
            errors.plot(found["karras_sigmas"][:-2], found["karras_eta"][:-1], **dashed)
            if "measured_curvature" in found:
                curvature.plot(found["measured_sigmas"][1:], found["measured_curvature"], color="0.7", zorder=0)
            curvature.plot(sigmas[1:], found["curvature"][1:], **solid)
            curvature.plot(sigmas[first], found["curvature"][first], **ring)
            spent = plan.evaluation_sigmas()
            cost.step(spent, range(1, len(spent) + 1), where="post", **solid)
            cost.plot(spent[first], range(1, len(spent) + 1)[first], **ring)
    if measured:
        levels.plot([], [], color="0.5", linestyle="--", linewidth=1, label="as many steps spaced by Karras")
        errors.set(title="Bound on the error of each step", ylabel="eta (RMS)", yscale="log")
        curvature.set(
            title="Curvature of the trajectories, grey as measured", ylabel="relative, 1 / sigma", yscale="log"
        )
        cost.set(title="Evaluations down to a noise level", ylabel="evaluations")
        for axis in others:
            axis.set(xlabel="sigma / alpha", xscale="log")
            axis.invert_xaxis()
    levels.plot(
        [],
        [],
        color="0.5",
        linewidth=0,
        marker="o",
        markersize=10,
        fillstyle="none",
        label="first step of higher order",
    )
    levels.set(title="Noise levels", xlabel="step", ylabel="sigma / alpha", yscale="log")
    for axis in [levels.xaxis, *(axis.yaxis for axis in others[2:])]:
        axis.set_major_locator(MaxNLocator(integer=True))
    levels.legend(fontsize=8)
    save_figure(figure, path)


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
