"""Finds where a diffusion pipeline's trajectories bend, and plans few-evaluation sampling accordingly. Trains nothing.

    diffusers-gas calibrate --pretrained_model_name_or_path some/model --prompts_file prompts.txt

The script training/calibrate_sdm.py works without arguments, on the model in examples/teachers/digits. The plans end up in
`{output_dir}/scheduler`, to be loaded with `SDMScheduler.from_pretrained`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..calibration import NUM_SAMPLES, calibrate, default_budget, summary
from ..pipelines.inputs import TRAINING_SEED
from ..presentation.description import describe
from ..schedulers.scheduling_sdm import SDMScheduler
from ..schedulers.sdm_plan import SOLVERS
from .arguments import HubSettings, PipelineSettings, TeacherSettings, parse
from .processes import exclusive_folder, process_state
from .reporting import describe_model, draw_scheduler, errors_as_warnings, push_to_hub


@dataclass
class CalibrationSettings(HubSettings, TeacherSettings, PipelineSettings):
    """The calibration.

    Args:
        target: What to come close to: the ODE's solution, or the teacher's samples.
        num_inference_steps: Numbers of network evaluations.
        solver: Solver of the steps; by default the best one.
        num_samples: Samples to measure with, a third of them to report on.
        most_evaluations: Network evaluations that a plan may take; by default 5000, and more from 13 on.
        batch_size: Samples per pipeline call.
        output_dir: The folder of the results.
        seed: Of the first sample.
    """

    target: Literal["ode", "teacher"] = "ode"
    num_inference_steps: Sequence[int] = (8, 12, 18)
    solver: str | None = field(default=None, metadata={"choices": SOLVERS})
    num_samples: int = NUM_SAMPLES
    most_evaluations: int | None = None
    batch_size: int = 32
    output_dir: str = "sdm_output"
    seed: int = TRAINING_SEED


def main(words: list[str] | None = None, model: Mapping[str, Any] | None = None) -> None:
    """Plans the steps for each number of evaluations, and shows what they gain. Arguments are those of [`parse`]."""
    settings = CalibrationSettings(**parse(CalibrationSettings, __doc__, words, model))
    if (number := process_state().num_processes) > 1:
        raise ValueError(
            f"A calibration takes one process, got {number}, which would all do the same: start it without a launcher."
        )
    with exclusive_folder(settings.output_dir):
        plan_steps(settings)


def plan_steps(settings: CalibrationSettings) -> None:
    """From the pipeline to the plans, their table and their figure."""
    pipe, output_dir = settings.load_pipeline(process_state().device), Path(settings.output_dir)
    pipe.set_progress_bar_config(disable=True)
    step_counts, folder = sorted(set(settings.num_inference_steps)), output_dir / "scheduler"
    if settings.target == "ode" and settings.teacher_scheduler is not None:
        raise ValueError("`--teacher_scheduler` is for `--target teacher`: add that, or leave it out.")
    teacher = settings.load_teacher(pipe) if settings.target == "teacher" else None
    settings.create_repository(output_dir)
    budgets = [str(settings.most_evaluations or default_budget(n)) for n in step_counts]
    target = "a fine solution of the ODE"
    if teacher is not None:
        target = f"the samples of {type(teacher).__name__} in {settings.teacher_num_inference_steps} steps"
    print(
        f"Model:     {describe_model(pipe)}\n"
        f"Samples:   {settings.num_samples}\n"
        f"Target:    {target}\n"
        f"Plans:     {step_counts} network evaluations\n"
        f"Price:     at most {', '.join(budgets)} network evaluations\n"
        f"Output:    {folder}\n",
        flush=True,
    )
    # A run that is killed in its first save leaves a folder without a config.
    earlier = SDMScheduler.from_pretrained(folder) if (folder / SDMScheduler.config_name).exists() else None
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
    figure = None
    with errors_as_warnings("figure"):
        draw_scheduler(scheduler, step_counts, output_dir / "calibration.png")
        figure = output_dir / "calibration.png"
        print(f"Figure:    {figure}")
    print(f"Scheduler: {folder}")
    if settings.push_to_hub:
        push_to_hub(settings, output_dir, scheduler, results, figure)
