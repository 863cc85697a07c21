"""Distills few-step solvers from a diffusion pipeline, and shows what they gain.

    accelerate launch training/train_gas.py
    accelerate launch training/train_gas.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt
    accelerate launch -m diffusers_gas train --pretrained_model_name_or_path some/model --loss gas --num_inference_steps 4

Without arguments the script distills a 4-step solver from the teacher in examples/teachers/digits. The solvers end up in
`{output_dir}/scheduler`, to be loaded with `GASScheduler.from_pretrained`. What the arguments mean, and which to choose, is
in training/README.md.

The file reads from the arguments to the fits: settings, [`main`], the parts of a training, Gauss-Newton, Adam. What is shown
of a training is in `train_report`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm.auto import tqdm

from ..comparison import MOST_RIVALS
from ..distillation.adversarial import AdversarialRecipe, Adversary, as_grid
from ..distillation.discriminator import R3GANDiscriminator
from ..distillation.distill import (
    NUM_HELD_OUT,
    check_by_sampling,
    count_knots,
    distill_solver,
    training_provenance,
)
from ..distillation.features import make_features
from ..distillation.gauss_newton import Problem, most_evaluations
from ..distillation.gradient_descent import GradientDescent, Recipe
from ..generalized_solver import GeneralizedSolver
from ..least_squares import Loss
from ..pipelines.decoding import StateDecoder
from ..pipelines.driving import scheduler_config
from ..pipelines.inputs import EVALUATION_SEED, BatchSize, SampleInputs
from ..pipelines.named_schedulers import load_our_scheduler
from ..pipelines.teacher import (
    CHECKED_STEPS,
    LAZY_SHARD_SIZE,
    LazyTeacherSamples,
    TeacherCache,
    TeacherSamples,
    check_driven,
    check_teacher,
    evaluations_per_sample,
    fingerprint,
    fingerprint_of_pipeline,
    fingerprint_of_scheduler,
)
from ..schedulers.scheduling_gas import GASScheduler
from ..utils.files import save_state
from .arguments import AtLeast0, AtLeast1, HubSettings, PipelineSettings, TeacherSettings, parse
from .processes import deferred_interrupt, exclusive_folder, start_accelerator, sum_over_processes
from .reporting import describe_model, errors_as_warnings, push_to_hub
from .resuming import SolverFolder, load_checkpoint
from .train_report import TrainingReport


NUM_PICTURED = 10


@dataclass
class AdversarialSettings(AdversarialRecipe):
    """Its discriminator.

    Args:
        discriminator_model_name_or_path: A pretrained discriminator: a folder or Hub id, e.g. the output of `diffusers-gas convert
            r3gan`.
        discriminator_width: Channels of a new one.
        discriminator_features: What it compares: final states, which are latents in latent pipelines, or decoded images.
        discriminator_size: Pixels that its images are averaged to.
    """

    discriminator_model_name_or_path: str | None = None
    discriminator_width: int = 128
    discriminator_features: Literal["states", "pixels"] = "states"
    discriminator_size: AtLeast1 | None = None


@dataclass
class TrainSettings(AdversarialSettings, Recipe, HubSettings, TeacherSettings, PipelineSettings):
    """The run.

    Defaults are those of Gauss-Newton on the squared distance. `recipe_defaults` has what others need.

    Args:
        output_dir: The folder of the results.
        num_inference_steps: Step counts of the solvers to distill.
        optimizer: gauss_newton; adam for --loss gas.
        loss: l2 for Gauss-Newton, l1 for Adam; gas adds a discriminator.
        features: What the loss compares.
        lpips_size: Pixels that images are resized to.
        initialize_from: A scheduler folder or Hub id of GS (solvers) or SDM (time steps) to start from.
        initialization: Of Adam: published (uniform times, third order); a Gauss-Newton fit for --loss gas.
        detail: A second phase of Gauss-Newton on l2, in which the absolute error counts, too; it removes the faint grain of l2.
        max_train_evaluations: Of the network by Gauss-Newton, the teacher's included; about 18 thousand for 4 steps, 77 for 8.
        max_train_iterations: Of Gauss-Newton; 0 keeps the solver it would start from.
        train_batch_size: Most samples per pipeline call and process; with Adam 24.
        num_teacher_samples: Gauss-Newton takes at most so many, as it needs them; 1400 for Adam, 5000 for gas.
        num_validation_samples: Held out, to choose the best solver by; 512 for Adam.
        num_compared_samples: Held out, for the table and the picture with Diffusers' schedulers; 0 for none.
        validation_steps: Of Adam, from one validation to the next.
        checkpointing_steps: Of Adam, from one checkpoint to the next.
        mixed_precision: Of the networks; solvers stay in float64.
        report_to: Trackers; their files go to {output_dir}/logs.
    """

    output_dir: str = "gas_output"
    num_inference_steps: Sequence[AtLeast1] = (4,)
    optimizer: Literal["gauss_newton", "adam"] = "gauss_newton"
    loss: Literal["l2", "l1", "gas"] = "l2"
    features: Literal["states", "pixels", "lpips"] = "states"
    lpips_size: int = 224
    initialize_from: str | None = None
    initialization: Literal["gauss_newton", "theory", "published"] = "published"
    detail: bool = True
    max_train_evaluations: AtLeast1 | None = None
    max_train_iterations: AtLeast0 | None = None
    train_batch_size: int = 128
    num_teacher_samples: int = 1024
    num_validation_samples: int = 32
    num_compared_samples: AtLeast0 = 32
    validation_steps: int = 500
    checkpointing_steps: int = 500
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    report_to: Literal["tensorboard", "wandb", "all"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_inference_steps = sorted(set(self.num_inference_steps))
        if self.optimizer == "gauss_newton" and self.loss == "gas":
            raise ValueError("`--loss gas` is not a least-squares problem: it needs `--optimizer adam`.")
        if self.discriminator_size is not None and self.discriminator_features != "pixels":
            raise ValueError("`--discriminator_size` is that of images: it needs `--discriminator_features pixels`.")
        if self.features == "lpips" and self.distance != "l2":
            raise ValueError(f"LPIPS is a squared distance of features: it needs 'l2', not '{self.distance}'.")

    @property
    def distance(self) -> Literal["l2", "l1"]:
        """The distillation loss, which `--loss gas` has beside the adversarial one: LPIPS, or L1 as published for latents."""
        if self.loss != "gas":
            return self.loss
        return "l2" if self.features == "lpips" else "l1"

    @property
    def fits_by_gauss_newton(self) -> bool:
        """Whether there are fits by Gauss-Newton, also those that Adam starts from."""
        starts_from_one = self.initialization == "gauss_newton" and self.initialize_from is None
        return self.optimizer == "gauss_newton" or starts_from_one

    @property
    def restores_detail(self) -> bool:
        """Whether fits by Gauss-Newton have the second phase: those to the squared distance of final states, as Adam's start is."""
        return self.detail and (self.optimizer == "adam" or (self.loss, self.features) == ("l2", "states"))


