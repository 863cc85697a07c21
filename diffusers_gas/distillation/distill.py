"""Distillation in one call: from a pipeline to a scheduler with solvers for it."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DiffusionPipeline,
    SchedulerMixin,
)

from ..pipelines.driving import scheduler_config
from ..pipelines.inputs import TRAINING_SEED, SampleInputs
from ..pipelines.teacher import TeacherCache, default_teacher
from ..schedulers.scheduling_gas import GASScheduler
from .gauss_newton import best_initial_solver, distill_gauss_newton


# One sample in so many is held out.
HELD_OUT_SHARE = 5


def distill(
    pipe: DiffusionPipeline,
    num_inference_steps: Sequence[int] = (4,),
    *,
    inputs: SampleInputs | None = None,
    teacher: SchedulerMixin | None = None,
    teacher_num_inference_steps: int = 50,
    batch_size: int = 32,
    max_iterations: int = 60,
    cache_dir: str | os.PathLike | None = None,
    on_solver: Callable[[GASScheduler], None] | None = None,
    **pipeline_arguments: Any,
) -> GASScheduler:
    """Distils a solver for each number of steps from what a pipeline samples in many steps, by Gauss-Newton.

    The pipeline is only sampled, never differentiated. Ctrl-C during a fit ends it, and keeps the best solver so far. What
    `training/train_gas.py` does more: other losses and optimizers, several processes, comparison with other schedulers.

    Args:
        pipe: The pipeline; left as it is.
        num_inference_steps (`Sequence[int]`): Numbers of steps, which are network evaluations.
        inputs (`SampleInputs`, *optional*): Seeds and prompts to learn from, the last fifth of them to judge solvers by; by
            default 320 samples that all have the `pipeline_arguments`, e.g. `prompt="a fox", guidance_scale=5.0`.
        teacher (`SchedulerMixin`, *optional*): What the pipeline samples with; [`default_teacher`] by default.
        teacher_num_inference_steps (`int`): Its steps.
        batch_size (`int`): Samples per pipeline call.
        max_iterations (`int`): Of each fit, which ends by itself, too.
        cache_dir (`str` or `os.PathLike`, *optional*): A folder that keeps the teacher's samples for another call with the
            same weights.
        on_solver: Called with the scheduler after every solver, e.g. to save it.
        pipeline_arguments: Arguments of the pipeline's call, instead of `inputs`.

    Returns:
        [`GASScheduler`]: With the solvers, whose `provenance` has their distances to the teacher on the held-out samples.

    Raises:
        ValueError: If arguments contradict each other or samples are too few.
    """
    step_counts = sorted(set(num_inference_steps))
    if not step_counts or step_counts[0] < 1:
        raise ValueError(f"`num_inference_steps` must be numbers of steps of at least 1, got {step_counts}.")
    if inputs is not None and pipeline_arguments:
        raise ValueError(f"Pass {sorted(pipeline_arguments)} as part of `inputs`, not beside it.")
    inputs = SampleInputs.create(TRAINING_SEED, 320, **pipeline_arguments) if inputs is None else inputs
    if len(inputs) < 2:
        raise ValueError(
            f"`inputs` must be at least 2 samples, one to learn from and one to judge by, got {len(inputs)}."
        )
    teacher = default_teacher(pipe) if teacher is None else teacher
    name = str(pipe.name_or_path or type(pipe).__name__)
    with tempfile.TemporaryDirectory() as temporary:
        folder = temporary if cache_dir is None else cache_dir
        cache = TeacherCache(folder, f"{name} {pipe.dtype}", teacher, teacher_num_inference_steps)
        samples = cache.collect(pipe, inputs, batch_size, "Teacher")
    num_training = len(samples) - max(1, len(samples) // HELD_OUT_SHARE)
    training, held_out = samples[:num_training], samples[num_training:]
    provenance = {
        "teacher": Path(name).name if os.path.isdir(name) else name,
        "torch_dtype": str(pipe.dtype).removeprefix("torch."),
        "teacher_scheduler": type(teacher).__name__,
        "teacher_num_inference_steps": teacher_num_inference_steps,
        "pipeline_arguments": inputs.record(pipe),
        "optimizer": "gauss_newton",
        "loss": "l2",
        "num_teacher_samples": num_training,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers)},
    }
    scheduler = GASScheduler.from_config(scheduler_config(pipe))
    for n in step_counts:
        fewer = scheduler.solvers.get(n - 1)
        warm = [] if fewer is None else [fewer.with_one_more_step()]
        start = best_initial_solver(pipe, n, training, further_candidates=warm, batch_size=batch_size)
        result = distill_gauss_newton(
            pipe, start, training, held_out, batch_size=batch_size, max_iterations=max_iterations
        )
        result.solver.provenance = {
            **provenance,
            "initial_distance": result.initial_distance,
            "distance": result.distance,
        }
        scheduler.add_solver(result.solver)
        if on_solver is not None:
            on_solver(scheduler)
        if result.interrupted:
            break
    return scheduler
