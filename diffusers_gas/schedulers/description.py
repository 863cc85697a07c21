"""Saved schedulers in words: tables of what their solvers or plans have learned, and of what made them."""

from collections.abc import Mapping, Sequence
from typing import Any

from .model_card import provenance_table
from .scheduling_gas import GASScheduler
from .scheduling_sdm import SDMScheduler
from .time_grids import SOME_SHIFT, TimeGrid


# Coefficients that fit beside each other in 100 characters.
MOST_COLUMNS = 12

ORDERS = {2: "second", 3: "third"}


def describe(scheduler: GASScheduler | SDMScheduler, step_counts: Sequence[int]) -> str:
    """Tables of a scheduler's solvers or plans, with what made them, at most 100 characters wide.

    For a number of network evaluations for which the scheduler has learned nothing, the table shows the untrained solver.
    """
    learned: Mapping[int, Any] = scheduler.solvers if isinstance(scheduler, GASScheduler) else scheduler.plans
    made_by = _made_by({n: learned[n].provenance for n in step_counts if n in learned})
    sections = [f"Made by\n\n{made_by}"] if made_by else []
    if scheduler.config.use_dynamic_shifting:
        sections.append(f"Times depend on the resolution; these are those of the shift mu = {SOME_SHIFT}.")
    for n in step_counts:
        sections.append(_solver(scheduler, n) if isinstance(scheduler, GASScheduler) else _plan(scheduler, n))
    return "\n\n".join(sections)


def _made_by(provenances: Mapping[int, Mapping[str, Any]]) -> str:
    """What made the solvers, by step count where they differ."""
    lines = []
    for name, values in provenance_table(provenances).items():
        several = ", ".join(f"{value or '-'} ({n})" for n, value in zip(provenances, values))
        lines.append(f"{name:<36}{values[0] if len(set(values)) == 1 else several}")
    return "\n".join(lines)


def _solver(scheduler: GASScheduler, num_inference_steps: int) -> str:
    n, noise_schedule = num_inference_steps, scheduler.noise_schedule(SOME_SHIFT)
    learned = scheduler.solvers.get(n)
    what = "untrained, DPM-Solver++ theory" if learned is None else f"{learned.num_learned} learned numbers"
    grid = TimeGrid.of(scheduler, n, noise_schedule)
    rows = [["k", "t", "evaluation t", "model timestep", "sigma", "log-SNR"]]
    for k in range(n + 1):
        told = [f"{grid.evaluation_times[k]:.4f}", f"{grid.timesteps[k]:.5g}"] if k < n else ["", ""]
        rows.append([f"{k}", f"{grid.times[k]:.4f}", *told, f"{grid.sigmas[k]:.4g}", f"{grid.log_snr[k]:.2f}"])
    parts = [f"{n} steps: {what}", _aligned(rows, gap=3), "x[k+1] = a[k] x[k] + u[k] x[0] + sum_j U[k,j] D[j]"]

    weights = (learned or scheduler.theory_solver(n, SOME_SHIFT)).table(noise_schedule).weights.tolist()
    table = [["a[k]", "u[k]", *(f"U[k,{j}]" for j in range(n))]]
    table += [[f"{weight:.4f}" for weight in row[: 3 + k]] + [""] * (n - 1 - k) for k, row in enumerate(weights)]
    labels = ["k", *map(str, range(n))]
    for start in range(0, n + 2, MOST_COLUMNS):
        parts.append(_aligned([[label, *row[start : start + MOST_COLUMNS]] for label, row in zip(labels, table)]))
    return "\n\n".join(parts)


def _plan(scheduler: SDMScheduler, num_inference_steps: int) -> str:
    noise_schedule = scheduler.noise_schedule(SOME_SHIFT)
    calibrated = scheduler.plans.get(num_inference_steps)
    plan = calibrated or scheduler.published_plan(num_inference_steps, SOME_SHIFT)
    times = plan.times(noise_schedule)
    columns = {
        "step": [f"{i}" for i in range(plan.num_steps)],
        "t": [f"{t:.4f}" for t in times.tolist()],
        "model timestep": [f"{timestep:.5g}" for timestep in noise_schedule.timestep(times).tolist()],
        "sigma": [f"{sigma:.4g}" for sigma in plan.sigmas.tolist()[:-1]],
        "log-SNR": [f"{value:.2f}" for value in (2 * noise_schedule.lambda_(times)).tolist()],
        "order": [f"{order}" for order in plan.orders],
    }
    if "eta" in plan.provenance:
        # The last step has none, and there is no curvature before the first.
        columns["eta"] = [*(f"{value:.3g}" for value in plan.provenance["eta"][:-1]), "-"]
    if "curvature" in plan.provenance:
        columns["curvature"] = ["-", *(f"{value:.3g}" for value in plan.provenance["curvature"][1:])]
    highest = max(plan.orders)
    switch = f"of {ORDERS[highest]} order from step {plan.switch_index}" if highest > 1 else "all of first order"
    switch += "" if plan.blend == "step" else f" in a {plan.blend} blend"
    what = "" if calibrated else "uncalibrated, "
    title = f"{num_inference_steps} evaluations: {what}{plan.num_steps} steps to sigma = 0, {plan.solver}, {switch}"
    rows = [list(columns), *map(list, zip(*columns.values()))]
    return f"{title}\n\n{_aligned(rows, gap=3)}"


def _aligned(rows: Sequence[Sequence[str]], gap: int = 1) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [(" " * gap).join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
