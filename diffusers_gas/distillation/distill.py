"""Gauss-Newton distillation: from a pipeline to a scheduler with solvers for it, in one call or solver by solver."""

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging

from ..generalized_solver import GeneralizedSolver
from ..guided_solver import GuidedSolver
from ..pipelines.driving import scheduler_config
from ..pipelines.inputs import BatchSize, SampleInputs, default_guidance, whole_number, whole_numbers
from ..pipelines.teacher import (
    CHECKED_STEPS,
    LAZY_SHARD_SIZE,
    LazyTeacherSamples,
    TeacherCache,
    TeacherSamples,
    check_driven,
    check_teacher,
    default_teacher,
    errors_to_teacher,
    evaluations_per_sample,
    provenance_of_fit,
    rounding,
)
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_utils import ODEScheduler
from .gauss_newton import GaussNewtonResult, Problem, best_initial_solver, distill_gauss_newton, most_evaluations


logger = logging.get_logger(__name__)

# Samples that are held out: of few, one in so many.
NUM_HELD_OUT, HELD_OUT_SHARE = 32, 5

# A solver for a range of guidance scales has at most so many knots. Samples of further scales tie them together.
MOST_KNOTS = 3


@torch.inference_mode(False)  # in which there are gradients, whatever is set outside
def distill(
    pipe: DiffusionPipeline,
    num_inference_steps: int | Sequence[int] = 4,
    *,
    inputs: SampleInputs | None = None,
    teacher: SchedulerMixin | None = None,
    teacher_num_inference_steps: int = 50,
    initialize_from: ODEScheduler | None = None,
    batch_size: int = 32,
    detail: bool = True,
    max_evaluations: int | None = None,
    max_iterations: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    on_solver: Callable[[GASScheduler], None] | None = None,
    **pipeline_arguments: Any,
) -> GASScheduler:
    """Distills solvers from what a pipeline samples in many steps, by Gauss-Newton (Levenberg-Marquardt).

    The pipeline is only sampled, never differentiated. Ctrl-C ends a fit and the call, and keeps the best solvers so far. So
    does an error in a later fit, with a warning. The command `diffusers-gas train` has more: other losses and optimizers,
    several processes, a comparison with other schedulers. With a feature cache (`pipe.transformer.enable_cache`) the solvers
    make up for it, and the teacher samples without.

    Args:
        pipe: The pipeline; left as it is.
        num_inference_steps (`int` or `Sequence[int]`, defaults to 4): Numbers of steps, which are network evaluations.
        inputs (`SampleInputs`, *optional*): Seeds and prompts of the samples. The last of them, a fifth but at most
            `NUM_HELD_OUT`, are held out to judge solvers by. Of the others a fit takes the first, as many as it needs, mostly
            less than a hundred. The default is 1024 samples that all have the `pipeline_arguments`.
        teacher (`SchedulerMixin`, *optional*): The scheduler that the teacher samples with; [`default_teacher`] by default.
        teacher_num_inference_steps (`int`, defaults to 50): The teacher's steps.
        initialize_from (`GASScheduler` or `SDMScheduler`, *optional*): A scheduler whose solvers (GS) or time steps (SDM)
            the fits start from. By default a fit starts from the best of several theory solvers and the fitted solver of
            one step less.
        batch_size (`int`, defaults to 32): The most samples per pipeline call. It is halved where memory runs out.
        detail (`bool`, defaults to `True`): Whether a second phase, in which the absolute error counts, too, removes the faint grain
            that the least squared distance leaves.
        max_evaluations (`int`, *optional*): The most network evaluations for a solver, the teacher's included; by default about 18
            thousand for 4 steps, 38 for 6, 77 for 8. A fit also ends by itself when it has converged.
        max_iterations (`int`, *optional*): The most iterations of a fit.
        cache_dir (`str` or `os.PathLike`, *optional*): A folder that keeps the teacher's samples for further calls with the
            same weights.
        on_solver (`Callable`, *optional*): Called with the scheduler after every solver, e.g. to save it.
        pipeline_arguments: Arguments of the pipeline's call, instead of `inputs`, e.g. `prompt="a fox"`. The samples take the
            entries of a list of prompts, labels or embeddings in turn: `prompt=["a fox", "an owl"]`. Samples of several guidance
            scales, `guidance_scale=[2, 3, 4.5, 6.7, 10]`, make solvers for the whole range, each a [`GuidedSolver`].

    Returns:
        [`GASScheduler`]: With a solver for each number of steps. A solver's `provenance` says what made it and what was
        measured: `initial_distance` and `distance` (mean squared distances to the teacher's final states on the held-out
        samples, before and after the fit), `sampled_distance` (sampled by the plain pipeline to check the fit), `evaluations`
        of the network in all, those for the teacher's samples included, `teacher_images`, the number of images that the teacher
        samples with as many, `seconds`, and `num_teacher_samples` that were fitted to. A fit that
        ended before it had converged has `recent_gain`, the share by which its newest iterations lowered the loss.

    Raises:
        ValueError: If arguments contradict each other or are none of the pipeline's, if there are too few samples or evaluations, if the
            teacher is random or for another noise schedule, or if `initialize_from` has no solver for a number of steps.
    """
    step_counts = whole_numbers("num_inference_steps", num_inference_steps)
    teacher_num_inference_steps = whole_number("teacher_num_inference_steps", teacher_num_inference_steps)
    size = BatchSize(whole_number("batch_size", batch_size))
    if max_iterations is not None:
        max_iterations = whole_number("max_iterations", max_iterations, least=0)
    if max_evaluations is not None:
        max_evaluations = whole_number("max_evaluations", max_evaluations)
    inputs = SampleInputs.of_call(pipe, inputs, 1024, pipeline_arguments)
    if len(inputs) < 2:
        raise ValueError(f"`inputs` must be at least 2 samples, to learn from and to judge by, got {len(inputs)}.")
    teacher = default_teacher(pipe) if teacher is None else teacher
    check_teacher(pipe, teacher)
    num_training = len(inputs) - min(NUM_HELD_OUT, max(1, len(inputs) // HELD_OUT_SHARE))
    provenance = training_provenance(pipe, inputs[:num_training], teacher, teacher_num_inference_steps)
    knots = count_knots(inputs)  # refuses scales that no solver can be fitted to
    counts = evaluations_per_sample(teacher, teacher_num_inference_steps), num_training, len(inputs) - num_training
    for n in step_counts:  # refuses a limit that leaves no room for an iteration
        most_evaluations(n, *counts, max_iterations, max_evaluations=max_evaluations, knots=knots)
    if initialize_from is not None:
        for n in step_counts:
            initialize_from.initial_solver(n)  # refuses those that it has none for
    scheduler = GASScheduler.from_config(scheduler_config(pipe))
    check_driven(pipe, scheduler, scheduler.theory_solver(CHECKED_STEPS, mu=1.0), inputs)
    settings: dict[str, Any] = {"provenance": provenance, "initialize_from": initialize_from}
    settings |= {"detail": detail, "max_evaluations": max_evaluations, "max_iterations": max_iterations}
    with tempfile.TemporaryDirectory() as temporary:
        name = f"{pipe.name_or_path or type(pipe).__name__} {pipe.dtype}"
        steps = teacher_num_inference_steps
        cache = TeacherCache(cache_dir or temporary, name, teacher, steps, LAZY_SHARD_SIZE)
        training = LazyTeacherSamples(cache, pipe, inputs[:num_training], size, "Teacher")
        held_out = cache.collect(pipe, inputs[num_training:], size, "Held out")
        for n in step_counts:
            try:
                problem = Problem(pipe, batch_size=size)
                interrupted = distill_solver(problem, scheduler, n, training, held_out, **settings).interrupted
            except KeyboardInterrupt:  # before or after the fit itself
                if not scheduler.solvers:
                    raise
                interrupted = True
            except Exception as error:
                if n in scheduler.solvers and "distance" not in scheduler.solvers[n].provenance:
                    del scheduler.solvers[n]  # whose fit had not ended
                if not scheduler.solvers:
                    raise
                logger.warning(f"The fit for {n} steps ended by {error!r}. The solvers of the fits before are kept.")
                interrupted = True
            if on_solver is not None:
                on_solver(scheduler)
            if interrupted:
                break
    return scheduler


def distill_solver(
    problem: Problem,
    scheduler: GASScheduler,
    num_inference_steps: int,
    training: LazyTeacherSamples,
    held_out: TeacherSamples,
    *,
    provenance: Mapping[str, Any],
    initialize_from: ODEScheduler | None = None,
    on_improvement: Callable[[], None] = lambda: None,
    state: Mapping[str, Any] | None = None,
    **settings: Any,
) -> GaussNewtonResult:
    """Solves a new problem by Gauss-Newton and adds the solver to a scheduler, with what was measured in its `provenance`.

    The fit goes on from `state` if that is given. It starts from the scheduler's solver for this number of steps if there is
    one, else from that of `initialize_from`, else from the best of the theory solvers and the scheduler's solver of one step less. Whenever the
    scheduler has a better solver, `on_improvement` is called. Other arguments are those of [`distill_gauss_newton`].
    """
    start = scheduler.solvers.get(num_inference_steps)
    if state is not None:
        solver_class = GuidedSolver if "scales" in state["solver_config"] else GeneralizedSolver
        start = solver_class.from_tensors(state["solver"], **state["solver_config"])
    if start is None and initialize_from is not None:
        start = initialize_from.initial_solver(num_inference_steps)
    knots = guidance_knots(training.inputs)
    if start is None:
        fewer = scheduler.solvers.get(num_inference_steps - 1)
        warm = [] if fewer is None else [fewer.with_one_more_step()]
        start = best_initial_solver(problem, num_inference_steps, training, warm)
    if knots is not None:  # all start from one solver, so that they stay near each other
        argument, scales = knots
        start = GuidedSolver.through(start, scales, argument, default_guidance(problem.pipe).get(argument))
    elif isinstance(start, GuidedSolver):
        start = start.at(training.inputs.value(start.argument))

    def keep(solver: GeneralizedSolver | GuidedSolver, **measured: Any) -> None:
        solver.provenance = {**provenance, **measured}
        scheduler.add_solver(solver)
        on_improvement()

    teacher_evaluations = training.evaluations_per_sample
    settings |= {"teacher_num_inference_steps": teacher_evaluations, "on_improvement": keep, "state": state}
    result = distill_gauss_newton(problem, start, training, held_out, **settings)
    of_checks = num_inference_steps * len(held_out) + 2 * CHECKED_STEPS
    evaluations = result.evaluations + of_checks * problem.num_processes
    measured = {
        "initial_distance": result.initial_distance,
        "distance": result.distance,
        "num_teacher_samples": result.num_samples,
        "evaluations": evaluations,
        "teacher_images": evaluations // teacher_evaluations,
        "seconds": round(result.seconds, 1),
    }
    if result.recent_gain is not None:  # the fit ended before it had converged
        measured["recent_gain"] = round(result.recent_gain, 4)
    keep(result.solver, **measured)  # whatever the check meets
    sampled = check_by_sampling(problem, result.solver, held_out, result.distance)
    keep(result.solver, **measured, sampled_distance=sampled)
    return result


def guidance_knots(inputs: SampleInputs) -> tuple[str, list[float]] | None:
    """The argument for guidance that samples differ in, and the knots of a solver for the range of their scales.

    Raises:
        ValueError: If they differ in several such arguments, or a scale is not positive.
    """
    of_scales = inputs.guidance_range()
    if of_scales is None or len(of_scales[1]) <= MOST_KNOTS:
        return of_scales
    argument, scales = of_scales
    return argument, np.geomspace(scales[0], scales[-1], MOST_KNOTS).tolist()


def count_knots(inputs: SampleInputs) -> int:
    """How many solvers a solver for the samples consists of: one for each of its [`guidance_knots`]."""
    of_scales = guidance_knots(inputs)
    return 1 if of_scales is None else len(of_scales[1])


def check_by_sampling(
    problem: Problem, solver: GeneralizedSolver | GuidedSolver, samples: TeacherSamples, fitted: float
) -> float | None:
    """The distance to the teacher of samples of the plain pipeline, which should be what the fit has measured.

    A pipeline may treat a scheduler otherwise than the fit assumes. A difference is a warning with both numbers. If the
    pipeline cannot sample with the solver at all, that is a warning, too, and the distance is `None`.
    """
    pipe, n, options = problem.pipe, solver.num_inference_steps, (problem.batch_size, problem.reduce)
    scheduler = GASScheduler.from_config(scheduler_config(pipe))
    scheduler.add_solver(solver)
    try:
        sampled, _ = errors_to_teacher(pipe, scheduler, n, samples, *options)
    except Exception as error:  # the solver must not be lost by its check
        logger.warning(
            f"The plain {type(pipe).__name__} could not sample with the fitted solver ({type(error).__name__}: {error}). The "
            "solver is kept. Its distance to the teacher is that of the fit, and not checked."
        )
        return None
    if not math.isclose(fitted, sampled, rel_tol=rounding(pipe), abs_tol=1e-9):
        logger.warning(
            f"{type(pipe).__name__} does not sample what was fitted: the distance to the teacher is {sampled:.4g} in the plain "
            f"pipeline and was {fitted:.4g} in the fit. Do not trust this solver."
        )
    return sampled


def training_provenance(
    pipe: DiffusionPipeline,
    inputs: SampleInputs,
    teacher: SchedulerMixin,
    teacher_num_inference_steps: int,
    **record: Any,
) -> dict[str, Any]:
    """What solvers record of how they were made, in JSON's types and without paths of this machine.

    `inputs` are the samples to learn from. `record` has further entries, or others than those of the default method.
    """
    method = {"optimizer": "gauss_newton", "loss": "l2", "features": "states", "num_teacher_samples": len(inputs)}
    return {**provenance_of_fit(pipe, inputs, teacher, teacher_num_inference_steps), **method, **record}
