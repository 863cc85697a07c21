"""What a training shows: pictures on the way, and in the end a table and a picture against Diffusers' schedulers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..comparison import (
    Row,
    compare,
    distance_to_teacher,
    markdown_table,
    training_free_schedulers,
)
from ..generalized_solver import GeneralizedSolver
from ..pipelines.driving import scheduler_config
from ..schedulers.scheduling_gas import GASScheduler
from ..utils.files import write_text
from .common import draw_images, push_to_hub
from .run import Run


def draw_validation(run: Run, solver: GeneralizedSolver, step: int) -> None:
    """The teacher's images above a solver's, in the output folder and for the trackers; these get the solver, too."""
    if not run.accelerator.is_main_process:
        return
    n, data = solver.num_inference_steps, run.data
    scheduler = GASScheduler.from_config(scheduler_config(data.pipe))
    scheduler.add_solver(solver)
    run.log.log_solver(scheduler, solver, step)
    path = Path(run.settings.output_dir) / "validation" / f"{n}_steps-{step}.png"
    images = draw_images(path, lambda: {"teacher": data.teacher_images, "student": data.images(scheduler, n)})
    if images is not None:
        run.log.log_images(n, images, step)


def report(run: Run) -> None:
    """Compares the fitted solvers, from the folder as a user would load it, with every few-step scheduler of Diffusers."""
    settings, pipe, output_dir = run.settings, run.data.pipe, Path(run.settings.output_dir)
    num_samples = min(settings.num_compared_samples, len(run.data.held_out))
    samples = run.data.share(run.data.held_out[:num_samples])
    ours = GASScheduler.from_pretrained(run.solvers.path)
    label, steps = "GAS (ours)" if settings.loss == "gas" else "GS (ours)", list(run.fits)
    common: dict[str, Any] = {"samples": samples, "batch_size": settings.train_batch_size, "reduce": run.reduce}
    rivals = training_free_schedulers(scheduler_config(pipe))
    others = compare(pipe, rivals, steps, **common)
    rows = [Row(n, label, distance_to_teacher(pipe, ours, n, **common)) for n in steps]
    if not run.accelerator.is_main_process:
        return
    table = markdown_table(rows, others)
    run.print(f"\nMean squared distance to the teacher on {num_samples} held-out samples:\n\n{table}\n")
    write_text(output_dir / "comparison.md", table + "\n")
    results = {
        "arguments": settings.public,
        "num_compared_samples": num_samples,
        "fits": run.fits,
        "ours": list(map(asdict, rows)),
        "others": list(map(asdict, others)),
    }
    write_text(output_dir / "comparison.json", json.dumps(results, indent=2) + "\n")
    n, picture, data = steps[0], output_dir / "comparison.png", run.data
    best = next(row.scheduler for row in others if row.num_inference_steps == n)
    drawn = draw_images(
        picture,
        lambda: {
            f"teacher, {settings.teacher_num_inference_steps} steps": data.teacher_images,
            f"{best}, {n} steps": data.images(rivals[best], n),
            f"{label}, {n} steps": data.images(ours, n),
        },
        [str(sample.get("prompt", "")) for sample in data.pictured.per_sample],
    )
    if drawn:
        run.print(f"Picture:   {picture}")
    run.print(f"Scheduler: {run.solvers.path}")
    if settings.push_to_hub:
        text = (
            "Mean squared distance to the teacher on held-out samples, beside the closest of Diffusers' training-free "
            f"schedulers:\n\n{table}\n"
        )
        if drawn:
            text += "\nThe same noise under the teacher, the closest of those and this solver:"
        push_to_hub(settings, output_dir, ours, text, picture if drawn else None)
