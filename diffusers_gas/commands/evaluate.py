"""Measures samplers of a diffusion pipeline on many seeded samples: Frechet distance, distance to a teacher, CLIP score.

    accelerate launch training/evaluate.py
    accelerate launch training/evaluate.py --schedulers gas_output/scheduler UniPCMultistepScheduler --num_inference_steps 4
    accelerate launch training/evaluate.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt \\
        --schedulers you/some-model-gas DPMSolverMultistepScheduler:timestep_spacing=trailing --num_samples 50000 \\
        --feature_extractor inception --reference statistics.npz

Without arguments it compares training-free schedulers on the teacher in examples/teachers/digits. A run that was ended goes
on when started again; an added sampler costs its own samples only.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..papers.evaluation.clip_score import CLIPScore
from ..papers.evaluation.feature_extractors import TRANSFORMERS_PREFIX, load_feature_extractor
from ..papers.evaluation.frechet import Gaussian, frechet_distance, load_reference, save_reference
from ..papers.evaluation.image_files import image_paths, read_images
from ..papers.evaluation.measurement import Measurement, Measures, Sampler, has_prompts
from ..pipelines.inputs import EVALUATION_SEED, BatchSize
from ..pipelines.named_schedulers import check_step_counts, load_scheduler
from ..pipelines.sampling import sample_images
from ..utils.files import remove_leftovers, write_text
from ..utils.tensors import FLOAT32
from .arguments import TEACHERS, PipelineSettings, TeacherSettings, argument, parse, positive
from .common import draw_images, model_line, start_accelerator, sum_over_processes


NUM_PICTURED = 10
SCHEDULERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler:timestep_spacing=trailing")
DIGITS_CLASSIFIER = TEACHERS / "digits" / "classifier"


@dataclass
class EvaluationSettings(TeacherSettings, PipelineSettings):
    """The evaluation."""

    schedulers: Sequence[str] = argument(
        SCHEDULERS,
        "scheduler folders or Hub ids, names of Diffusers' or our classes with settings (Class:name=value,name=value), or "
        "`teacher`",
        type=str,
        nargs="+",
    )
    num_inference_steps: Sequence[int] = argument(
        (4, 6, 8), "of every scheduler but the teacher", type=positive, nargs="+"
    )
    num_samples: int = argument(1024, "published Frechet distances are of 50000")
    seed: int = argument(EVALUATION_SEED, "of the first sample", type=int)
    batch_size: int = argument(64, "most samples per pipeline call and process, at most 64")
    reference: str = argument(
        "teacher",
        "what the Frechet distance is to: a .npz file with mu and sigma, e.g. teacher.npz of an earlier run, a folder of "
        "images, or `teacher` for its samples from the same seeds (the distance is then lower than to other samples)",
    )
    feature_extractor: str | None = argument(
        None, "`digits`, `inception` (package torch-fidelity), transformers:REPO_OR_FOLDER, or a TorchScript file *.pt"
    )
    trust_torchscript: bool = argument(False, "let a TorchScript feature extractor run its own code")
    compare_with_teacher: bool = argument(False, "mean squared distance of final states from the same seeds")
    clip_model: str | None = argument(None, "a CLIP model of Transformers, for the agreement with prompts")
    save_images: bool = argument(False, "in {output_dir}/images")
    output_dir: str = argument("evaluation_output")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_inference_steps = sorted(set(self.num_inference_steps))
        if self.feature_extractor is None and Path(self.pretrained_model_name_or_path).parent == TEACHERS:
            self.feature_extractor = "digits"
        if self.feature_extractor is None and not (self.compare_with_teacher or self.clip_model):
            raise ValueError(
                "Nothing to measure: pass `--feature_extractor`, `--compare_with_teacher` or `--clip_model`."
            )


@dataclass
class Result:
    """One line of the table. What was not measured is `None`, and so is everything of a sampler that diverged."""

    scheduler: str
    num_inference_steps: int
    num_diverged: int
    frechet_distance: float | None = None
    clip_score: float | None = None
    distance_to_teacher: float | None = None


COLUMNS = {
    "frechet_distance": ("Frechet distance", ".3f"),
    "clip_score": ("CLIP score", ".2f"),
    "distance_to_teacher": ("distance to teacher", ".5f"),
}


def main(arguments: list[str] | None = None) -> None:
    evaluation = Evaluation(EvaluationSettings(**parse(EvaluationSettings, __doc__, arguments)))
    evaluation.announce()
    results = evaluation.measure()
    if evaluation.accelerator.is_main_process:
        evaluation.report(results)
    evaluation.accelerator.end_training()


class Evaluation:
    """The samplers, what is measured of them, and the results. Every process measures its share of the samples."""

    def __init__(self, settings: EvaluationSettings):
        self.settings, self.output_dir, self.accelerator = settings, Path(settings.output_dir), start_accelerator()
        self.rank, self.num_processes = self.accelerator.process_index, self.accelerator.num_processes
        self.reduce, self.print = sum_over_processes(self.accelerator), partial(self.accelerator.print, flush=True)
        self.pipe, self.batch_size = settings.load_pipeline(self.accelerator.device), BatchSize(settings.batch_size)
        self.inputs = settings.sample_inputs(self.pipe, settings.seed, settings.num_samples)
        self.teacher = Sampler("teacher", settings.load_teacher(self.pipe), settings.teacher_num_inference_steps)
        self.samplers = self._samplers()
        self.measures = self._measures(self.accelerator.device)
        self.num_features = 0
        if self.measures.features is not None:
            self.num_features = self.measures.features(torch.zeros(1, 3, 64, 64, **FLOAT32)).shape[1]
            self.reference = self._reference() if self.accelerator.is_main_process else None
        remove_leftovers(self.output_dir)
        shards, images = self.output_dir / "shards", self.output_dir / "images" if settings.save_images else None
        self.measurement = Measurement(
            shards, self.pipe, settings.pipeline_name, self.inputs, self.measures, self.batch_size, images
        )

    def _samplers(self) -> list[Sampler]:
        settings, samplers = self.settings, []
        is_reference = settings.feature_extractor is not None and settings.reference == "teacher"
        if is_reference or settings.compare_with_teacher or "teacher" in settings.schedulers:
            samplers.append(self.teacher)  # first: the others are compared with its samples
        for entry in dict.fromkeys(settings.schedulers):
            if entry != "teacher":
                scheduler = load_scheduler(entry, self.pipe)
                check_step_counts(entry, scheduler, settings.num_inference_steps)
                samplers += [Sampler(entry, scheduler, n) for n in settings.num_inference_steps]
        return samplers

    def _measures(self, device: torch.device) -> Measures:
        settings, features, clip_score = self.settings, None, None
        if settings.feature_extractor is not None:
            name = DIGITS_CLASSIFIER if settings.feature_extractor == "digits" else settings.feature_extractor
            features = load_feature_extractor(name, device, trust_torchscript=settings.trust_torchscript)
        if settings.clip_model is not None:
            if not has_prompts(self.inputs):
                raise ValueError("`--clip_model` compares images with prompts, but the samples have none.")
            clip_score = CLIPScore(settings.clip_model, device)
        names = {name: _content(getattr(settings, name)) for name in ("feature_extractor", "clip_model")}
        return Measures(names, features, clip_score, self.teacher if settings.compare_with_teacher else None)

    def _reference(self) -> Gaussian | None:
        """The statistics that `--reference` names; `None` for those of the teacher, which are still to be made."""
        path = Path(self.settings.reference)
        if self.settings.reference == "teacher":
            return None
        if path.is_dir():
            gaussian = Gaussian.of_features(self._features_of_images(path))
        elif path.suffix == ".npz" and path.is_file():
            gaussian, extractor = load_reference(path)
            if extractor not in (None, self.settings.feature_extractor):
                raise ValueError(f"{path} holds features of {extractor}, not of {self.settings.feature_extractor}.")
        else:
            raise ValueError(f"`--reference {path}` must be a .npz file, a folder of images, or `teacher`.")
        if len(gaussian.mean) != self.num_features:
            raise ValueError(
                f"{path} has statistics of {len(gaussian.mean)} features, {self.settings.feature_extractor} makes "
                f"{self.num_features}: use the same feature extractor for both."
            )
        return gaussian

    def _features_of_images(self, folder: Path) -> Tensor:
        assert self.measures.features is not None
        paths, size = image_paths(folder), self.settings.batch_size
        starts = tqdm(range(0, len(paths), size), desc="Reference", unit="batch")
        return torch.cat([self.measures.features(read_images(paths[start : start + size])) for start in starts])

    def announce(self) -> None:
        settings = self.settings
        measured = {
            f"Frechet distance of {settings.feature_extractor} features to {settings.reference}": self.num_features,
            "distance to the teacher": settings.compare_with_teacher,
            f"CLIP score of {settings.clip_model}": settings.clip_model,
        }
        samplers = "\n           ".join(sampler.label for sampler in self.samplers)
        if self.teacher in self.samplers:
            samplers += f"\n           (teacher: {type(self.teacher.scheduler).__name__})"
        self.print(
            f"Model:     {model_line(settings, self.pipe)}\n"
            f"Samples:   {len(self.inputs)}, seeds {self.inputs.seeds[0]} to {self.inputs.seeds[-1]}\n"
            f"Samplers:  {samplers}\n"
            f"Measures:  {', '.join(name for name, wanted in measured.items() if wanted)}\n"
            f"Output:    {self.output_dir}\n"
        )

    def measure(self) -> list[Result]:
        """Every process measures its shards of the samples, and leaves them in files. The main one reads these."""
        own = self.measurement.shards[self.rank :: self.num_processes]
        total = len(self.samplers) * sum(map(len, own))
        with tqdm(total=total, desc="Evaluating", unit="sample", disable=self.rank > 0) as progress:
            for sampler in self.samplers:
                progress.set_postfix_str(sampler.label)
                for shard in own:
                    diverged = self.measurement.measure(sampler, shard)["diverged"]
                    if sampler is self.teacher and diverged.any():
                        raise ValueError(
                            f"{diverged.sum()} of {len(shard)} of the teacher's samples diverged: choose another "
                            "`--teacher_scheduler`."
                        )
                    progress.update(len(shard))
        self.accelerator.wait_for_everyone()
        return [self._result(sampler) for sampler in self.samplers] if self.accelerator.is_main_process else []

    def _result(self, sampler: Sampler) -> Result:
        measured = self.measurement.results(sampler)
        result = Result(sampler.name, sampler.num_inference_steps, int(measured["diverged"].sum()))
        if result.num_diverged == 0:
            if self.num_features:
                result.frechet_distance = self._frechet_distance(sampler, measured["features"])
            if self.settings.clip_model is not None:
                result.clip_score = measured["clip_score"].double().mean().item()
            if self.settings.compare_with_teacher:
                # The teacher has none to itself.
                result.distance_to_teacher = measured["distance"].mean().item() if "distance" in measured else 0.0
        return result

    def _frechet_distance(self, sampler: Sampler, features: Tensor) -> float:
        gaussian = Gaussian.of_features(features)
        if self.reference is None:
            self.reference = gaussian
        if sampler is self.teacher:
            save_reference(gaussian, str(self.settings.feature_extractor), self.output_dir / "teacher.npz")
        return frechet_distance(gaussian, self.reference)

    def report(self, results: list[Result]) -> None:
        """Table, numbers and a picture of the same noise under every sampler."""
        table = markdown_table(results)
        self.print(f"\n{len(self.inputs)} samples:\n\n{table}\n")
        if self.num_features >= len(self.inputs):
            self.print(
                f"Note: {len(self.inputs)} samples do not determine a covariance of {self.num_features} features. Compare "
                "these Frechet distances with others of as many samples only."
            )
        write_text(self.output_dir / "results.md", table + "\n")
        report = {"arguments": vars(self.settings), "results": [asdict(result) for result in results]}
        write_text(self.output_dir / "results.json", json.dumps(report, indent=2) + "\n")
        self.print(f"Results:   {self.output_dir / 'results.json'}")
        picture = self.output_dir / "results.png"
        if draw_images(picture, self._rows_of_images):
            self.print(f"Picture:   {picture}")

    def _rows_of_images(self) -> dict[str, list[np.ndarray]]:
        rows, pictured = {}, self.inputs[:NUM_PICTURED]
        for sampler in self.samplers:
            images = sample_images(
                self.pipe, sampler.scheduler, sampler.num_inference_steps, pictured, self.batch_size
            )
            rows[sampler.label.replace(":", ":\n")] = images
        return rows


def _content(name: str | None) -> list[str]:
    """The name of a network and hashes of its files, if it is on this machine."""
    if name is None:
        return []
    path = DIGITS_CLASSIFIER if name == "digits" else Path(name.removeprefix(TRANSFORMERS_PREFIX))
    files = sorted(file for file in [path, *path.rglob("*")] if file.is_file())
    return [name, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]


def markdown_table(results: Sequence[Result]) -> str:
    """Results as a table with a column for each measure that was taken."""
    measured = [name for name in COLUMNS if any(getattr(result, name) is not None for result in results)]
    rows = [["scheduler", "steps", *(COLUMNS[name][0] for name in measured)], ["---"] * (2 + len(measured))]
    for result in results:
        values = [(getattr(result, name), COLUMNS[name][1]) for name in measured]
        diverged = f"{result.num_diverged} samples diverged"
        cells = [diverged if value is None else format(value, form) for value, form in values]
        rows.append([result.scheduler, str(result.num_inference_steps), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