def recipe_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Defaults that depend on settings that were given: the published recipes have their own."""
    adversarial = given.get("loss") == "gas"
    defaults: dict[str, Any] = {}
    if given.get("discriminator_model_name_or_path") is not None:
        defaults["discriminator_learning_rate"] = 1e-5
    if given.get("optimizer", "adam" if adversarial else "gauss_newton") == "adam":
        loss = "l2" if given.get("features") == "lpips" else "l1"
        defaults |= {"optimizer": "adam", "loss": loss, "train_batch_size": Recipe().train_batch_size}
        # Published: 1400 samples for GS, 5000 for GAS, whose discriminator overfits sooner.
        defaults["num_teacher_samples"] = 5000 if adversarial else 1400
        defaults["num_validation_samples"] = 512
        defaults["initialization"] = "gauss_newton" if adversarial else "published"
    return defaults


def parse_args(words: list[str] | None = None, model: Mapping[str, Any] | None = None) -> TrainSettings:
    given = parse(TrainSettings, __doc__, words, model)
    return TrainSettings(**{**recipe_defaults(given), **given})


def main(words: list[str] | None = None, model: Mapping[str, Any] | None = None) -> None:
    """Fits a solver for each number of steps, and shows what they gain. Arguments are those of [`parse`]."""
    settings = parse_args(words, model)
    with exclusive_folder(settings.output_dir):
        training = Training(settings)
        if settings.fits_by_gauss_newton:
            theory = training.solvers.scheduler.theory_solver(CHECKED_STEPS, mu=1.0)
            check_driven(training.pipe, training.solvers.scheduler, theory, training.inputs)
        settings.create_repository(training.output_dir)
        announce(training)
        if settings.loss == "gas":
            make_adversary(training)  # refuses a discriminator of other samples before the work
        for n in settings.num_inference_steps:
            if settings.optimizer == "adam":
                finished = fit_by_adam(training, n)
            else:
                finished = fit_by_gauss_newton(training, n, training.loss, training.solvers)
            if not finished:  # but interrupted
                training.print(f"Interrupted: the same command goes on{' and pushes' * settings.push_to_hub}.")
                settings.push_to_hub = False  # it would replace what is whole
                break
        training.accelerator.wait_for_everyone()
        try:
            if training.fits:
                show_gain(training)
        finally:
            with errors_as_warnings("end of the trackers"):
                training.accelerator.end_training()


class Training:
    """The parts of a training, which the fits of all step counts share.

    Attributes:
        pipe, teacher: The pipeline, and the scheduler that its teacher samples with.
        teacher_evaluations: Network evaluations of a sample of the teacher.
        inputs: The samples to learn from.
        training_share, validation, compared: This process's shares of the teacher's samples to learn from, to choose the best solver
            by, and to judge that one by (`None` if there are none). They are made when they are first read, or taken from the cache
            in the output folder.
        loss: The distillation loss.
        solvers: Where the solvers go.
        initialize_from: The scheduler that `--initialize_from` names.
        report: What is shown.
        fits: What was measured of each solver, by its number of steps.
        reduce: Sums a tensor over the processes.
        print: Prints a text once, without delay.
    """

    def __init__(self, settings: TrainSettings):
        self.settings, self.output_dir = settings, Path(settings.output_dir)
        self.accelerator = accelerator = start_processes_and_trackers(settings)
        self.reduce, self.print = sum_over_processes(accelerator), partial(accelerator.print, flush=True)

        # The pipeline.
        self.pipe = pipe = settings.load_pipeline(accelerator.device)
        self.teacher, steps = settings.load_teacher(pipe), settings.teacher_num_inference_steps
        check_teacher(pipe, self.teacher)
        self.teacher_evaluations = evaluations_per_sample(self.teacher, steps)
        self.batch_size = BatchSize(settings.train_batch_size)

        # The samples. What a solver was chosen by is not what it is judged by.
        self.inputs = settings.sample_inputs(pipe, settings.seed, settings.num_teacher_samples)
        num_validation, num_compared = settings.num_validation_samples, settings.num_compared_samples
        held_out = settings.sample_inputs(pipe, EVALUATION_SEED, num_validation + num_compared)
        if not set(self.inputs.seeds).isdisjoint(held_out.seeds):
            raise ValueError(
                f"Seeds {self.inputs.seeds} to learn from overlap the held-out ones, {held_out.seeds}: choose "
                "another --seed or fewer --num_teacher_samples."
            )
        self._cache = TeacherCache(
            self.output_dir / "teacher_samples", settings.pipeline_name, self.teacher, steps, LAZY_SHARD_SIZE
        )

        def share(inputs: SampleInputs, label: str) -> LazyTeacherSamples:
            return LazyTeacherSamples(self._cache, pipe, inputs, self.batch_size, label, accelerator.state)

        self.training_share = share(self.inputs, "Teacher")
        self.validation = share(held_out[:num_validation], "Held out")
        self.compared = share(held_out[num_validation:], "Compared") if num_compared > 0 else None

        # What is fitted, and where it goes.
        one_sample = self.inputs[:1].pipeline_arguments(pipe)
        features = make_features(settings.features, pipe, size=settings.lpips_size, pipeline_inputs=one_sample)
        self.loss = Loss(settings.distance, features=features)
        self.solvers = self.solver_folder("scheduler", settings.optimizer, settings.loss, settings.features)
        path = settings.initialize_from
        self.initialize_from = None if path is None else load_our_scheduler(path)

        # What is shown.
        pictured = held_out[:NUM_PICTURED]
        self.report = TrainingReport(
            accelerator, pipe, self.teacher, steps, pictured, self.batch_size, self.output_dir
        )
        self.fits: dict[int, dict[str, Any]] = {}

    @cached_property
    def all_samples(self) -> TeacherSamples:
        """All of the samples to learn from, in every process."""
        return self._cache.collect(self.pipe, self.inputs, self.batch_size, "Teacher", self.accelerator.state)

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """What a resumed fit must share with the one that it goes on with, beside the record of the solver. All weights are read."""
        return {
            "weights": fingerprint_of_pipeline(self.pipe),
            "first_inputs": fingerprint(self.inputs[:2]),  # there may be more or fewer than before
            "teacher_settings": fingerprint_of_scheduler(self.teacher, self.settings.teacher_num_inference_steps),
        }

    @cached_property
    def fingerprint_of_fit(self) -> str:
        """Of everything that a fit by Gauss-Newton depends on, beside the record of the solver."""
        limits = ("max_train_evaluations", "max_train_iterations")
        names = ("detail", "initialize_from", "num_validation_samples", *limits)
        return fingerprint(self.fixed, self.inputs, [getattr(self.settings, name) for name in names])

    @cached_property
    def fixed_for_adam(self) -> dict[str, Any]:
        """What a resumed training by Adam must share, too."""
        settings = self.settings
        free = {"max_train_steps", "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
        if settings.lr_scheduler not in ("constant", "constant_with_warmup"):
            free.remove("max_train_steps")  # the learning rate depends on it
        names = [setting.name for group in (Recipe, AdversarialSettings) for setting in fields(group)]
        names += ["lpips_size", "num_teacher_samples", "initialization", "initialize_from"]
        chosen = {name: getattr(settings, name) for name in names if name not in free}
        return {**self.solvers.fixed, **self.fixed, "inputs": fingerprint(self.inputs), **chosen}

    def solver_folder(self, name: str, optimizer: str, loss: str, features: str) -> SolverFolder:
        """The folder for the solvers of a method; only the main process writes it."""
        settings, path = self.settings, self.output_dir / name
        method = {"optimizer": optimizer, "loss": loss, "features": features, **settings.provenance()}
        provenance = training_provenance(
            self.pipe, self.inputs, self.teacher, settings.teacher_num_inference_steps, **method
        )
        return SolverFolder(path, self.pipe, provenance, self.accelerator.is_main_process)

    def finish_fit(self, num_inference_steps: int, measured: Mapping[str, Any]) -> None:
        """Keeps and prints what was measured of a solver; `measured` may have more."""
        names = ("initial_distance", "distance", "evaluations", "seconds")
        self.fits[num_inference_steps] = fit = {name: measured[name] for name in names}
        images = fit["evaluations"] // self.teacher_evaluations
        self.print(
            f"{num_inference_steps} steps: held-out distance {fit['initial_distance']:.5f} -> {fit['distance']:.5f} in "
            f"{fit['seconds']:.0f} s. This solver cost {fit['evaluations']} network evaluations, as many as sampling "
            f"{images} images with the teacher."
        )


def start_processes_and_trackers(settings: TrainSettings) -> Accelerator:
    """Starts the processes and the trackers, and fills in the precision that the launcher has chosen."""
    if settings.report_to not in (None, "all", *map(str, get_available_trackers())):
        raise ValueError(f"`--report_to` needs the package {settings.report_to}, which is not installed.")
    logs = Path(settings.output_dir) / "logs"
    options = {"mixed_precision": settings.mixed_precision, "log_with": settings.report_to}
    accelerator = start_accelerator(project_dir=logs, **options)
    if settings.torch_dtype is None:
        dtypes: dict[str, Any] = {"fp16": "float16", "bf16": "bfloat16"}
        settings.torch_dtype = dtypes.get(accelerator.mixed_precision, "float32")
    set_seed(settings.seed)
    if settings.report_to is not None:
        config = {name: str(value) for name, value in vars(settings).items()}
        accelerator.init_trackers("gas", config, {"wandb": {"dir": str(logs)}})
    return accelerator


def announce(training: Training) -> None:
    """Prints what is going to be done, and the most that it may cost."""
    settings, accelerator, teacher = training.settings, training.accelerator, type(training.teacher).__name__
    features = "" if settings.features == "states" else f" of {settings.features}"
    method = f"Gauss-Newton on the {settings.loss} distance{features}"
    if settings.optimizer == "adam":
        distance = f"{settings.distance} and an adversarial loss" if settings.loss == "gas" else settings.loss
        samples = settings.train_batch_size * accelerator.num_processes * settings.gradient_accumulation_steps
        method = (
            f"Adam on the {distance}{features}, {settings.max_train_steps} optimizer steps of {samples} samples, from the "
            f"{settings.initialize_from or settings.initialization} solver"
        )
    training.print(
        f"Teacher:   {describe_model(training.pipe)} in {settings.torch_dtype}, {teacher} with "
        f"{settings.teacher_num_inference_steps} steps\n"
        f"Samples:   at most {len(training.inputs)} to learn from, {settings.num_validation_samples} held out, "
        f"{settings.num_compared_samples} more for the table\n"
        f"Solvers:   {settings.num_inference_steps} steps, {method}"
    )
    for i, n in enumerate(settings.num_inference_steps):
        most = most_evaluations_of_fit(training, n)
        training.print(
            f"{'' if i else 'Cost:':11}for {n} steps at most {most} network evaluations, as many as sampling "
            f"{most // training.teacher_evaluations} images with the teacher"
        )
    without = " (`--num_compared_samples 0` does without)" * (settings.num_compared_samples > 0)
    training.print(
        f"{'':11}for table and pictures at most {most_evaluations_shown(training)}{without}\n"
        f"Processes: {accelerator.num_processes} on {accelerator.device.type}\n"
        f"Output:    {training.solvers.path}, cached teacher samples beside it\n"
    )


def most_evaluations_of_fit(training: Training, num_inference_steps: int) -> int:
    """The most network evaluations of a fit, of its choice of a start, and of the teacher for its samples."""
    settings, teacher, world = training.settings, training.teacher_evaluations, training.accelerator.num_processes
    n, num_samples, held_out, most = num_inference_steps, len(training.inputs), settings.num_validation_samples, 0
    if settings.optimizer == "adam":
        samples = settings.train_batch_size * settings.gradient_accumulation_steps * world * settings.max_train_steps
        rollouts = 1 + settings.gradient_checkpointing + (settings.loss == "gas" and not settings.reuse_fakes)
        num_validations = 2 + math.ceil(settings.max_train_steps / settings.validation_steps)  # the check is one
        most = n * (samples * rollouts + held_out * num_validations) + teacher * (num_samples + held_out)
    if settings.fits_by_gauss_newton:
        knots = count_knots(training.inputs)
        limits = (settings.max_train_iterations, world, settings.max_train_evaluations, knots)
        judged = num_judged(settings)
        checks = n * judged + 2 * CHECKED_STEPS * world
        most += most_evaluations(n, teacher, num_samples, judged, *limits) + checks
    return most


def num_judged(settings: TrainSettings) -> int:
    """Held-out samples that a fit by Gauss-Newton is judged by. Those of Adam would take more evaluations than its start may."""
    held_out = settings.num_validation_samples
    return held_out if settings.optimizer == "gauss_newton" else min(held_out, NUM_HELD_OUT)


def most_evaluations_shown(training: Training) -> int:
    """The most network evaluations for table and pictures."""
    num_compared, num_shown = training.settings.num_compared_samples, len(training.report.pictured)
    of_sample = training.teacher_evaluations + (MOST_RIVALS + 1) * sum(training.settings.num_inference_steps)
    return (num_compared + num_shown) * of_sample if num_compared > 0 else 0


def fit_by_gauss_newton(
    training: Training, num_inference_steps: int, loss: Loss, solvers: SolverFolder, *, keep_improvements: bool = True
) -> bool:
    """Fits and saves one solver by Gauss-Newton, starting from the solver that is in the folder already.

    A fit that did not come to its end goes on from its last iteration. One that did is left as it is, if its samples and limits are
    the same. With `keep_improvements` every better solver is saved, otherwise only that of a fit that ended by itself.

    Returns:
        `bool`: Whether the fit ended by itself and was not interrupted.
    """
    settings, n, report = training.settings, num_inference_steps, training.report
    earlier = solvers.scheduler.solvers.get(n)
    if earlier is not None and earlier.provenance.get("fingerprint") == training.fingerprint_of_fit:
        training.print(f"{n} steps: finished by an earlier run")
        training.finish_fit(n, earlier.provenance)
        return True
    checkpoint = training.output_dir / "checkpoints" / f"{n}_steps_gauss_newton.pt"
    fixed = {**solvers.fixed, **training.fixed}
    state = load_checkpoint(checkpoint, {**fixed, "detail": settings.restores_detail})
    if state is not None:
        training.print(f"{n} steps: resumed after iteration {state['iteration']}")
    steps = count(1)
    report.start_solver()

    def log(numbers: dict[str, float]) -> None:
        report.log(n, {f"gauss_newton/{name}": value for name, value in numbers.items()}, next(steps))

    def save(iteration: int, state: dict[str, Any]) -> None:
        if solvers.writable:
            save_state({**state, "provenance": fixed}, checkpoint)

    # A process alone may be interrupted anywhere; several have to agree.
    alone = training.accelerator.num_processes == 1
    with nullcontext(lambda: False) if alone else deferred_interrupt(training.reduce) as interrupted:
        result = distill_solver(
            Problem(training.pipe, loss, training.batch_size, training.reduce),
            solvers.scheduler,
            n,
            training.training_share,
            training.validation[: math.ceil(num_judged(settings) / training.accelerator.num_processes)],
            provenance=solvers.provenance,
            initialize_from=training.initialize_from,
            detail=settings.restores_detail,
            max_evaluations=settings.max_train_evaluations,
            max_iterations=settings.max_train_iterations,
            on_improvement=solvers.save if keep_improvements else lambda: None,
            on_judgement=log,
            on_state=save,
            state=state,
            interrupted=interrupted,
        )
    if result.interrupted and not keep_improvements:
        return False
    if not result.interrupted:
        solvers.scheduler.solvers[n].provenance["fingerprint"] = training.fingerprint_of_fit
    solvers.save()
    if solvers.writable and not result.interrupted:
        checkpoint.unlink(missing_ok=True)
    training.finish_fit(n, solvers.scheduler.solvers[n].provenance)
    return not result.interrupted


def fit_by_adam(training: Training, num_inference_steps: int) -> bool:
    """Trains and saves one solver by Adam; `False` if the training was interrupted."""
    settings, n, report = training.settings, num_inference_steps, training.report
    accelerator, last = training.accelerator, training.settings.max_train_steps
    checkpoint, fixed = training.output_dir / "checkpoints" / f"{n}_steps.pt", training.fixed_for_adam
    state = load_checkpoint(checkpoint, {**fixed, "num_inference_steps": n})
    earlier: dict[str, Any] = {} if state is None else state["measured"]
    if state is not None:
        kept = training.solvers.scheduler.solvers.get(n)
        if kept is not None and state["steps_done"] == last and "sampled_distance" in kept.provenance:
            training.print(f"{n} steps: finished by an earlier run")
            training.finish_fit(n, kept.provenance)
            return True
        start = GeneralizedSolver.from_tensors(state["solver"], **state["solver_config"])
    elif (initial := initial_solver(training, n)) is not None:
        start = initial
    else:
        return False
    options: dict[str, Any] = {"loss": training.loss, "recipe": settings, "accelerator": accelerator}
    adversary = make_adversary(training) if settings.loss == "gas" else None
    trainer = GradientDescent(training.pipe, start, training.all_samples, adversary=adversary, **options)
    if state is not None:
        trainer.load_state_dict(state)
        training.print(f"{n} steps: resumed after optimizer step {trainer.steps_done}")
    problem = Problem(training.pipe, training.loss, training.batch_size, training.reduce)
    problem.evaluations = earlier.get("validations", 0)
    held_out = training.validation[:]

    def validate() -> float:
        """The mean squared distance on the held-out samples."""
        loss, distance = problem.losses(trainer.averaged_solver(), held_out)
        report.log(n, {"validation/loss": loss, "validation/distance": distance}, trainer.steps_done)
        return distance

    report.start_solver()
    distance = validate()
    initial_distance = earlier.get("initial_distance", distance)
    bar = {"desc": f"{n} steps, Adam", "unit": "step", "disable": not accelerator.is_local_main_process}
    progress, started = tqdm(initial=trainer.steps_done, total=last, **bar), time.monotonic()

    def seconds() -> float:
        """Of this run and those before."""
        return earlier.get("seconds", 0.0) + time.monotonic() - started

    with progress, deferred_interrupt(training.reduce) as is_interrupted:
        interrupted = False
        while trainer.steps_done < last and not interrupted:
            values = trainer.step()
            report.log(n, values, trainer.steps_done)
            progress.update()
            loss = values.get("loss/distillation", values.get("discriminator/loss", 0.0))  # while it warms up
            progress.set_postfix(loss=f"{loss:.3g}", held_out=f"{distance:.3g}")
            interrupted = is_interrupted()
            is_last = interrupted or trainer.steps_done == last
            # Saving comes first: a launcher may give an interrupted process no time for more.
            if is_last or trainer.steps_done % settings.checkpointing_steps == 0:
                training.solvers.add(trainer.averaged_solver())
                if accelerator.is_main_process:
                    measured = {"initial_distance": initial_distance, "validations": problem.evaluations}
                    measured |= {"seconds": seconds()}
                    save_state({**trainer.state_dict(), "provenance": fixed, "measured": measured}, checkpoint)
            if is_last or trainer.steps_done % settings.validation_steps == 0:
                distance = validate()
    num_samples = len(training.inputs) + settings.num_validation_samples
    evaluations = trainer.evaluations + problem.evaluations + n * len(held_out)
    evaluations = evaluations * accelerator.num_processes + training.teacher_evaluations * num_samples
    measured = {"initial_distance": initial_distance, "distance": distance}
    measured |= {"evaluations": evaluations, "seconds": seconds()}
    solver = trainer.averaged_solver()
    training.solvers.add(solver, **measured)  # whatever the check meets
    sampled = check_by_sampling(problem, solver, held_out, distance)
    training.solvers.add(solver, **measured, sampled_distance=sampled)
    training.finish_fit(n, measured)
    return not interrupted


def initial_solver(training: Training, num_inference_steps: int) -> GeneralizedSolver | None:
    """The solver that Adam starts from; `None` if a Gauss-Newton fit of it was interrupted."""
    n = num_inference_steps
    if training.initialize_from is not None:
        return training.initialize_from.initial_solver(n).at()
    if training.settings.fits_by_gauss_newton:
        # The loss is that of final states, whatever the training's: features of images would need memory for every unknown.
        solvers = training.solver_folder("gauss_newton", "gauss_newton", "l2", "states")
        is_there = n in solvers.scheduler.solvers
        if is_there or fit_by_gauss_newton(training, n, Loss("l2"), solvers, keep_improvements=False):
            return solvers.scheduler.solvers[n].at()
        return None
    published = training.settings.initialization == "published"
    options = {"solver_order": 3, "lower_order_final": False} if published else {}
    return GASScheduler.from_config(scheduler_config(training.pipe), **options).theory_solver(n, mu=1.0)


def make_adversary(training: Training) -> Adversary:
    """The discriminator, new or pretrained, with what it sees of final states."""
    settings, path = training.settings, training.settings.discriminator_model_name_or_path
    view = discriminator_view(training)
    shape = tuple(view(training.validation[:1].final).shape[1:])
    set_seed(settings.seed)
    if path is None:
        discriminator = R3GANDiscriminator.for_samples(shape, width=settings.discriminator_width)
    else:
        discriminator = R3GANDiscriminator.from_pretrained(path)
        expected = (discriminator.config.in_channels, *discriminator.config.sample_size)
        if expected != shape:
            raise ValueError(f"The discriminator in {path} takes samples of {expected}, the teacher's are of {shape}.")
    num_weights = sum(parameter.numel() for parameter in discriminator.parameters())
    training.print(f"Discriminator of {num_weights / 1e6:.2f} M weights for {shape}")
    return Adversary(discriminator.to(training.accelerator.device), settings, view)


def discriminator_view(training: Training) -> Callable[[Tensor], Tensor]:
    """From final states to what the discriminator sees: states whose channels are second, or images, averaged to its size."""
    pipe, size = training.pipe, training.settings.discriminator_size
    if training.settings.discriminator_features == "states":
        sizes = {name: training.inputs.common.get(name) for name in ("height", "width", "num_frames")}
        return lambda states: as_grid(states, pipe, **sizes)
    decode = StateDecoder(pipe, **training.inputs[:1].pipeline_arguments(pipe))

    def images(states: Tensor) -> Tensor:
        decoded = decode(states)
        return decoded if size is None else interpolate(decoded, (*decoded.shape[2:-2], size, size), mode="area")

    return images


def show_gain(training: Training) -> None:
    """Compares the solvers, from the folder as a user would load it, with Diffusers' schedulers, and pushes them to the Hub."""
    settings, report = training.settings, training.report
    ours = GASScheduler.from_pretrained(training.solvers.path)
    text, picture = "", None
    if training.compared is not None:
        label = "GAS (ours)" if settings.loss == "gas" else "GS (ours)"
        record = {"arguments": vars(settings), "fits": training.fits}
        text, picture = report.compare_with_diffusers(label, ours, training.compared, training.reduce, record)
    if not training.accelerator.is_main_process:
        return
    if picture is not None:
        training.print(f"Picture:   {picture}")
    training.print(f"Cost:      {report.evaluations} network evaluations for table and pictures")
    training.print(f"Scheduler: {training.solvers.path}")
    if settings.push_to_hub:
        if picture is not None:
            text += "\nThe same noise under the teacher, the closest of those and this solver:"
        push_to_hub(settings, training.output_dir, ours, text, picture)
