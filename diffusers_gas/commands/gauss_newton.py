"""Gauss-Newton in a training: progress, interruptions and saving around the fit that `diffusers_gas.distill` makes, too."""

from contextlib import nullcontext
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from ..distillation.checkpoints import Checkpoints
from ..distillation.distill import distill_solver
from ..distillation.gauss_newton import Iteration
from ..distillation.losses import Loss
from .common import deferred_interrupt
from .report import draw_validation
from .run import Run, SolverFolder, check_same_training


def fit_by_gauss_newton(
    run: Run, solvers: SolverFolder, loss: Loss, num_inference_steps: int, *, keep_improvements: bool = True
) -> bool:
    """Fits and saves one solver by Gauss-Newton, starting from the solver that is in the folder already.

    A fit that did not come to its end goes on from its last iteration. With `keep_improvements` every better solver is saved,
    otherwise only that of a fit that ended by itself.

    Returns:
        `bool`: Whether the fit ended by itself and was not interrupted.
    """
    settings, n, data = run.settings, num_inference_steps, run.data
    checkpoints = Checkpoints(Path(settings.output_dir) / "checkpoints" / f"{n}_steps_gauss_newton", total_limit=1)
    state = None
    if checkpoints.paths():
        state = checkpoints.load("latest")
        check_same_training(checkpoints.folder, state["provenance"], solvers.fixed)
        run.print(f"{n} steps: resumed after iteration {state['iteration']}")
    steps = count(1)
    run.start_fit()

    def log(iteration: Iteration) -> None:
        values = {f"gauss_newton/{name}": value for name, value in asdict(iteration).items()}
        run.log(n, values, next(steps))

    def save(iteration: int, state: dict[str, Any]) -> None:
        if solvers.writable:
            checkpoints.save(iteration, {**state, "provenance": solvers.fixed})

    # A process alone may be interrupted anywhere; several have to agree.
    alone = run.accelerator.num_processes == 1
    with nullcontext() if alone else deferred_interrupt(run.reduce) as interrupted:
        result = distill_solver(
            data.pipe,
            solvers.scheduler,
            n,
            data.training_share,
            data.held_out(),
            provenance=solvers.provenance,
            initialize_from=run.initialize_from,
            loss=loss,
            batch_size=data.batch_size,
            reduce=run.reduce,
            detail=settings.detail,
            max_evaluations=settings.max_train_evaluations,
            max_iterations=settings.max_train_iterations,
            on_improvement=solvers.save if keep_improvements else None,
            on_iteration=log,
            on_state=save,
            state=state,
            interrupted=interrupted,
        )
    if result.interrupted and not keep_improvements:
        return False
    solvers.save()
    if solvers.writable and not result.interrupted:
        checkpoints.clear()
    if settings.report_to is not None:
        draw_validation(run, result.solver, next(steps))
    run.finish_fit(n, solvers.scheduler.solvers[n].provenance)
    return not result.interrupted
