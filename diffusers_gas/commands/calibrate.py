"""Finds where a diffusion pipeline's trajectories bend, and plans few-evaluation sampling accordingly. Trains nothing.

    diffusers-gas calibrate --pretrained_model_name_or_path some/model --prompts_file prompts.txt

In a checkout of the repository it works without arguments, on the model in examples/teachers/digits. The plans end up in
`{output_dir}/scheduler`, to be loaded with `SDMScheduler.from_pretrained`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibration import NUM_SAMPLES, calibrate, default_budget, summary
from ..pipelines.inputs import TRAINING_SEED
from ..pipelines.sampling import NoPicture
from ..presentation.description import describe
from ..schedulers.scheduling_sdm import SDMScheduler
from ..schedulers.sdm_plan import SOLVERS
from .arguments import HubSettings, PipelineSettings, TeacherSettings, argument, parse
from .common import draw, model_line, only_run, push_to_hub


TARGETS = ("ode", "teacher")


@dataclass
class CalibrationSettings(HubSettings, TeacherSettings, PipelineSettings):
    """The calibration."""

    target: str = argument(
        "ode", "what to come close to: the ODE's solution, or the teacher's samples", choices=TARGETS
    )
    num_inference_steps: Sequence[int] = argument((8, 12, 18), "numbers of network evaluations", type=int, nargs="+")
    solver: str | None = argument(None, "solver of the steps; by default the best one", choices=SOLVERS)
    num_samples: int = argument(NUM_SAMPLES, "samples to measure with, a third of them to report on")
    most_evaluations: int | None = argument(
        None, "network evaluations that a plan may take; by default 5000, and more from 13 on", type=int
    )
    batch_size: int = argument(32, "samples per pipeline call")
    output_dir: str = argument("sdm_output")
    seed: int = argument(TRAINING_SEED, "of the first sample")


def main(arguments: list[str] | None = None) -> None:
    settings = CalibrationSettings(**parse(CalibrationSettings, __doc__, arguments))
    with only_run(settings.output_dir):
        calibrate_all(settings)


def calibrate_all(settings: CalibrationSettings) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    pipe, output_dir = settings.load_pipeline(device or torch.device("cpu")), Path(settings.output_dir)
    pipe.set_progress_bar_config(disable=True)
    step_counts, folder = sorted(set(settings.num_inference_steps)), output_dir / "scheduler"
    if settings.target == "ode" and settings.teacher_scheduler is not None:
        raise ValueError(
            f"`--teacher_scheduler {settings.teacher_scheduler}` is for `--target teacher`: add that, or leave it out."
        )
    teacher = settings.load_teacher(pipe) if settings.target == "teacher" else None
    budgets = [str(settings.most_evaluations or default_budget(n)) for n in step_counts]
    target = "a fine solution of the ODE"
    if teacher is not None:
        target = f"the samples of {type(teacher).__name__} in {settings.teacher_num_inference_steps} steps"
    print(
        f"Model:     {model_line(settings, pipe)}\n"
        f"Samples:   {settings.num_samples}\n"
        f"Target:    {target}\n"
        f"Plans:     {step_counts} network evaluations\n"
        f"Price:     at most {', '.join(budgets)} network evaluations\n"
        f"Output:    {folder}\n",
        flush=True,
    )
    earlier = SDMScheduler.from_pretrained(folder) if folder.is_dir() else None
    scheduler = calibrate(
        pipe,
        step_counts,
        inputs=settings.sample_inputs(pipe, settings.seed, settings.num_samples),
        teacher=teacher,
        teacher_num_inference_steps=settings.teacher_num_inference_steps,
        batch_size=settings.batch_size,
        solvers=SOLVERS if settings.solver is None else (settings.solver,),
        most_evaluations=settings.most_evaluations,
        resume_from=earlier,
        on_plan=lambda scheduler: scheduler.save_pretrained(folder),
        provenance=settings.provenance(),
    )
    scheduler.save_pretrained(folder)
    results = (
        f"Squared distances to {target}, on samples that were not used to choose, with those of DPM-Solver++ 2M\n"
        "on trailing steps. The cost is the number of network evaluations that it took to find the plan.\n\n"
        f"{summary(scheduler)}\n"
    )
    print(f"\n{describe(scheduler, step_counts)}\n\n{results}")
    figure = output_dir / "calibration.png"
    drawn = True
    try:
        draw(scheduler, step_counts, figure)
        print(f"Figure:    {figure}")
    except NoPicture as error:
        drawn = False
        print(error)
    print(f"Scheduler: {folder}")
    if settings.push_to_hub:
        push_to_hub(settings, output_dir, scheduler, results, figure if drawn else None)
