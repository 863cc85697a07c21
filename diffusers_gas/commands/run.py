"""The parts of a training: what is trained on, where solvers are kept, and the run that has these parts."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline, SchedulerMixin

from ..distillation.distill import training_provenance
from ..distillation.features import make_features
from ..distillation.losses import Loss
from ..generalized_solver import GeneralizedSolver
from ..pipelines.driving import scheduler_config
from ..pipelines.inputs import EVALUATION_SEED, BatchSize, SampleInputs, call_parameters
from ..pipelines.named_schedulers import load_our_scheduler
from ..pipelines.sampling import sample_images
from ..pipelines.teacher import (
    LAZY_SHARD_SIZE,
    LazyTeacherSamples,
    TeacherCache,
    TeacherSamples,
    evaluations_per_sample,
)
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_sdm import SDMScheduler
from .common import reporting, sum_over_processes
from .train_settings import TrainSettings


NUM_PICTURED = 10

# What may differ when a fit is continued: the number of teacher samples and the versions of packages.
MAY_CHANGE = ("num_teacher_samples", "versions")


class TrainingData:
    """What is trained on: the pipeline, the teacher's scheduler, and the samples to learn from and to judge by.

    The teacher's samples are made when they are first read, by all processes, or taken from the cache in the output folder.
    Pictures show `pictured`. `shown_evaluations` counts the network evaluations of table and pictures.
    """

    def __init__(self, settings: TrainSettings, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        # Under DeepSpeed's third stage Transformers would give every process a part of the text encoders.
        deepspeed = accelerator.state.deepspeed_plugin
        with nullcontext() if deepspeed is None else deepspeed.zero3_init_context_manager(enable=False):
            self.pipe = settings.load_pipeline(accelerator.device)
        self.teacher = settings.load_teacher(self.pipe)
        self.inputs = settings.sample_inputs(self.pipe, settings.seed, settings.num_teacher_samples)
        # What a solver was chosen by is not what it is judged by.
        num_chosen_by, num_held_out = settings.num_validation_samples, settings.num_compared_samples
        self.held_out_inputs = settings.sample_inputs(self.pipe, EVALUATION_SEED, num_chosen_by + num_held_out)
        if not set(self.inputs.seeds).isdisjoint(self.held_out_inputs.seeds):
            raise ValueError(
                f"Seeds {self.inputs.seeds} to learn from overlap the held-out ones, {self.held_out_inputs.seeds}: choose "
                "another --seed or fewer --num_teacher_samples."
            )
        self.pictured = self.held_out_inputs[:NUM_PICTURED]
        if settings.validation_prompts:
            if "prompt" not in call_parameters(self.pipe):
                raise ValueError(f"{type(self.pipe).__name__} takes no prompts: leave out `--validation_prompts`.")
            others = self.pictured.per_sample[0]
            prompts = [{**others, "prompt": prompt} for prompt in settings.validation_prompts]
            self.pictured = SampleInputs.create(EVALUATION_SEED, len(prompts), prompts, **self.inputs.common)

        folder = Path(settings.output_dir) / "teacher_samples"
        steps = settings.teacher_num_inference_steps
        self._cache = TeacherCache(folder, settings.pipeline_name, self.teacher, steps, LAZY_SHARD_SIZE)
        self.batch_size = BatchSize(settings.train_batch_size)
        self._made_by = (self.batch_size, accelerator.state)
        self.teacher_evaluations = evaluations_per_sample(self.teacher, steps)
        self.training_share = self._share(self.inputs, "Teacher")
        self._shares = [self._share(self.held_out_inputs[:num_chosen_by], "Held out")]
        if num_held_out > 0:
            self._shares.append(self._share(self.held_out_inputs[num_chosen_by:], "Compared"))
        self.shown_evaluations = 0

    def _share(self, inputs: SampleInputs, label: str) -> LazyTeacherSamples:
        batch_size, processes = self._made_by
        return LazyTeacherSamples(self._cache, self.pipe, inputs, batch_size, label, processes)

    @cached_property
    def training(self) -> TeacherSamples:
        """All of the samples to learn from."""
        batch_size, processes = self._made_by
        return self._cache.collect(self.pipe, self.inputs, batch_size, "Teacher", processes)

    def held_out(self) -> TeacherSamples:
        """This process's share of the samples to choose the best solver by."""
        return self._shares[0][:]

    def compared(self) -> TeacherSamples:
        """This process's share of the samples to judge the chosen solvers by."""
        return self._shares[1][:]

    def images(self, scheduler: SchedulerMixin, num_inference_steps: int) -> list[np.ndarray]:
        """The pictured samples under a scheduler."""
        self.shown_evaluations += len(self.pictured) * evaluations_per_sample(scheduler, num_inference_steps)
        return sample_images(self.pipe, scheduler, num_inference_steps, self.pictured, self.batch_size)

    @cached_property
    def teacher_images(self) -> list[np.ndarray]:
        return self.images(self.teacher, self.settings.teacher_num_inference_steps)


