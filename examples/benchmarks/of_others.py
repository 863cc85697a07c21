"""Solvers for networks that others have trained, against the schedulers of Diffusers: shared by galaxies.py and time_series.py."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from report import markdown_table
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, SampleInputs, SDMScheduler, calibrate, distill
from diffusers_gas.comparison import training_free_schedulers
from diffusers_gas.pipelines.driving import sample_latents, scheduler_config
from diffusers_gas.pipelines.inputs import EVALUATION_SEED
from diffusers_gas.pipelines.teacher import TeacherCache, TeacherSamples, default_teacher


TEACHER_STEPS = 50
FIRST_SEED = 2 * EVALUATION_SEED
BEST, SDM, GS = "best of Diffusers", "SDM, calibrated", "GS"

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A network of others in a pipeline, and the samples on which solvers for it are measured.

    Attributes:
        name: The network's name.
        pipe: The pipeline.
        folder: Keeps solvers, plans and the teacher's samples.
        steps: Numbers of evaluations.
        judged: Samples that no fit has used.
        num_screened: How many of them choose the best of Diffusers' schedulers.
        batch_size: The most samples in a call of the pipeline.
        distillation, calibration: Arguments of `distill` and `calibrate`.
    """

    name: str
    pipe: DiffusionPipeline
    folder: Path
    steps: tuple[int, ...]
    judged: SampleInputs
    num_screened: int
    batch_size: int
    distillation: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)

    def samples(self, scheduler: SchedulerMixin, num_inference_steps: int, inputs: SampleInputs) -> Tensor:
        """Final states of a scheduler, `(num_samples, ...)`."""
        return final_states(self.pipe, scheduler, num_inference_steps, inputs, self.batch_size)

    def teacher_samples(self, inputs: SampleInputs) -> TeacherSamples:
        """The teacher's samples. Those of an earlier run are read."""
        cache = TeacherCache(self.folder / "teacher", self.name, default_teacher(self.pipe), TEACHER_STEPS)
        return cache.collect(self.pipe, inputs, self.batch_size, f"{self.name}, teacher")

    def distilled(self) -> GASScheduler:
        """Solvers for `steps`. Those of an earlier run are read."""
        folder, config = self.folder / "gs", scheduler_config(self.pipe)
        found = GASScheduler.from_pretrained(folder) if folder.exists() else GASScheduler.from_config(config)
        for n in self.steps:
            if n not in found.solvers:
                cache = self.folder / "teacher"
                found.add_solver(distill(self.pipe, n, cache_dir=cache, **self.distillation).solvers[n])
                found.save_pretrained(folder)
        return found

    def calibrated(self) -> SDMScheduler:
        """Plans for `steps` towards the teacher's samples. Those of an earlier run are read."""
        folder = self.folder / "sdm"
        return calibrate(
            self.pipe,
            self.steps,
            teacher=default_teacher(self.pipe),
            teacher_num_inference_steps=TEACHER_STEPS,
            resume_from=SDMScheduler.from_pretrained(folder) if folder.exists() else None,
            on_plan=lambda scheduler: scheduler.save_pretrained(folder),
            **self.calibration,
        )

    def rivals(self) -> dict[str, SchedulerMixin]:
        """Diffusers' deterministic schedulers with all of their spacings."""
        return training_free_schedulers(scheduler_config(self.pipe))

    def measure(self, further: Callable[[Tensor, Tensor], Row]) -> list[Row]:
        """A row of errors for every method and number of evaluations. `further` ones are of samples and the teacher's."""
        ours = {
            "SDM as it comes": SDMScheduler.from_config(scheduler_config(self.pipe)),
            SDM: self.calibrated(),
            GS: self.distilled(),
        }
        teacher, rivals, rows = self.teacher_samples(self.judged).final, self.rivals(), []
        for n in tqdm(self.steps, desc=f"{self.name}, measured", unit="count"):
            screened = {}
            for label, rival in rivals.items():
                states = self.samples(rival, n, self.judged[: self.num_screened])
                distance = errors(states, teacher[: self.num_screened])["distance"]
                screened[label] = distance if math.isfinite(distance) else math.inf
            best = min(screened, key=screened.__getitem__)
            for method, scheduler in {BEST: rivals[best], **ours}.items():
                states = self.samples(scheduler, n, self.judged)
                row = {
                    "evaluations": n,
                    "method": method,
                    "scheduler": best if method == BEST else type(scheduler).__name__,
                }
                rows.append(row | errors(states, teacher) | further(states, teacher))
            rows[-1]["fit_evaluations"] = ours[GS].solvers[n].provenance["evaluations"]
        return rows

    def pictured(self, rows: list[Row], num_inference_steps: int) -> dict[str, SchedulerMixin]:
        """The best of Diffusers in these rows, and ours."""
        best = next(r for r in rows if (r["evaluations"], r["method"]) == (num_inference_steps, BEST))
        return {BEST: self.rivals()[best["scheduler"]], SDM: self.calibrated(), GS: self.distilled()}


def final_states(
    pipe: DiffusionPipeline,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    inputs: SampleInputs,
    batch_size: int,
) -> Tensor:
    """What a pipeline samples with a scheduler, `(num_samples, ...)`."""
    return torch.stack(
        inputs.in_calls(
            pipe, batch_size, lambda arguments: sample_latents(pipe, scheduler, num_inference_steps, **arguments)[1]
        )
    )


def errors(states: Tensor, teacher: Tensor) -> Row:
    """Distances to the teacher's samples, which have the same noise."""
    squares = (states - teacher).square().flatten(1).mean(1)
    return {
        "distance": squares.mean().item(),
        "distance_error": squares.std().item() / math.sqrt(len(squares)),
        "median": squares.median().item(),
        "absolute": (states - teacher).abs().mean().item(),
    }


def table(results: Mapping[str, list[Row]], further: Mapping[str, Callable[[Row], str]]) -> str:
    """The errors of all rows, with columns of `further` ones."""
    header = ["network", "evaluations", "method", "distance to the teacher", "relative to the best of Diffusers"]
    header += ["median", "absolute", *further]
    lines = []
    for name, rows in results.items():
        best = {row["evaluations"]: row["distance"] for row in rows if row["method"] == BEST}
        for row in rows:
            n, method = row["evaluations"], row["method"]
            lines.append(
                [
                    name,
                    str(n),
                    f"{method} ({row['scheduler']})" if method == BEST else method,
                    f"{row['distance']:.5f} ± {row['distance_error']:.5f}",
                    f"{row['distance'] / best[n]:.3f}",
                    f"{row['median']:.5f}",
                    f"{row['absolute']:.4f}",
                    *(column(row) for column in further.values()),
                ]
            )
    return markdown_table(header, lines)


def row_labels(methods: Mapping[str, Any], num_inference_steps: int) -> list[str]:
    """Labels of a picture: the teacher, then methods."""
    counts = {"teacher": TEACHER_STEPS} | dict.fromkeys(methods, num_inference_steps)
    return [f"{method}\n{count} evaluations" for method, count in counts.items()]
