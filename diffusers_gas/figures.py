"""Figures of schedulers: their times, coefficients and plans. They need matplotlib, which the extra `train` installs."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, whose state is the user's
from matplotlib.ticker import MaxNLocator

from .generalized_solver import GeneralizedSolver
from .noise_schedules import NoiseSchedule
from .schedulers.scheduling_gas import GASScheduler
from .schedulers.scheduling_utils import ODEScheduler
from .schedulers.sdm_plan import SDMPlan
from .schedulers.solver_files import replacing
from .time_grid import SOME_SHIFT, TimeGrid


# Inches: the narrowest figure, a row of times, a cell of a coefficient table.
WIDTH, ROW_HEIGHT, CELL_WIDTH, CELL_HEIGHT = 8.0, 0.27, 0.44, 0.32


def draw_time_grids(scheduler: ODEScheduler, step_counts: Sequence[int], path: Path) -> None:
    """Draws the log-SNR of every state, and the one that the network is told there, beside those of DPM-Solver++ 2M."""
    figure = Figure(figsize=(WIDTH, _times_height(step_counts)), layout="constrained")
    _draw_times(figure.subplots(), scheduler, step_counts)
    _save(figure, path)


def draw_solvers(scheduler: GASScheduler, step_counts: Sequence[int], path: Path) -> None:
    """Draws the times as above, and the coefficients of every solver beside those of the theory that learning starts from."""
    heights = [_times_height(step_counts), *(1.0 + CELL_HEIGHT * n for n in step_counts)]
    columns = 2 if scheduler.solvers else 1
    width = max(WIDTH, 1.5 + columns * CELL_WIDTH * (2 + max(step_counts)))
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    top, *rows = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_times(top.subplots(), scheduler, step_counts)
    noise_schedule = scheduler.noise_schedule(SOME_SHIFT)
    for row, n in zip(rows, step_counts):
        theory = scheduler.theory_solver(n, SOME_SHIFT)
        tables = {f"{n} steps, DPM-Solver++ theory": theory}
        if n in scheduler.solvers:
            tables = {f"{n} steps, learned": scheduler.solvers[n], **tables}
        _draw_tables(row.subplots(1, columns, squeeze=False)[0], tables, noise_schedule)
    _save(figure, path)


def draw_plans(plans: Sequence[SDMPlan], path: Path) -> None:
    """Draws the noise levels of plans, and the errors and the curvature that calibration measured along them.

    Dashed: as many steps spaced by Karras. Dotted: where second order begins.
    """
    measured = any("curvature" in plan.provenance for plan in plans)
    figure = Figure(figsize=(13 if measured else 6, 4), layout="constrained")
    levels, *others = figure.subplots(1, 3 if measured else 1, squeeze=False)[0]
    for color, plan in enumerate(plans):
        solid = {"color": f"C{color}", "marker": ".", "linewidth": 1}
        dashed = {"color": f"C{color}", "linestyle": "--", "linewidth": 1, "alpha": 0.6}
        switch = {"color": f"C{color}", "linestyle": ":", "linewidth": 1}
        sigmas = plan.sigmas[:-1]
        levels.plot(sigmas, label=f"{plan.num_inference_steps} evaluations, {plan.solver}", **solid)
        levels.axvline(plan.switch_index, **switch)
        if "curvature" in plan.provenance:
            errors, curvature = others
            found = plan.provenance
            levels.plot(found["karras_sigmas"][:-1], **dashed)
            errors.plot(sigmas[:-1], found["eta"][:-1], **solid)
            errors.plot(found["karras_sigmas"][:-2], found["karras_eta"][:-1], **dashed)
            curvature.plot(sigmas[1:], found["curvature"][1:], **solid)
            curvature.axvline(sigmas[plan.switch_index], **switch)
    if measured:
        levels.plot([], [], color="0.5", linestyle="--", linewidth=1, label="spaced by Karras")
    levels.set(title="Noise levels", xlabel="step", ylabel="sigma", yscale="log")
    levels.legend(fontsize=8)
    if measured:
        errors.set(title="Error of each step", xlabel="sigma", ylabel="eta (RMS)", xscale="log", yscale="log")
        curvature.set(title="Curvature, and where second order begins", xlabel="sigma", xscale="log", yscale="log")
        curvature.set_ylabel("relative, 1 / sigma")
    _save(figure, path)


def _draw_times(axis: Axes, scheduler: ODEScheduler, step_counts: Sequence[int]) -> None:
    """Two rows for each step count: the scheduler's, and those of Diffusers' DPM-Solver++ 2M for the same network."""
    noise_schedule = scheduler.noise_schedule(SOME_SHIFT)
    schedulers = {type(scheduler).__name__: scheduler, "DPM-Solver++ 2M": dpm_solver(scheduler)}
    rows = {
        f"{n} steps, {name}": TimeGrid.of(some, n, noise_schedule)
        for n in step_counts
        for name, some in schedulers.items()
    }
    drawn = torch.cat([torch.cat([grid.log_snr, grid.evaluation_log_snr]) for grid in rows.values()])
    low, high = (f(drawn[drawn.isfinite()]).item() for f in (torch.min, torch.max))
    # Flow matching begins where there is no signal at all, and Diffusers' sampling ends where there is no noise.
    ends = low - 2, high + 2
    for row, grid in enumerate(rows.values()):
        own = row % 2 == 0
        states, told = (values.clamp(*ends) for values in (grid.log_snr, grid.evaluation_log_snr))
        color = "C0" if own else "0.55"
        axis.plot(
            states, [row] * len(states), color=color, marker="o", linewidth=0.7, label="state" if row == 0 else ""
        )
        color = "C3" if own else "0.2"
        label = "evaluation" if row == 0 else ""
        axis.plot(told, [row] * len(told), color=color, marker="x", linewidth=0, label=label, zorder=3)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    ticks = {tick: f"{tick:g}" for tick in MaxNLocator(10).tick_values(low, high) if low <= tick <= high}
    ticks |= {end: f"{value}" for end, value in zip(ends, (-torch.inf, torch.inf)) if (drawn == value).any()}
    axis.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    axis.set(xlim=(ends[0] - 0.5, ends[1] + 0.5), ylim=(len(rows) - 0.5, -0.6))
    axis.set_xlabel("log-SNR, log(alpha\u00b2 / sigma\u00b2)", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)


def dpm_solver(scheduler: ODEScheduler) -> DPMSolverMultistepScheduler | EDMDPMSolverMultistepScheduler:
    """Diffusers' DPM-Solver++ 2M for the network of a scheduler of this package, with steps that start from pure noise."""
    config, noise_schedule = scheduler.config, scheduler.noise_schedule(SOME_SHIFT)
    settings = {**config, "solver_order": 2, "timestep_spacing": "trailing"}
    if config.sigma_data is not None:
        settings["sigma_max"] = noise_schedule.diffusers_sigma(torch.tensor(1.0, dtype=torch.float64)).item()
    elif not config.use_flow_sigmas:
        # It does not know all kinds of betas by name.
        kept = scheduler.alphas_cumprod.double()
        betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
        settings |= {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    scheduler_class = DPMSolverMultistepScheduler if config.sigma_data is None else EDMDPMSolverMultistepScheduler
    known = inspect.signature(scheduler_class).parameters.keys()
    return scheduler_class(**{name: value for name, value in settings.items() if name in known})


def _times_height(step_counts: Sequence[int]) -> float:
    return 1.1 + 2 * ROW_HEIGHT * len(step_counts)


def _draw_tables(axes: Sequence[Axes], solvers: dict[str, GeneralizedSolver], noise_schedule: NoiseSchedule) -> None:
    """What each step adds up, one heat map for each solver with the same colours, written into the cells."""
    tables = {title: solver.table(noise_schedule).folded().detach() for title, solver in solvers.items()}
    largest = max(1.0, *(table.abs().max().item() for table in tables.values()))
    for axis, (title, table) in zip(axes, tables.items()):
        n = len(table)
        axis.imshow(table, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        for k in range(n):
            for column in range(3 + k):
                value = table[k, column].item()
                color = "white" if abs(value) > 0.6 * largest else "black" if value else "0.7"
                axis.text(column, k, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=color)
        axis.set_xticks(range(n + 2), table_columns(n), fontsize=7)
        axis.set_yticks(range(n), [f"x[{k + 1}]" for k in range(n)], fontsize=7)
        axis.tick_params(length=0, labeltop=True, labelbottom=False)
        axis.set_title(title, fontsize=9)
    for axis in axes[len(tables) :]:
        axis.axis("off")


def table_columns(num_inference_steps: int) -> list[str]:
    """What the columns of a solver's folded table multiply."""
    return ["x[k]", "x[0]", *(f"D[{j}]" for j in range(num_inference_steps))]


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix.removeprefix(".") or "png")
