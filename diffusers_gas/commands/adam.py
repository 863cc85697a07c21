"""Gradient-based and adversarial training: where it starts, and checkpoints, validation and logs on the way."""

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from ..distillation.adversarial import Adversary, as_grid
from ..distillation.checkpoints import Checkpoints
from ..distillation.discriminator import R3GANDiscriminator
from ..distillation.distill import check_by_sampling, check_cost, solver_of
from ..distillation.gauss_newton import Problem
from ..distillation.gradient_descent import GradientDescent, Recipe
from ..distillation.losses import Loss
from ..generalized_solver import GeneralizedSolver
from ..pipelines.decoding import StateDecoder
from ..pipelines.driving import scheduler_config
from ..schedulers.scheduling_gas import GASScheduler
from .common import deferred_interrupt
from .gauss_newton import fit_by_gauss_newton
from .report import draw_validation
from .run import Run, check_same_training
from .train_settings import AdversarialSettings, TrainSettings


def fit_by_adam(run: Run, num_inference_steps: int) -> bool:
    """Trains and saves one solver by Adam; `False` if the training was interrupted."""
    settings, n, last = run.settings, num_inference_steps, run.settings.max_train_steps
    folder = Path(settings.output_dir) / "checkpoints" / f"{n}_steps"
    checkpoints = Checkpoints(folder, settings.checkpoints_total_limit)
    trainer = _trainer(run, checkpoints, n)
    if trainer is None:
        return False
    problem = Problem(run.data.pipe, run.loss, run.data.batch_size, run.reduce)
    held_out = run.data.held_out()

    def validate() -> float:
        """The mean squared distance on the held-out samples."""
        loss, distance = problem.losses(trainer.averaged_solver(), held_out)
        run.log(n, {"validation/loss": loss, "validation/distance": distance}, trainer.steps_done)
        return distance

    run.start_fit()
    initial_distance = distance = validate()
    bar = {"desc": f"{n} steps, Adam", "unit": "step", "disable": not run.accelerator.is_local_main_process}
    progress = tqdm(initial=trainer.steps_done, total=last, **bar)
    with progress, deferred_interrupt(run.reduce) as is_interrupted:
        interrupted = False
        while trainer.steps_done < last and not interrupted:
            values = trainer.step()
            run.log(n, values, trainer.steps_done)
            progress.update()
            loss = values.get("loss/distillation", values.get("discriminator/loss", 0.0))  # while it warms up
            progress.set_postfix(loss=f"{loss:.3g}", held_out=f"{distance:.3g}")
            interrupted = is_interrupted()
            is_last = interrupted or trainer.steps_done == last
            # Saving comes first: a launcher may give an interrupted process no time for more.
            if is_last or trainer.steps_done % settings.checkpointing_steps == 0:
                run.solvers.add(trainer.averaged_solver())
                if run.accelerator.is_main_process:
                    checkpoints.save(trainer.steps_done, {**trainer.state_dict(), "provenance": _fixed(run)})
            if is_last or trainer.steps_done % settings.validation_steps == 0:
                distance = validate()
                draw_validation(run, trainer.averaged_solver(), trainer.steps_done)
        seconds = progress.format_dict["elapsed"]
    num_samples = len(run.data.inputs) + settings.num_validation_samples
    evaluations = trainer.evaluations + problem.evaluations + check_cost(n, len(held_out))
    evaluations = evaluations * run.accelerator.num_processes + run.data.teacher_evaluations * num_samples
    measured = {"initial_distance": initial_distance, "distance": distance}
    measured |= {"evaluations": evaluations, "seconds": seconds}
    solver = trainer.averaged_solver()
    run.solvers.add(solver, **measured)
    sampled = check_by_sampling(run.data.pipe, solver, held_out, run.data.batch_size, run.reduce)
    run.solvers.add(solver, **measured, sampled_distance=sampled)
    if interrupted:
        run.print("Interrupted: the solver so far is kept. Go on with `--resume_from_checkpoint latest`.")
    run.finish_fit(n, measured)
    return not interrupted


def most_evaluations_by_adam(run: Run, num_inference_steps: int) -> int:
    """The most network evaluations of [`fit_by_adam`], without a fit of the initial solver and without pictures."""
    settings, world = run.settings, run.accelerator.num_processes
    samples = settings.train_batch_size * settings.gradient_accumulation_steps * world * settings.max_train_steps
    rollouts = 1 + settings.gradient_checkpointing + (settings.loss == "gas" and not settings.reuse_fakes)
    held_out = settings.num_validation_samples
    validated = held_out * num_validations(settings) + check_cost(1, held_out, world)
    num_teacher_samples = len(run.data.inputs) + held_out
    return num_inference_steps * (samples * rollouts + validated) + run.data.teacher_evaluations * num_teacher_samples


def num_validations(settings: TrainSettings) -> int:
    """How often Adam's solver is validated at most, before the training included."""
    return 1 + math.ceil(settings.max_train_steps / settings.validation_steps)


