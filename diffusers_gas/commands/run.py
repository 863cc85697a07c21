"""One run of train_gas.py: its pipeline, its teacher's samples, and where its files lie."""

import argparse
import inspect
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from diffusers import SchedulerMixin

import diffusers_gas

from ..comparison import (
    NoPicture,
    Row,
    compare,
    comparison_picture,
    count_parameters,
    distance_to_teacher,
    markdown_table,
    sample_images,
    training_free_schedulers,
)
from ..distillation.features import make_features
from ..distillation.losses import Loss
from ..generalized_solver import GeneralizedSolver
from ..pipelines.driving import scheduler_config
from ..pipelines.inputs import EVALUATION_SEED, SampleInputs
from ..pipelines.teacher import TeacherCache, TeacherSamples
from ..schedulers.guidance import default_guidance
from ..schedulers.scheduling_gas import GASScheduler
from ..utils.files import write_text
from .common import (
    Processes,
    common_arguments,
    load_pipeline,
    pipeline_name,
    pipeline_record,
    push_to_hub,
    sample_arguments,
    teacher_scheduler,
)
from .tracking import log_images, log_solver


NUM_PICTURED = 10


class SolverFolder:
    """A scheduler folder that fills with solvers of one kind; the step counts that it has already stay.

    Args:
        path: The folder.
        config: Of the pipeline's scheduler.
        provenance: What makes its solvers; a `ValueError` if those in it were made otherwise.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], provenance: Mapping[str, Any]):
        self.path, self.provenance = path, dict(provenance)
        if not (path / GASScheduler.config_name).exists():
            self.scheduler = GASScheduler.from_config(config)
            return
        self.scheduler = GASScheduler.from_pretrained(path)
        for n, solver in self.scheduler.solvers.items():
            found = {name: solver.provenance.get(name) for name in self.provenance}
            if found != self.provenance:
                raise ValueError(
                    f"{path} holds a {n}-step solver made with {found}, not {self.provenance}. Choose another "
                    "--output_dir or remove that one."
                )

    def get(self, num_inference_steps: int) -> GeneralizedSolver | None:
        return self.scheduler.solvers.get(num_inference_steps)

    def save(self, solver: GeneralizedSolver, **record: Any) -> None:
        """Adds a solver, or a better one for its step count."""
        versions = {module.__name__: module.__version__ for module in (torch, diffusers, diffusers_gas)}
        solver.provenance = {**self.provenance, **record, "versions": versions}
        self.scheduler.add_solver(solver)
        self.scheduler.save_pretrained(self.path)


class Run(Processes):
    """One run of the script: its pipeline, its teacher's samples, and where its files lie."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.output_dir = args, Path(args.output_dir)
        if args.report_to not in (None, "all", *map(str, get_available_trackers())):
            raise ValueError(
                f"`--report_to {args.report_to}` needs the package {args.report_to}, which is not installed."
            )
        logs = self.output_dir / "logs"
        super().__init__(Accelerator(mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=logs))
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
        if args.torch_dtype is None:
            half = {"fp16": "float16", "bf16": "bfloat16"}
            args.torch_dtype = half.get(self.accelerator.mixed_precision, "float32")
        set_seed(args.seed)
        # Under DeepSpeed's third stage Transformers would give every process a part of the text encoders.
        deepspeed = self.accelerator.state.deepspeed_plugin
        with nullcontext() if deepspeed is None else deepspeed.zero3_init_context_manager(enable=False):
            self.pipe = load_pipeline(args, self.accelerator.device)
        self.teacher = teacher_scheduler(args, self.pipe)
        common = common_arguments(args)
        cycle = sample_arguments(args, self.pipe, common)
        self.training = SampleInputs.create(args.seed, args.num_teacher_samples, cycle, **common)
        self.validation = SampleInputs.create(EVALUATION_SEED, args.num_validation_samples, cycle, **common)
        if not set(self.training.seeds).isdisjoint(self.validation.seeds):
            raise ValueError(
                f"Seeds {self.training.seeds} to learn from overlap the held-out ones, {self.validation.seeds}: choose another "
                "--seed or fewer --num_teacher_samples."
            )
        self.pictured = self.validation[:NUM_PICTURED]
        if args.validation_prompts and "prompt" not in inspect.signature(type(self.pipe).__call__).parameters:
            raise ValueError(f"{type(self.pipe).__name__} takes no prompts: leave out `--validation_prompts`.")
        if args.validation_prompts:
            prompts = [{**cycle[0], "prompt": prompt} for prompt in args.validation_prompts]
            self.pictured = SampleInputs.create(EVALUATION_SEED, len(prompts), prompts, **common)
        self.folder = self.solver_folder("scheduler", args.optimizer, args.loss)
        self.loss = self.loss_of_kind(args.gas_distance if args.loss == "gas" else args.loss)
        self.reports: dict[int, dict[str, Any]] = {}
        self._log_offset = self._last_logged = 0

    def solver_folder(self, name: str, optimizer: str, loss: str, features: str | None = None) -> SolverFolder:
        args, common = self.args, {**default_guidance(self.pipe), **self.training.common}
        if args.guidance_scale is not None:
            common["guidance_scale"] = args.guidance_scale if len(args.guidance_scale) > 1 else args.guidance_scale[0]
        provenance = {
            **pipeline_record(args),
            "teacher_scheduler": type(self.teacher).__name__,
            "teacher_num_inference_steps": args.teacher_num_inference_steps,
            "pipeline_arguments": common,
            "optimizer": optimizer,
            "loss": loss,
            "features": features or args.features,
        }
        return SolverFolder(self.output_dir / name, scheduler_config(self.pipe), provenance)

    def loss_of_kind(self, kind: str) -> Loss:
        args, one_sample = self.args, self.training[:1].pipeline_arguments(self.pipe)
        features = make_features(
            args.features, self.pipe, weights=args.lpips_weights, size=args.lpips_size, pipeline_inputs=one_sample
        )
        return Loss(kind, features=features)

    def announce(self) -> None:
        args, accelerator = self.args, self.accelerator
        features = "" if args.features == "states" else f" of {args.features}"
        method = f"Gauss-Newton on the {args.loss} distance{features}"
        if args.optimizer == "adam":
            distance = f"{args.gas_distance} and an adversarial loss" if args.loss == "gas" else args.loss
            samples = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
            method = (
                f"Adam on the {distance}{features}, {args.max_train_steps} optimizer steps of {samples} samples, "
                f"from the {args.initialize_from or args.initialization} solver"
            )
        self.print(
            f"Teacher:   {type(self.pipe).__name__} from {args.pretrained_model_name_or_path}, "
            f"{count_parameters(self.pipe) / 1e6:.2f} M weights in {args.torch_dtype}, {type(self.teacher).__name__} with "
            f"{args.teacher_num_inference_steps} steps\n"
            f"Samples:   {len(self.training)} to learn from, {len(self.validation)} held out\n"
            f"Solvers:   {args.num_inference_steps} steps, {method}\n"
            f"Processes: {accelerator.num_processes} on {accelerator.device.type}\n"
            f"Output:    {self.folder.path}, cached teacher samples beside it\n"
        )

    def start_trackers(self) -> None:
        if self.args.report_to is not None:
            config = {name: str(value) for name, value in self.arguments.items()}
            self.accelerator.init_trackers("gas", config, {"wandb": {"dir": str(self.output_dir / "logs")}})

    def start_stage(self) -> None:
        """Steps logged from now on come after those so far: some trackers take rising ones only."""
        self._log_offset = self._last_logged

    def log_step(self, step: int) -> int:
        """Where a step of the current stage stands among all that were logged."""
        self._last_logged = self._log_offset + step
        return self._last_logged

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments, as far as they may be written down."""
        return {name: value for name, value in vars(self.args).items() if name != "hub_token"}

    def collect(self) -> None:
        """Teacher samples, made by all processes together."""
        args = self.args
        folder = self.output_dir / "teacher_samples"
        cache = TeacherCache(folder, pipeline_name(args), self.teacher, args.teacher_num_inference_steps)
        self.training_samples, self.validation_samples = (
            cache.collect(self.pipe, inputs, args.train_batch_size, label, self.accelerator.state)
            for inputs, label in ((self.training, "Teacher"), (self.validation, "Held out"))
        )

    def share(self, samples: TeacherSamples) -> TeacherSamples:
        """This process's part of some samples, as large as every other's."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if len(samples) < world:
            raise ValueError(f"{len(samples)} samples cannot be shared by {world} processes: ask for more of them.")
        return samples[rank::world][: len(samples) // world]

    def save(self, folder: SolverFolder, solver: GeneralizedSolver, **record: Any) -> None:
        if self.accelerator.is_main_process:
            folder.save(solver, num_teacher_samples=len(self.training), **record)

    def images(self, scheduler: SchedulerMixin, num_inference_steps: int) -> list[np.ndarray]:
        return sample_images(self.pipe, scheduler, num_inference_steps, self.pictured)

    @cached_property
    def teacher_images(self) -> list[np.ndarray]:
        return self.images(self.teacher, self.args.teacher_num_inference_steps)

    def picture(self, solver: GeneralizedSolver, step: int) -> None:
        """The teacher's images above a solver's, in the output folder and for the trackers, which get the solver, too."""
        if not self.accelerator.is_main_process:
            return
        scheduler = GASScheduler.from_config(scheduler_config(self.pipe))
        scheduler.add_solver(solver)
        n = solver.num_inference_steps
        log_solver(self.accelerator, scheduler, solver, self.log_step(step))
        try:
            images = {"teacher": self.teacher_images, "student": self.images(scheduler, n)}
        except NoPicture as error:
            self.print(str(error))
            return
        log_images(self.accelerator, n, images, self.log_step(step))
        path = self.output_dir / "validation" / f"{n}_steps-{step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        comparison_picture(images, path)

    def report(self) -> None:
        """Table and picture against every few-step scheduler of Diffusers, from the folder as a user would load it."""
        args, pipe, num_samples = self.args, self.pipe, min(self.args.num_compared_samples, len(self.validation))
        samples = self.share(self.validation_samples[:num_samples])
        ours = GASScheduler.from_pretrained(self.folder.path)
        label = "GAS (ours)" if args.loss == "gas" else "GS (ours)"
        steps, batch_size = list(self.reports), args.train_batch_size
        rivals = training_free_schedulers(scheduler_config(pipe))
        others = compare(pipe, rivals, steps, samples, batch_size, self.reduce)
        rows = [Row(n, label, distance_to_teacher(pipe, ours, n, samples, batch_size, self.reduce)) for n in steps]
        if not self.accelerator.is_main_process:
            return
        table = markdown_table(rows, others)
        self.print(f"\nMean squared distance to the teacher on {num_samples} held-out samples:\n\n{table}\n")
        write_text(self.output_dir / "comparison.md", table + "\n")
        results = {
            "arguments": self.arguments,
            "num_compared_samples": num_samples,
            "fits": self.reports,
            "ours": list(map(asdict, rows)),
            "others": list(map(asdict, others)),
        }
        write_text(self.output_dir / "comparison.json", json.dumps(results, indent=2) + "\n")

        n = steps[0]
        best = next(row.scheduler for row in others if row.num_inference_steps == n)
        try:
            images = {
                f"teacher, {args.teacher_num_inference_steps} steps": self.teacher_images,
                f"{best}, {n} steps": self.images(rivals[best], n),
                f"{label}, {n} steps": self.images(ours, n),
            }
        except NoPicture as error:
            self.print(str(error))
        else:
            prompts = [str(sample.get("prompt", "")) for sample in self.pictured.per_sample]
            comparison_picture(images, self.output_dir / "comparison.png", prompts)
            self.print(f"Picture:   {self.output_dir / 'comparison.png'}")
        self.print(f"Scheduler: {self.folder.path}")

    def push_to_hub(self) -> None:
        results = (
            "Mean squared distance to the teacher on held-out samples, beside the closest of Diffusers' training-free "
            f"schedulers:\n\n{(self.output_dir / 'comparison.md').read_text()}\n"
            "The same noise under the teacher, the closest of those and this solver:"
        )
        scheduler = GASScheduler.from_pretrained(self.folder.path)
        self.print(f"Pushed to: {push_to_hub(self.args, scheduler, results, self.output_dir / 'comparison.png')}")
