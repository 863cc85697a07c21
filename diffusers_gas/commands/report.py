"""What a training shows: pictures on the way, and in the end a table and a picture against Diffusers' schedulers."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin

from ..comparison import (
    NUM_OTHERS,
    Row,
    compare,
    errors_to_teacher,
    few_step_rivals,
    markdown_table,
    relative_detail,
)
from ..generalized_solver import GeneralizedSolver
from ..noise_schedules import NoiseSchedule
from ..pipelines.driving import scheduler_config
from ..schedulers.scheduling_gas import GASScheduler
from ..utils.files import write_text
from ..utils.tensors import FLOAT64
from .common import draw_images, push_to_hub, reporting
from .run import Run


def draw_validation(run: Run, solver: GeneralizedSolver, step: int) -> None:
    """The teacher's images above a solver's, in the output folder and for the trackers; these get the solver, too."""
    if not run.accelerator.is_main_process:
        return
    n, data = solver.num_inference_steps, run.data
    scheduler = GASScheduler.from_config(scheduler_config(data.pipe))
    scheduler.add_solver(solver)
    run.log(n, solver_values(solver, scheduler.noise_schedule(mu=1.0)), step)
    path = Path(run.settings.output_dir) / "validation" / f"{n}_steps-{step}.png"
    rows = None
    with reporting("picture"):
        rows = draw_images(path, lambda: {"teacher": data.teacher_images, "student": data.images(scheduler, n)})
    if rows is None:
        return
    # Trackers ask for bytes and three channels.
    batches = {f"{n}_steps/{label}": (np.stack(row) * 255).round().astype(np.uint8) for label, row in rows.items()}
    batches = {name: np.broadcast_to(batch, (*batch.shape[:3], 3)) for name, batch in batches.items()}
    for tracker in run.accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            with reporting(f"picture in {tracker.name}"):
                tracker.log_images(batches, step=run.logged_step, **layout)


def solver_values(solver: GeneralizedSolver, noise_schedule: NoiseSchedule) -> dict[str, float]:
    """A solver's times and weights by their names, x[k+1] = a[k] x[k] + u[k] x[0] + sum_j U[k,j] D[j]."""
    with torch.no_grad():
        table = solver.table(noise_schedule)
    values = {f"times/{k}": t for k, t in enumerate(table.times.tolist())}
    values |= {f"evaluation_times/{k}": t for k, t in enumerate(table.evaluation_times.tolist())}
    for k, (newest, first, *predictions) in enumerate(table.weights.tolist()):
        values |= {f"a/{k}": newest, f"u/{k}": first}
        values |= {f"U/{k}_{j}": weight for j, weight in enumerate(predictions[: k + 1])}
    return values


def report(run: Run) -> None:
    """Compares the fitted solvers, from the folder as a user would load it, with few-step schedulers of Diffusers.

    Table, picture and upload may each fail on their own. The solvers are saved before. Without samples to compare there is
    neither table nor picture.
    """
    settings, output_dir = run.settings, Path(run.settings.output_dir)
    ours = GASScheduler.from_pretrained(run.solvers.path)
    label = "GAS (ours)" if settings.loss == "gas" else "GS (ours)"
    rivals: dict[str, SchedulerMixin] = {}
    table, best, drawn = "", None, None
    picture = output_dir / "comparison.png"
    if settings.num_compared_samples > 0:
        with reporting("table"):
            rivals = few_step_rivals(run.data.pipe)
            table, best = compare_with(run, rivals, ours, label)
        if run.accelerator.is_main_process:
            with reporting("picture"):
                drawn = draw_comparison(
                    run, picture, {label: ours} if best is None else {best: rivals[best], label: ours}
                )
    if not run.accelerator.is_main_process:
        return
    if drawn:
        run.print(f"Picture:   {picture}")
    run.print(f"Cost:      {run.data.shown_evaluations} network evaluations for table and pictures")
    run.print(f"Scheduler: {run.solvers.path}")
    if settings.push_to_hub:
        text = ""
        if table:
            text = (
                "Mean squared distance and mean absolute difference to the teacher on held-out samples, and the power of fine detail "
                "relative to the teacher's (more is grain, less is blur), beside the closest of Diffusers' training-free "
                f"schedulers:\n\n{table}\n"
            )
        if drawn:
            text += "\nThe same noise under the teacher, the closest of those and this solver:"
        with reporting("upload"):
            push_to_hub(settings, output_dir, ours, text, picture if drawn else None)


def compare_with(
    run: Run, rivals: Mapping[str, SchedulerMixin], ours: GASScheduler, label: str
) -> tuple[str, str | None]:
    """Measures and prints the table; returns it, and the closest rival at the fewest steps if there is one."""
    settings, pipe, output_dir = run.settings, run.data.pipe, Path(run.settings.output_dir)
    steps = list(run.fits)
    samples = run.data.compared()
    num_samples = int(run.reduce(torch.tensor([float(len(samples))], **FLOAT64)).item())
    common: dict[str, Any] = {"samples": samples, "batch_size": run.data.batch_size, "reduce": run.reduce}
    others = compare(pipe, rivals, steps, **common)
    rows = [Row(n, label, *errors_to_teacher(pipe, ours, n, **common)) for n in steps]
    run.data.shown_evaluations += num_samples * (
        run.data.teacher_evaluations + sum(row.num_inference_steps for row in rows + others)
    )
    best = next((row.scheduler for row in others if row.num_inference_steps == steps[0]), None)
    if not run.accelerator.is_main_process:
        return "", best
    with reporting("detail in the table"):
        rows, others = (with_detail(run, some, {**rivals, label: ours}) for some in (rows, others))
    table = markdown_table(rows, others)
    run.print(
        f"\nMean squared distance and mean absolute difference to the teacher on {num_samples} held-out samples, and the power of "
        f"fine detail in images relative to the teacher's (more is grain, less is blur):\n\n{table}\n"
    )
    write_text(output_dir / "comparison.md", table + "\n")
    results = {
        "arguments": settings.public,
        "num_compared_samples": num_samples,
        "shown_evaluations": run.data.shown_evaluations,
        "fits": run.fits,
        "ours": list(map(asdict, rows)),
        "others": list(map(asdict, others)),
    }
    write_text(output_dir / "comparison.json", json.dumps(results, indent=2) + "\n")
    return table, best


def with_detail(run: Run, rows: Sequence[Row], schedulers: Mapping[str, SchedulerMixin]) -> list[Row]:
    """Rows, those that the table shows with the detail of the pictured samples."""
    found, shown = [], Counter[int]()
    for row in rows:
        n = row.num_inference_steps
        shown[n] += 1
        if shown[n] <= NUM_OTHERS:
            images = run.data.images(schedulers[row.scheduler], n)
            row = replace(row, detail=relative_detail(images, run.data.teacher_images))
        found.append(row)
    return found


def draw_comparison(run: Run, path: Path, schedulers: Mapping[str, SchedulerMixin]) -> Any:
    """Draws the same noise under the teacher and under schedulers at the fewest steps."""
    n, data = next(iter(run.fits)), run.data
    teacher = f"teacher, {run.settings.teacher_num_inference_steps} steps"
    return draw_images(
        path,
        lambda: {
            teacher: data.teacher_images,
            **{f"{name}, {n} steps": data.images(scheduler, n) for name, scheduler in schedulers.items()},
        },
        [str(sample.get("prompt", "")) for sample in data.pictured.per_sample],
    )
