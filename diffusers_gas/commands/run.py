"""The parts of a training: what is trained on, where solvers are kept, and the run that has these parts."""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline, SchedulerMixin

from ..comparison import sample_images
from ..distillation.distill import training_provenance
from ..distillation.features import make_features
from ..distillation.losses import Loss
from ..pipelines.driving import scheduler_config
from ..pipelines.inputs import EVALUATION_SEED, SampleInputs
from ..pipelines.named_schedulers import load_our_scheduler
from ..pipelines.teacher import TeacherCache, TeacherSamples
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_sdm import SDMScheduler
from .common import sum_over_processes
from .tracking import TrainingLog
from .train_settings import TrainSettings


NUM_PICTURED = 10

# A solver may be fitted further with other samples and other versions; all else that made it must stay.
MAY_CHANGE = ("num_teacher_samples", "versions")


class TrainingData:
    """What is trained on: the pipeline, the teacher's scheduler, and the samples to learn from and to judge by.

    Args:
        settings: The settings.
        accelerator: The processes, which make the teacher's samples together.

    Attributes:
        training, held_out: The teacher's samples, all of them in every process; there after `collect`.
        pictured: The inputs of the samples that pictures show.
    """

    training: TeacherSamples
    held_out: TeacherSamples

    def __init__(self, settings: TrainSettings, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        self.pipe = self._load_pipeline()
        self.teacher = settings.load_teacher(self.pipe)
        self.inputs = settings.sample_inputs(self.pipe, settings.seed, settings.num_teacher_samples)
        self.held_out_inputs = settings.sample_inputs(self.pipe, EVALUATION_SEED, settings.num_validation_samples)
        if not set(self.inputs.seeds).isdisjoint(self.held_out_inputs.seeds):
            raise ValueError(
                f"Seeds {self.inputs.seeds} to learn from overlap the held-out ones, {self.held_out_inputs.seeds}: choose "
                "another --seed or fewer --num_teacher_samples."
            )
        self.pictured = self.held_out_inputs[:NUM_PICTURED]
        if settings.validation_prompts:
            if "prompt" not in inspect.signature(type(self.pipe).__call__).parameters:
                raise ValueError(f"{type(self.pipe).__name__} takes no prompts: leave out `--validation_prompts`.")
            others = self.pictured.per_sample[0]
            prompts = [{**others, "prompt": prompt} for prompt in settings.validation_prompts]
            self.pictured = SampleInputs.create(EVALUATION_SEED, len(prompts), prompts, **self.inputs.common)

    def _load_pipeline(self) -> DiffusionPipeline:
        # Under DeepSpeed's third stage Transformers would give every process a part of the text encoders.
        deepspeed = self.accelerator.state.deepspeed_plugin
        with nullcontext() if deepspeed is None else deepspeed.zero3_init_context_manager(enable=False):
            return self.settings.load_pipeline(self.accelerator.device)

    def collect(self) -> None:
        """Makes the teacher's samples, with all processes, or takes them from the cache in the output folder."""
        settings = self.settings
        folder = Path(settings.output_dir) / "teacher_samples"
        cache = TeacherCache(folder, settings.pipeline_name, self.teacher, settings.teacher_num_inference_steps)
        self.training, self.held_out = (
            cache.collect(self.pipe, inputs, settings.train_batch_size, label, self.accelerator.state)
            for inputs, label in ((self.inputs, "Teacher"), (self.held_out_inputs, "Held out"))
        )

    def share(self, samples: TeacherSamples) -> TeacherSamples:
        """This process's part of some samples; all parts are equally large."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if len(samples) < world:
            raise ValueError(f"{len(samples)} samples cannot be shared by {world} processes: ask for more of them.")
        return samples[rank::world][: len(samples) // world]

    def images(self, scheduler: SchedulerMixin, num_inference_steps: int) -> list[np.ndarray]:
        """The pictured samples under a scheduler."""
        return sample_images(self.pipe, scheduler, num_inference_steps, self.pictured)

    @cached_property
    def teacher_images(self) -> list[np.ndarray]:
        return self.images(self.teacher, self.settings.teacher_num_inference_steps)

    def loss(self, kind: Literal["l2", "l1", "huber"]) -> Loss:
        """The distillation loss of a kind on the features that the settings name."""
        settings, one_sample = self.settings, self.inputs[:1].pipeline_arguments(self.pipe)
        weights, size = settings.lpips_weights, settings.lpips_size
        features = make_features(settings.features, self.pipe, weights=weights, size=size, pipeline_inputs=one_sample)
        return Loss(kind, features=features)


class SolverFolder:
    """A folder of a scheduler that fills with solvers of one method; solvers of other step counts stay.

    Args:
        path: The folder.
        pipe: The pipeline that the solvers are for.
        provenance: What makes the solvers.
        writable: Whether this process writes the folder.

    Raises:
        ValueError: If the folder has solvers that were made otherwise.
    """

    def __init__(self, path: Path, pipe: DiffusionPipeline, provenance: Mapping[str, Any], writable: bool):
        self.path, self.provenance, self.writable = path, dict(provenance), writable
        if not (path / GASScheduler.config_name).exists():
            self.scheduler = GASScheduler.from_config(scheduler_config(pipe))
            return
        self.scheduler = GASScheduler.from_pretrained(path)
        expected = {name: value for name, value in self.provenance.items() if name not in MAY_CHANGE}
        for n, solver in self.scheduler.solvers.items():
            found = {name: solver.provenance.get(name) for name in expected}
            if found != expected:
                raise ValueError(
                    f"{path} holds a {n}-step solver made with {found}, not {expected}. Choose another --output_dir or "
                    "remove that one."
                )

    def save(self) -> None:
        if self.writable:
            self.scheduler.save_pretrained(self.path)


class Run:
    """One training, with what the fits of all step counts share.

    Attributes:
        data: What is trained on.
        loss: The distillation loss.
        solvers: Where the solvers go.
        log: What the trackers are told.
        initialize_from: The scheduler that `--initialize_from` names.
        fits: What was measured of each solver, by its number of steps.
        reduce: Sums a tensor over the processes.
        print: Prints a text once, without delay.
    """

    def __init__(self, settings: TrainSettings, accelerator: Accelerator):
        self.settings, self.accelerator, self.log = settings, accelerator, TrainingLog(accelerator)
        self.reduce, self.print = sum_over_processes(accelerator), partial(accelerator.print, flush=True)
        self.data = TrainingData(settings, accelerator)
        self.loss = self.data.loss(settings.distance)
        self.solvers = self.solver_folder("scheduler", settings.optimizer, settings.loss, settings.features)
        self.initialize_from: GASScheduler | SDMScheduler | None = None
        if settings.initialize_from is not None:
            self.initialize_from = load_our_scheduler(settings.initialize_from)
        self.fits: dict[int, dict[str, Any]] = {}

    def solver_folder(self, name: str, optimizer: str, loss: str, features: str) -> SolverFolder:
        """The folder for the solvers of a method; only the main process writes it."""
        settings, data = self.settings, self.data
        provenance = training_provenance(
            data.pipe,
            data.inputs,
            data.teacher,
            settings.teacher_num_inference_steps,
            optimizer=optimizer,
            loss=loss,
            features=features,
            **settings.provenance(),
        )
        return SolverFolder(Path(settings.output_dir) / name, data.pipe, provenance, self.accelerator.is_main_process)
