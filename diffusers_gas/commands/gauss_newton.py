"""Gauss-Newton in train_gas.py."""

from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from itertools import count
from typing import Any

from ..distillation.gauss_newton import Iteration, best_initial_solver, distill_gauss_newton
from ..distillation.losses import Loss
from ..generalized_solver import GeneralizedSolver
from ..pipelines.teacher import TeacherSamples
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_sdm import SDMScheduler
from .run import Run, SolverFolder
from .tracking import Interrupt, log


def distil(run: Run, folder: SolverFolder, loss: Loss, num_inference_steps: int, keep_improvements: bool) -> bool:
    """Distils and saves one solver by Gauss-Newton; `False` if it was interrupted.

    Args:
        run: The run.
        folder: Where the solver goes; one that is there already is where the fit starts.
        loss: What to minimise.
        num_inference_steps: Steps of the solver.
        keep_improvements: Whether every better solver is saved, and not the last one of a fit that ended by itself alone.
    """
    args, n, accelerator = run.args, num_inference_steps, run.accelerator
    common = {"loss": loss, "batch_size": args.train_batch_size, "reduce": run.reduce}
    training, validation = run.share(run.training_samples), run.share(run.validation_samples)
    start = folder.get(n) or _gauss_newton_start(run, folder, n, training, common)

    run.start_stage()
    numbers = count(1)

    def record(iteration: Iteration) -> None:
        values = {f"gauss_newton/{name}": value for name, value in asdict(iteration).items()}
        log(accelerator, n, values, run.log_step(next(numbers)))

    # A process alone may be interrupted anywhere, several must agree.
    alone = accelerator.num_processes == 1
    with nullcontext() if alone else Interrupt(run.reduce) as interrupt:
        result = distill_gauss_newton(
            run.pipe,
            start,
            training,
            validation,
            max_iterations=args.max_train_iterations,
            max_seconds=args.max_train_seconds,
            on_improvement=partial(run.save, folder) if keep_improvements else None,
            on_iteration=record,
            interrupted=None if alone else interrupt.requested,
            **common,
        )
    if result.interrupted and not keep_improvements:
        return False
    run.save(folder, result.solver, distance=result.distance)
    if args.report_to is not None:
        run.picture(result.solver, next(numbers))
    run.reports[n] = {
        "initial_distance": result.initial_distance,
        "distance": result.distance,
        "evaluations": result.evaluations * accelerator.num_processes,
        "seconds": result.seconds,
    }
    run.print(
        f"{n} steps: held-out distance {result.initial_distance:.5f} -> {result.distance:.5f} with "
        f"{run.reports[n]['evaluations']} network evaluations in {result.seconds:.0f} s"
    )
    return not result.interrupted


def _gauss_newton_start(
    run: Run, folder: SolverFolder, num_inference_steps: int, training: TeacherSamples, common: dict[str, Any]
) -> GeneralizedSolver:
    if run.args.initialize_from is not None:
        return solver_from(run.args.initialize_from, num_inference_steps)
    fewer = folder.get(num_inference_steps - 1)
    warm = [] if fewer is None else [fewer.with_one_more_step()]
    return best_initial_solver(run.pipe, num_inference_steps, training, further_candidates=warm, **common)


def solver_from(path: str, num_inference_steps: int) -> GeneralizedSolver:
    """The solver that a scheduler of ours has for a step count, or the one that its time steps make."""
    config = GASScheduler.load_config(path)
    if config["_class_name"] == SDMScheduler.__name__:
        return SDMScheduler.from_pretrained(path).initial_solver(num_inference_steps)
    solvers = GASScheduler.from_pretrained(path).solvers
    if num_inference_steps not in solvers:
        raise ValueError(f"{path} has solvers for {sorted(solvers)} steps, none for {num_inference_steps}.")
    return solvers[num_inference_steps]
