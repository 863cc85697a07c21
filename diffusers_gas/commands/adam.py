"""Gradient-based and adversarial training in train_gas.py: checkpoints, validation, logs."""

from dataclasses import asdict, fields
from functools import partial
from typing import Any

from accelerate.utils import set_seed
from tqdm.auto import tqdm

from ..distillation.adversarial import as_grid
from ..distillation.checkpoints import Checkpoints
from ..distillation.discriminator import R3GANDiscriminator
from ..distillation.gauss_newton import Problem
from ..distillation.gradient_descent import Adversary, GradientDescent, Recipe
from ..distillation.losses import Loss
from ..generalized_solver import GeneralizedSolver
from ..pipelines.driving import scheduler_config
from ..schedulers.scheduling_gas import GASScheduler
from .gauss_newton import distil, solver_from
from .run import Run
from .tracking import Interrupt, log


def train(run: Run, num_inference_steps: int) -> bool:
    """Trains and saves one solver by Adam; `False` if it was interrupted."""
    args, n = run.args, num_inference_steps
    checkpoints = Checkpoints(run.output_dir / "checkpoints" / f"{n}_steps", args.checkpoints_total_limit)
    state = _resumed(run, checkpoints, n)
    adversary = _adversary(run) if args.loss == "gas" else None
    if state is None:
        start = _adam_start(run, n)
        if start is None:
            return False
    else:
        start = GeneralizedSolver.from_tensors(state["solver"], **state["solver_config"])
    trainer = GradientDescent(
        run.pipe,
        start,
        run.training_samples,
        loss=run.loss,
        recipe=_recipe(run),
        accelerator=run.accelerator,
        adversary=adversary,
        failure_folder=run.output_dir,
    )
    if state is not None:
        trainer.load_state_dict(state)
        run.print(f"{n} steps: resumed after optimizer step {trainer.steps_done}")
    run.start_stage()
    return _Training(run, trainer, checkpoints).go_on()


class _Training:
    """The optimizer steps of one solver, with what is validated, logged and saved along them."""

    def __init__(self, run: Run, trainer: GradientDescent, checkpoints: Checkpoints):
        self.run, self.trainer, self.checkpoints = run, trainer, checkpoints
        self.num_inference_steps = trainer.solver.num_inference_steps
        self.problem = Problem(run.pipe, run.loss, run.args.train_batch_size, run.reduce)
        self.validation = run.share(run.validation_samples)

    def go_on(self) -> bool:
        """Trains to the end; `False` if it was interrupted."""
        run, trainer, n = self.run, self.trainer, self.num_inference_steps
        initial_distance = self.distance = self._validate()
        with self._progress() as progress, Interrupt(run.reduce) as interrupt:
            interrupted = False
            while trainer.steps_done < run.args.max_train_steps and not interrupted:
                values = trainer.step()
                log(run.accelerator, n, values, run.log_step(trainer.steps_done))
                progress.update()
                progress.set_postfix(loss=f"{values['loss/distillation']:.3g}", held_out=f"{self.distance:.3g}")
                interrupted = interrupt.requested()
                self._keep(last=interrupted or trainer.steps_done == run.args.max_train_steps)
            seconds = progress.format_dict["elapsed"]
        run.reports[n] = {
            "initial_distance": initial_distance,
            "distance": self.distance,
            "evaluations": trainer.evaluations * run.accelerator.num_processes,
            "seconds": seconds,
        }
        if interrupted:
            run.print("Interrupted: the solver so far is kept. Go on with `--resume_from_checkpoint latest`.")
        run.print(f"{n} steps: held-out distance {initial_distance:.5f} -> {self.distance:.5f} in {seconds:.0f} s")
        return not interrupted

    def _keep(self, last: bool) -> None:
        """Saves, validates and draws after the steps that are due for it, and after the last."""
        run, trainer = self.run, self.trainer
        # First of all: a launcher may give an interrupted process no time for more.
        if last or trainer.steps_done % run.args.checkpointing_steps == 0:
            run.save(run.folder, trainer.averaged_solver())
            if run.accelerator.is_main_process:
                self.checkpoints.save(trainer.steps_done, {**trainer.state_dict(), "provenance": _fixed(run)})
        if last or trainer.steps_done % run.args.validation_steps == 0:
            self.distance = self._validate()
            run.picture(trainer.averaged_solver(), trainer.steps_done)

    def _validate(self) -> float:
        """The mean squared distance on the held-out samples."""
        loss, distance = self.problem.losses(self.trainer.averaged_solver(), self.validation)
        values = {"validation/loss": loss, "validation/distance": distance}
        log(self.run.accelerator, self.num_inference_steps, values, self.run.log_step(self.trainer.steps_done))
        return distance

    def _progress(self) -> tqdm:
        return tqdm(
            initial=self.trainer.steps_done,
            total=self.run.args.max_train_steps,
            desc=f"{self.num_inference_steps} steps, Adam",
            unit="step",
            disable=not self.run.accelerator.is_local_main_process,
        )


