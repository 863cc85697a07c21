"""Distills few-step solvers from a diffusion pipeline, and shows what they gain.

    accelerate launch training/train_gas.py
    accelerate launch training/train_gas.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt
    accelerate launch -m diffusers_gas train --loss gas --num_inference_steps 4

Without arguments it distills a 4-step solver from the teacher in examples/teachers/digits. The solvers end up in
`{output_dir}/scheduler`, to be loaded with `GASScheduler.from_pretrained`. What the arguments mean, and which to choose, is
in training/README.md.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed

from ..comparison import MOST_RIVALS, NUM_OTHERS
from ..distillation.distill import check_cost
from ..distillation.gauss_newton import most_evaluations
from .adam import fit_by_adam, most_evaluations_by_adam, num_validations
from .arguments import parse
from .common import model_line, only_run, reporting, start_accelerator
from .gauss_newton import fit_by_gauss_newton
from .report import report
from .run import Run
from .train_settings import TrainSettings, method_defaults


def parse_args(arguments: list[str] | None = None) -> TrainSettings:
    given = parse(TrainSettings, __doc__, arguments)
    return TrainSettings(**{**method_defaults(given), **given})


def main(arguments: list[str] | None = None) -> None:
    """Fits a solver for each number of steps, and reports what they gain."""
    settings = parse_args(arguments)
    with only_run(settings.output_dir):
        accelerator = start(settings)
        run = Run(settings, accelerator)
        announce(run)
        for n in settings.num_inference_steps:
            by_adam = settings.optimizer == "adam"
            finished = fit_by_adam(run, n) if by_adam else fit_by_gauss_newton(run, run.solvers, run.loss, n)
            if not finished:
                break
        accelerator.wait_for_everyone()
        if run.fits:
            report(run)
        with reporting("end of the trackers"):
            accelerator.end_training()


def start(settings: TrainSettings) -> Accelerator:
    """Starts the processes and the trackers, and fills in the precision that the launcher has chosen."""
    if settings.report_to not in (None, "all", *map(str, get_available_trackers())):
        raise ValueError(
            f"`--report_to {settings.report_to}` needs the package {settings.report_to}, which is not installed."
        )
    logs = Path(settings.output_dir) / "logs"
    options = {"mixed_precision": settings.mixed_precision, "log_with": settings.report_to}
    accelerator = start_accelerator(project_dir=logs, **options)
    if settings.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if settings.torch_dtype is None:
        dtypes: dict[str, Any] = {"fp16": "float16", "bf16": "bfloat16"}
        settings.torch_dtype = dtypes.get(accelerator.mixed_precision, "float32")
    set_seed(settings.seed)
    if settings.report_to is not None:
        config = {name: str(value) for name, value in settings.public.items()}
        accelerator.init_trackers("gas", config, {"wandb": {"dir": str(logs)}})
    return accelerator


def announce(run: Run) -> None:
    """Prints what is going to be done."""
    settings, accelerator, data = run.settings, run.accelerator, run.data
    features = "" if settings.features == "states" else f" of {settings.features}"
    method = f"Gauss-Newton on the {settings.loss} distance{features}"
    if settings.optimizer == "adam":
        distance = f"{settings.distance} and an adversarial loss" if settings.loss == "gas" else settings.loss
        samples = settings.train_batch_size * accelerator.num_processes * settings.gradient_accumulation_steps
        method = (
            f"Adam on the {distance}{features}, {settings.max_train_steps} optimizer steps of {samples} samples, from the "
            f"{settings.initialize_from or settings.initialization} solver"
        )
    run.print(
        f"Teacher:   {model_line(settings, data.pipe)} in {settings.torch_dtype}, {type(data.teacher).__name__} with "
        f"{settings.teacher_num_inference_steps} steps\n"
        f"Samples:   {'' if settings.optimizer == 'adam' else 'at most '}{len(data.inputs)} to learn from, "
        f"{settings.num_validation_samples} held out, {settings.num_compared_samples} more for the table\n"
        f"Solvers:   {settings.num_inference_steps} steps, {method}\n"
        f"{announced_cost(run)}"
        f"Processes: {accelerator.num_processes} on {accelerator.device.type}\n"
        f"Output:    {run.solvers.path}, cached teacher samples beside it\n"
    )


def announced_cost(run: Run) -> str:
    """A line with the most network evaluations of each fit, and one with those of what is only shown."""
    settings, data, world = run.settings, run.data, run.accelerator.num_processes
    teacher, held_out, num_compared = (
        data.teacher_evaluations,
        settings.num_validation_samples,
        settings.num_compared_samples,
    )
    by_adam, steps = settings.optimizer == "adam", settings.num_inference_steps
    starts_from_fit = by_adam and settings.initialization == "gauss_newton" and run.initialize_from is None
    lines = []
    for n in steps:
        most = most_evaluations_by_adam(run, n) if by_adam else 0
        if not by_adam or starts_from_fit:
            limits = (settings.max_train_iterations, world, settings.max_train_evaluations, settings.detail)
            most += most_evaluations(n, teacher, len(data.inputs), held_out, *limits) + check_cost(n, held_out, world)
        lines.append(
            f"for {n} steps at most {most} network evaluations, as many as sampling {most // teacher} images with the teacher"
        )
    # Pictures in the output folder and for the trackers: one of each fit by Gauss-Newton, and of each validation of Adam.
    pictures = (num_validations(settings) if by_adam else 0) + (settings.report_to is not None)
    shown = len(data.pictured) * (teacher * (pictures > 0 or num_compared > 0) + pictures * sum(steps))
    if num_compared > 0:
        shown += num_compared * (teacher + (MOST_RIVALS + 1) * sum(steps))
        shown += len(data.pictured) * (2 * steps[0] + (NUM_OTHERS + 1) * sum(steps))
    lines.append(
        f"for table and pictures at most {shown}" + " (`--num_compared_samples 0` does without)" * (num_compared > 0)
    )
    return "".join(f"{'Cost:' if i == 0 else '':11}{line}\n" for i, line in enumerate(lines))
