"""What a training shows: numbers for trackers on the way, in the end a table and a picture against Diffusers' schedulers."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from ..comparison import NUM_OTHERS, compare, few_step_rivals, markdown_table, relative_detail
from ..pipelines.inputs import BatchSize, SampleInputs
from ..pipelines.sampling import sample_images
from ..pipelines.teacher import LazyTeacherSamples, evaluations_per_sample
from ..schedulers.scheduling_gas import GASScheduler
from ..utils.files import write_text
from .reporting import errors_as_warnings, figures


@dataclass
class TrainingReport:
    """What a training shows. Whatever fails here is a warning and costs nothing else.

    Args:
        accelerator: The processes and the trackers.
        pipe, teacher, teacher_num_inference_steps: The pipeline, and how its teacher samples.
        pictured: The samples in pictures.
        batch_size: The most samples per pipeline call.
        output_dir: The folder for table and pictures.

    Attributes:
        evaluations: Of the network for table and pictures.
    """

    accelerator: Accelerator
    pipe: DiffusionPipeline
    teacher: SchedulerMixin
    teacher_num_inference_steps: int
    pictured: SampleInputs
    batch_size: BatchSize
    output_dir: Path
    evaluations: int = field(default=0, init=False)
    # The steps that trackers were told last: the first of a solver, and the newest.
    _first_step: int = field(default=0, init=False)
    _step: int = field(default=0, init=False)
    _trackers_work: bool = field(default=True, init=False)

    def images(self, scheduler: SchedulerMixin, num_inference_steps: int) -> list[np.ndarray]:
        """The pictured samples under a scheduler."""
        self.evaluations += len(self.pictured) * evaluations_per_sample(scheduler, num_inference_steps)
        return sample_images(self.pipe, scheduler, num_inference_steps, self.pictured, self.batch_size)

    @cached_property
    def teacher_images(self) -> list[np.ndarray]:
        return self.images(self.teacher, self.teacher_num_inference_steps)

    def start_solver(self) -> None:
        """Starts the log of a solver. Some trackers take rising steps only, so that its steps count on from those before."""
        self._first_step = self._step

    def log(self, num_inference_steps: int, values: Mapping[str, Any], step: int) -> None:
        """Tells the trackers numbers of a solver at a step of its fit."""
        self._step = self._first_step + step
        values = {f"{num_inference_steps}_steps/{name}": value for name, value in values.items()}
        if self._trackers_work:
            self._trackers_work = False  # after an error: one warning is enough
            with errors_as_warnings("further entries in the trackers"):
                self.accelerator.log(values, step=self._step)
                self._trackers_work = True

    def compare_with_diffusers(
        self,
        label: str,
        ours: GASScheduler,
        samples: LazyTeacherSamples,
        reduce: Callable[[Tensor], Tensor],
        record: Mapping[str, Any],
    ) -> tuple[str, Path | None]:
        """Compares solvers with few-step schedulers of Diffusers, and writes table, numbers and a picture at the fewest steps.

        Args:
            label: The name of `ours`.
            ours: The scheduler, whose solvers are compared at the step counts in `record["fits"]`.
            samples: This process's share of the teacher's samples.
            reduce: Sums a tensor over the processes.
            record: What the file of numbers has beside the results.

        Returns:
            `(str, Path | None)`: The table with a text, and the path of the picture. Other processes than the main one have neither.
        """
        steps, text, closest = sorted(record["fits"]), "", list[str]()
        schedulers: dict[str, SchedulerMixin] = {label: ours}

        @cache  # for the table and for the picture
        def images_at_fewest_steps(name: str) -> list[np.ndarray]:
            return self.images(schedulers[name], steps[0])

        with errors_as_warnings("table"):
            schedulers |= few_step_rivals(self.pipe)
            share = samples[:]
            rows = compare(self.pipe, schedulers, steps, share, self.batch_size, reduce)
            own, others = ([row for row in rows if (row.scheduler == label) == is_own] for is_own in (True, False))
            if not own:
                raise ValueError(f"{label} could not be sampled.")
            num_samples = len(share) * self.accelerator.num_processes
            per_sample = evaluations_per_sample(self.teacher, self.teacher_num_inference_steps)
            self.evaluations += num_samples * (per_sample + sum(row.num_inference_steps for row in rows))
            closest = [row.scheduler for row in others if row.num_inference_steps == steps[0]][:1]
            if self.accelerator.is_main_process:
                with errors_as_warnings("detail in the table"):
                    for n in steps:
                        for row in [row for row in own + others if row.num_inference_steps == n][: 1 + NUM_OTHERS]:
                            name, is_cached = row.scheduler, n == steps[0]
                            images = images_at_fewest_steps(name) if is_cached else self.images(schedulers[name], n)
                            row.detail = relative_detail(images, self.teacher_images)
                table = markdown_table(own, others)
                text = (
                    f"Mean squared distance and mean absolute difference to the teacher on {num_samples} held-out samples, and the "
                    "power of fine detail in images relative to the teacher's (more is grain, less is blur), beside the closest of "
                    f"Diffusers' training-free schedulers:\n\n{table}\n"
                )
                print(f"\n{text}", flush=True)
                write_text(self.output_dir / "comparison.md", table + "\n")
                counts = {"num_compared_samples": num_samples, "shown_evaluations": self.evaluations}
                results = {"ours": list(map(asdict, own)), "others": list(map(asdict, others))}
                write_text(
                    self.output_dir / "comparison.json", json.dumps({**record, **counts, **results}, indent=2) + "\n"
                )
        picture = None
        if self.accelerator.is_main_process:
            with errors_as_warnings("picture"):
                draw = figures().comparison_picture  # before it costs evaluations
                shown = {f"teacher, {self.teacher_num_inference_steps} steps": self.teacher_images}
                shown |= {f"{name}, {steps[0]} steps": images_at_fewest_steps(name) for name in [*closest, label]}
                prompts = [str(sample.get("prompt", "")) for sample in self.pictured.per_sample]
                draw(shown, self.output_dir / "comparison.png", prompts)
                picture = self.output_dir / "comparison.png"
        return text, picture