class SolverFolder:
    """A folder of a scheduler that fills with solvers of one `provenance`; solvers of other step counts stay.

    Raises:
        ValueError: If the folder has solvers that were made otherwise.
    """

    def __init__(self, path: Path, pipe: DiffusionPipeline, provenance: Mapping[str, Any], writable: bool):
        self.path, self.provenance, self.writable = path, dict(provenance), writable
        self.fixed = {name: value for name, value in self.provenance.items() if name not in MAY_CHANGE}
        if not (path / GASScheduler.config_name).exists():
            self.scheduler = GASScheduler.from_config(scheduler_config(pipe))
            return
        self.scheduler = GASScheduler.from_pretrained(path)
        for n, solver in self.scheduler.solvers.items():
            found = {name: solver.provenance.get(name) for name in self.fixed}
            if found != self.fixed:
                raise ValueError(
                    f"{path} holds a {n}-step solver made with {found}, not {self.fixed}. Choose another --output_dir or "
                    "remove that one."
                )

    def add(self, solver: GeneralizedSolver, **measured: Any) -> None:
        solver.provenance = {**self.provenance, **measured}
        self.scheduler.add_solver(solver)
        self.save()

    def save(self) -> None:
        if self.writable:
            self.scheduler.save_pretrained(self.path)


def check_same_training(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises a `ValueError` that names the arguments that have changed since the checkpoint in a folder."""
    changed = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
    if changed:
        listed = ", ".join(f"{name} was {before}, is {after}" for name, (before, after) in changed.items())
        raise ValueError(f"The checkpoint in {folder} was made with other arguments: {listed}.")


class Run:
    """One training, with what the fits of all step counts share.

    Attributes:
        data: What is trained on.
        loss: The distillation loss.
        solvers: Where the solvers go.
        initialize_from: The scheduler that `--initialize_from` names.
        fits: What was measured of each solver, by its number of steps.
        reduce: Sums a tensor over the processes.
        print: Prints a text once, without delay.
    """

    def __init__(self, settings: TrainSettings, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        self.reduce, self.print = sum_over_processes(accelerator), partial(accelerator.print, flush=True)
        self.data = data = TrainingData(settings, accelerator)
        features = make_features(
            settings.features,
            data.pipe,
            weights=settings.lpips_weights,
            size=settings.lpips_size,
            pipeline_inputs=data.inputs[:1].pipeline_arguments(data.pipe),
        )
        self.loss = Loss(settings.distance, features=features)
        self.solvers = self.solver_folder("scheduler", settings.optimizer, settings.loss, settings.features)
        self.initialize_from: GASScheduler | SDMScheduler | None = None
        if settings.initialize_from is not None:
            self.initialize_from = load_our_scheduler(settings.initialize_from)
        self.fits: dict[int, dict[str, Any]] = {}
        self._first_step = self.logged_step = 0
        self._logs = True

    def solver_folder(self, name: str, optimizer: str, loss: str, features: str) -> SolverFolder:
        """The folder for the solvers of a method; only the main process writes it."""
        settings, data = self.settings, self.data
        method = {"optimizer": optimizer, "loss": loss, "features": features, **settings.provenance()}
        provenance = training_provenance(
            data.pipe, data.inputs, data.teacher, settings.teacher_num_inference_steps, **method
        )
        return SolverFolder(Path(settings.output_dir) / name, data.pipe, provenance, self.accelerator.is_main_process)

    def start_fit(self) -> None:
        """Starts the log of a solver. Some trackers take rising steps only, so that its steps count on from those before."""
        self._first_step = self.logged_step

    def log(self, num_inference_steps: int, values: Mapping[str, Any], step: int) -> None:
        """Tells the trackers numbers of a solver at a step of its fit."""
        self.logged_step = self._first_step + step
        values = {f"{num_inference_steps}_steps/{name}": value for name, value in values.items()}
        if self._logs:
            self._logs = False  # after an error: one warning is enough
            with reporting("further entries in the trackers"):
                self.accelerator.log(values, step=self.logged_step)
                self._logs = True

    def finish_fit(self, num_inference_steps: int, measured: Mapping[str, Any]) -> None:
        """Keeps and prints what was measured of a solver; `measured` may have more."""
        names = ("initial_distance", "distance", "evaluations", "seconds")
        self.fits[num_inference_steps] = fit = {name: measured[name] for name in names}
        images = fit["evaluations"] // self.data.teacher_evaluations
        self.print(
            f"{num_inference_steps} steps: held-out distance {fit['initial_distance']:.5f} -> {fit['distance']:.5f} in "
            f"{fit['seconds']:.0f} s. This solver cost {fit['evaluations']} network evaluations, as many as sampling "
            f"{images} images with the teacher."
        )
