"""Gauss-Newton in train_gas.py."""

from functools import partial
from typing import Any

from gas_run import Run, SolverFolder

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMScheduler
from diffusers_gas.distillation.gauss_newton import best_initial_solver, distill_gauss_newton
from diffusers_gas.distillation.losses import Loss
from diffusers_gas.distillation.teacher import TeacherSamples


NUM_START_SAMPLES = 128


def distil(run: Run, folder: SolverFolder, loss: Loss, num_inference_steps: int) -> bool:
    """Distils and saves one solver by Gauss-Newton; `False` if it was interrupted."""
    args = run.args
    common = {"loss": loss, "batch_size": args.train_batch_size, "reduce": run.reduce}
    training, validation = run.share(run.training_samples), run.share(run.validation_samples)
    start = folder.get(num_inference_steps) or _gauss_newton_start(run, folder, num_inference_steps, training, common)
    result = distill_gauss_newton(
        run.pipe,
        start,
        training,
        validation,
        max_iterations=args.max_train_iterations,
        max_seconds=args.max_train_seconds,
        on_improvement=partial(run.save, folder),
        **common,
    )
    folder.scheduler.add_solver(result.solver)
    run.save(folder, result.solver)
    names = ("initial_distance", "distance", "evaluations", "seconds")
    run.reports[num_inference_steps] = {name: getattr(result, name) for name in names}
    run.print(
        f"{num_inference_steps} steps: held-out distance {result.initial_distance:.5f} -> {result.distance:.5f} "
        f"with {result.evaluations} network evaluations in {result.seconds:.0f} s"
    )
    return not result.interrupted


def _gauss_newton_start(
    run: Run, folder: SolverFolder, num_inference_steps: int, training: TeacherSamples, common: dict[str, Any]
) -> GeneralizedSolver:
    if run.args.initialize_from is not None:
        return solver_from(run.args.initialize_from, num_inference_steps)
    fewer = folder.get(num_inference_steps - 1)
    warm = [] if fewer is None else [fewer.with_one_more_step()]
    samples = training[:NUM_START_SAMPLES]
    return best_initial_solver(run.pipe, num_inference_steps, samples, further_candidates=warm, **common)


def solver_from(path: str, num_inference_steps: int) -> GeneralizedSolver:
    """The solver that a scheduler of ours has for a step count, or the one that its time steps make."""
    config = GASScheduler.load_config(path)
    if config["_class_name"] == SDMScheduler.__name__:
        return SDMScheduler.from_pretrained(path).initial_solver(num_inference_steps)
    solvers = GASScheduler.from_pretrained(path).solvers
    if num_inference_steps not in solvers:
        raise ValueError(f"{path} has solvers for {sorted(solvers)} steps, none for {num_inference_steps}.")
    return solvers[num_inference_steps]