def _recipe(run: Run) -> Recipe:
    return Recipe(**{field.name: getattr(run.args, field.name) for field in fields(Recipe)})


def _fixed(run: Run) -> dict[str, Any]:
    """Arguments that a resumed training must share with the one that it goes on with."""
    free = {"max_train_steps", "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
    if run.args.lr_scheduler not in ("constant", "constant_with_warmup"):
        free.remove("max_train_steps")  # which the learning rate depends on
    recipe = {name: value for name, value in asdict(_recipe(run)).items() if name not in free}
    names = (
        "lpips_size",
        "gas_distance",
        "adversarial_weight",
        "discriminator_model_name_or_path",
        "discriminator_width",
        "discriminator_learning_rate",
        "r1_weight",
        "r2_weight",
        "reuse_fakes",
    )
    return {
        **run.folder.provenance,
        **recipe,
        **{name: getattr(run.args, name) for name in names},
        "num_teacher_samples": len(run.training),
    }


def _resumed(run: Run, checkpoints: Checkpoints, num_inference_steps: int) -> dict[str, Any] | None:
    which = run.args.resume_from_checkpoint
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
    now, before = {**_fixed(run), "num_inference_steps": num_inference_steps}, state["provenance"]
    before = {**before, "num_inference_steps": state["solver_config"]["num_inference_steps"]}
    changed = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
    if changed:
        listed = ", ".join(f"{name} was {before}, is {after}" for name, (before, after) in changed.items())
        raise ValueError(f"The checkpoint in {checkpoints.folder} was made with other arguments: {listed}.")
    return state


def _adam_start(run: Run, num_inference_steps: int) -> GeneralizedSolver | None:
    """The solver that training starts from; `None` if a Gauss-Newton fit of it was interrupted."""
    args = run.args
    if args.initialize_from is not None:
        return solver_from(args.initialize_from, num_inference_steps)
    if args.initialization == "gauss_newton":
        # On final states, whatever the loss: features of images would take a memory of their own for every unknown.
        folder = run.solver_folder("gauss_newton", "gauss_newton", "l2", "states")
        if folder.get(num_inference_steps) is None:
            distil(run, folder, Loss("l2"), num_inference_steps, keep_improvements=False)
        return folder.get(num_inference_steps)
    published = {"solver_order": 3, "lower_order_final": False} if args.initialization == "published" else {}
    return GASScheduler.from_config(scheduler_config(run.pipe), **published).theory_solver(num_inference_steps, mu=1.0)


def _adversary(run: Run) -> Adversary:
    args, pipe = run.args, run.pipe
    sizes = {name: run.training.common.get(name) for name in ("height", "width", "num_frames")}
    to_grid = partial(as_grid, pipe=pipe, **sizes)
    shape = tuple(to_grid(run.training_samples.final[:1]).shape[1:])
    set_seed(args.seed)
    if args.discriminator_model_name_or_path is None:
        discriminator = R3GANDiscriminator.for_samples(shape, width=args.discriminator_width)
    else:
        discriminator = R3GANDiscriminator.from_pretrained(args.discriminator_model_name_or_path)
        expected = (discriminator.config.in_channels, *discriminator.config.sample_size)
        if expected != shape:
            raise ValueError(
                f"The discriminator in {args.discriminator_model_name_or_path} takes samples of shape {expected}, the "
                f"teacher's are of {shape}."
            )
    run.print(f"Discriminator of {sum(p.numel() for p in discriminator.parameters()) / 1e6:.2f} M weights for {shape}")
    return Adversary(
        discriminator.to(run.accelerator.device),
        as_grid=to_grid,
        weight=args.adversarial_weight,
        learning_rate=args.discriminator_learning_rate,
        r1_weight=args.r1_weight,
        r2_weight=args.r2_weight,
        reuse_fakes=args.reuse_fakes,
    )