def _trainer(run: Run, checkpoints: Checkpoints, num_inference_steps: int) -> GradientDescent | None:
    """The training, new or resumed; `None` if a Gauss-Newton fit of the initial solver was interrupted."""
    settings, n = run.settings, num_inference_steps
    state = _resumed(run, checkpoints, n)
    common = {"loss": run.loss, "recipe": settings, "accelerator": run.accelerator}
    common |= {"adversary": _adversary(run) if settings.loss == "gas" else None}
    if state is None:
        start = _start(run, n)
    else:
        start = GeneralizedSolver.from_tensors(state["solver"], **state["solver_config"])
    if start is None:
        return None
    trainer = GradientDescent(run.data.pipe, start, run.data.training, **common)
    if state is not None:
        trainer.load_state_dict(state)
        run.print(f"{n} steps: resumed after optimizer step {trainer.steps_done}")
    return trainer


def _fixed(run: Run) -> dict[str, Any]:
    """What a resumed training must share with the one that it goes on with."""
    settings = run.settings
    free = {"max_train_steps", "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
    if settings.lr_scheduler not in ("constant", "constant_with_warmup"):
        free.remove("max_train_steps")  # the learning rate depends on it
    names = [setting.name for group in (Recipe, AdversarialSettings) for setting in fields(group)]
    names += ["lpips_size", "num_teacher_samples"]
    return {**run.solvers.fixed, **{name: getattr(settings, name) for name in names if name not in free}}


def _resumed(run: Run, checkpoints: Checkpoints, num_inference_steps: int) -> dict[str, Any] | None:
    """The state that `--resume_from_checkpoint` names; `None` if the training starts from the beginning."""
    which = run.settings.resume_from_checkpoint
    if which is None:
        if checkpoints.paths():
            raise ValueError(
                f"{checkpoints.folder} has checkpoints. Go on with `--resume_from_checkpoint latest`, choose another "
                "--output_dir, or remove them."
            )
        return None
    if which == "latest" and not checkpoints.paths():
        run.print(f"No checkpoint in {checkpoints.folder} yet: starting from the beginning.")
        return None
    state = checkpoints.load(which)
    now = {**_fixed(run), "num_inference_steps": num_inference_steps}
    before = {**state["provenance"], "num_inference_steps": state["solver_config"]["num_inference_steps"]}
    check_same_training(checkpoints.folder, before, now)
    return state


def _start(run: Run, num_inference_steps: int) -> GeneralizedSolver | None:
    """The solver that training starts from; `None` if a Gauss-Newton fit of it was interrupted."""
    settings, data, n = run.settings, run.data, num_inference_steps
    if run.initialize_from is not None:
        return solver_of(run.initialize_from, n)
    if settings.initialization == "gauss_newton":
        # The loss is that of final states, whatever the run's loss: features of images would need memory for every unknown.
        solvers = run.solver_folder("gauss_newton", "gauss_newton", "l2", "states")
        is_there = n in solvers.scheduler.solvers
        if is_there or fit_by_gauss_newton(run, solvers, Loss("l2"), n, keep_improvements=False):
            return solvers.scheduler.solvers[n]
        return None
    published = {"solver_order": 3, "lower_order_final": False} if settings.initialization == "published" else {}
    return GASScheduler.from_config(scheduler_config(data.pipe), **published).theory_solver(n, mu=1.0)


def _states(run: Run) -> Callable[[Tensor], Tensor]:
    """From final states to what a discriminator of states sees: the channels are second."""
    sizes = {name: run.data.inputs.common.get(name) for name in ("height", "width", "num_frames")}
    return lambda samples: as_grid(samples, run.data.pipe, **sizes)


def _images(run: Run) -> Callable[[Tensor], Tensor]:
    """From final states to what a discriminator of images sees: decoded, and averaged to the size that is asked for."""
    data, size = run.data, run.settings.discriminator_size
    decode = StateDecoder(data.pipe, **data.inputs[:1].pipeline_arguments(data.pipe))

    def images(samples: Tensor) -> Tensor:
        decoded = decode(samples)
        return decoded if size is None else interpolate(decoded, (*decoded.shape[2:-2], size, size), mode="area")

    return images


def _adversary(run: Run) -> Adversary:
    settings, data, path = run.settings, run.data, run.settings.discriminator_model_name_or_path
    to_grid = _images(run) if settings.discriminator_features == "pixels" else _states(run)
    shape = tuple(to_grid(data.training.final[:1]).shape[1:])
    set_seed(settings.seed)
    if path is None:
        discriminator = R3GANDiscriminator.for_samples(shape, width=settings.discriminator_width)
    else:
        discriminator = R3GANDiscriminator.from_pretrained(path)
        expected = (discriminator.config.in_channels, *discriminator.config.sample_size)
        if expected != shape:
            raise ValueError(
                f"The discriminator in {path} takes samples of shape {expected}, the teacher's are of {shape}."
            )
    run.print(f"Discriminator of {sum(p.numel() for p in discriminator.parameters()) / 1e6:.2f} M weights for {shape}")
    return Adversary(
        discriminator.to(run.accelerator.device),
        as_grid=to_grid,
        weight=settings.adversarial_weight,
        learning_rate=settings.discriminator_learning_rate,
        r1_weight=settings.r1_weight,
        r2_weight=settings.r2_weight,
        reuse_fakes=settings.reuse_fakes,
        warmup_steps=settings.discriminator_warmup_steps,
    )
