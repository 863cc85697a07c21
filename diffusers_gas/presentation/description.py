"""Saved schedulers in words: tables of what their solvers or plans have learned, and of what made them."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from ..guided_solver import GuidedSolver
from ..noise_schedules import NoiseSchedule
from ..pipelines.named_schedulers import EXAMPLE_MU
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_sdm import SDMScheduler
from ..solver_table import SolverTable


# Coefficients that fit beside each other in 100 characters.
MOST_COLUMNS = 12
MOST_LISTED = 8  # longer lists appear as the number of their values
# What a calibrated plan has recorded along its steps. Pictures show it.
ALONG_STEPS = ("eta", "curvature", "karras_sigmas", "karras_eta", "measured_sigmas", "measured_curvature")

ORDERS = {2: "second", 3: "third"}


def followed_table(scheduler: GASScheduler, num_inference_steps: int) -> SolverTable:
    """The table that a scheduler follows: that of its learned solver, or of an untrained one."""
    n = num_inference_steps
    solver = scheduler.solvers.get(n) or scheduler.untrained_solver(n, EXAMPLE_MU)
    with torch.no_grad():
        return solver.table(scheduler.noise_schedule(EXAMPLE_MU))


def log_snr(noise_schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """log(alpha^2 / sigma^2), which is infinite where there is no noise."""
    return 2 * (noise_schedule.alpha(times) / noise_schedule.sigma(times).abs()).log()


def describe(scheduler: GASScheduler | SDMScheduler, step_counts: Sequence[int]) -> str:
    """Tables of a scheduler's solvers or plans, with what made them, at most 100 characters wide.

    For a number of network evaluations for which the scheduler has learned nothing, the table shows the untrained solver.
    """
    counts, sections = [n for n in step_counts if n in scheduler.learned], []
    made_by = provenance_table({n: scheduler.learned[n].provenance for n in counts})
    if made_by:
        sections.append("\n".join(["Made by\n", *(_provenance_line(name, counts, made_by[name]) for name in made_by)]))
    if scheduler.config.use_dynamic_shifting:
        sections.append(f"Times depend on the resolution; these are those of the shift mu = {EXAMPLE_MU}.")
    for n in step_counts:
        sections.append(_solver(scheduler, n) if isinstance(scheduler, GASScheduler) else _plan(scheduler, n))
    return "\n\n".join(sections)


def provenance_table(provenances: Mapping[int, Mapping[str, Any]]) -> dict[str, list[str]]:
    """A table of the provenances of solvers, by step count: for each entry's name the texts of all solvers."""
    columns = [
        _flat({name: value for name, value in provenance.items() if name not in ALONG_STEPS})
        for provenance in provenances.values()
    ]
    names = dict.fromkeys(name for column in columns for name in column)
    return {name.replace("_", " "): [column.get(name, "") for column in columns] for name in names}


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The entries of a nested record as texts. Empty entries are left out."""
    entries: dict[str, str] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            entries |= _flat(value, f"{prefix}{name}: ")
        elif value not in (None, "", []):
            entries[_one_line(f"{prefix}{name}")] = _one_line(value)
    return entries


def _one_line(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_one_line, value)) if len(value) <= MOST_LISTED else f"{len(value)} values"
    return " ".join((f"{value:.4g}" if isinstance(value, float) else str(value)).split())


def _provenance_line(name: str, step_counts: Sequence[int], values: Sequence[str]) -> str:
    """What made the solvers, by step count where they differ."""
    several = ", ".join(f"{value or '-'} ({n})" for n, value in zip(step_counts, values))
    return f"{name:<35} {values[0] if len(set(values)) == 1 else several}"


def _solver(scheduler: GASScheduler, n: int) -> str:
    noise_schedule, learned = scheduler.noise_schedule(EXAMPLE_MU), scheduler.solvers.get(n)
    what = "untrained, DPM-Solver++ theory" if learned is None else f"{learned.num_learned} learned numbers"
    if isinstance(learned, GuidedSolver):
        low, *_, high = learned.scales
        what += f", {learned.argument} {low:g} to {high:g}, shown for {learned.usual_scale:g}"
    table = followed_table(scheduler, n)
    times = {
        "k": [str(k) for k in range(n + 1)],
        "t": _formatted(table.times, ".4f"),
        "evaluation t": _formatted(table.evaluation_times, ".4f"),
        "model timestep": _formatted(noise_schedule.timestep(table.evaluation_times), ".5g"),
        "sigma": _formatted(noise_schedule.diffusers_sigma(table.times).abs(), ".4g"),
        "log-SNR": _formatted(log_snr(noise_schedule, table.times), ".2f"),
    }
    parts = [f"{n} steps: {what}", _table(times, gap=3), "x[k+1] = a[k] x[k] + u[k] x[0] + sum_j U[k,j] D[j]"]
    names = ["a[k]", "u[k]", *(f"U[k,{j}]" for j in range(n))]
    # Step k does not use predictions after it.
    columns = [
        [""] * max(0, j - 2) + _formatted(column[max(0, j - 2) :], ".4f") for j, column in enumerate(table.weights.T)
    ]
    for start in range(0, n + 2, MOST_COLUMNS):
        shown = slice(start, start + MOST_COLUMNS)
        parts.append(_table({"k": times["k"][:n], **dict(zip(names[shown], columns[shown]))}))
    return "\n\n".join(parts)


def _plan(scheduler: SDMScheduler, num_inference_steps: int) -> str:
    noise_schedule = scheduler.noise_schedule(EXAMPLE_MU)
    plan = scheduler.plan_for(num_inference_steps, EXAMPLE_MU)
    times = plan.times(noise_schedule)
    columns = {
        "step": [str(i) for i in range(plan.num_steps)],
        "t": _formatted(times, ".4f"),
        "model timestep": _formatted(noise_schedule.timestep(times), ".5g"),
        "sigma": _formatted(plan.sigmas[:-1], ".4g"),
        "log-SNR": _formatted(2 * noise_schedule.lambda_(times), ".2f"),
        "order": list(map(str, plan.orders)),
    }
    if "eta" in plan.provenance:
        # The last step has none, and there is no curvature before the first.
        columns["eta"] = [*_formatted(plan.provenance["eta"][:-1], ".3g"), "-"]
    if "curvature" in plan.provenance:
        columns["curvature"] = ["-", *_formatted(plan.provenance["curvature"][1:], ".3g")]
    highest = max(plan.orders)
    switch = f"of {ORDERS[highest]} order from step {plan.switch_index}" if highest > 1 else "all of first order"
    switch += "" if plan.blend == "step" else f" in a {plan.blend} blend"
    found = "interpolated, " if scheduler.near_plan(num_inference_steps) else "uncalibrated, "
    found = "" if num_inference_steps in scheduler.plans else found
    title = f"{num_inference_steps} evaluations: {found}{plan.num_steps} steps to sigma = 0, {plan.solver}, {switch}"
    return f"{title}\n\n{_table(columns, gap=3)}"


def _formatted(values: Tensor | Sequence[float], spec: str) -> list[str]:
    return [f"{value:{spec}}" for value in (values.tolist() if isinstance(values, Tensor) else values)]


def _table(columns: Mapping[str, Sequence[str]], gap: int = 1) -> str:
    """Columns of texts by their headings, aligned to the right. Shorter columns have empty cells at the end."""
    padded = zip_longest(*([name, *cells] for name, cells in columns.items()), fillvalue="")
    rows = list(padded)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [(" " * gap).join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
