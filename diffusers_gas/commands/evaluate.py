"""Measures samplers of a diffusion pipeline on many seeded samples: Frechet distance, distance to a teacher, CLIP score.

    accelerate launch training/evaluate.py
    accelerate launch training/evaluate.py --schedulers gas_output/scheduler UniPCMultistepScheduler --num_inference_steps 4
    accelerate launch training/evaluate.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt \\
        --schedulers you/some-model-gas DPMSolverMultistepScheduler:timestep_spacing=trailing --num_samples 50000 \\
        --feature_extractor inception --reference statistics.npz

Without arguments the script compares training-free schedulers on the teacher in examples/teachers/digits. A run that was ended
goes on when started again; an added sampler costs its own samples only.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..papers.evaluation.clip_score import CLIPScore
from ..papers.evaluation.feature_extractors import TRANSFORMERS_PREFIX, load_feature_extractor
from ..papers.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance, load_npz_reference
from ..papers.evaluation.image_files import image_paths, read_images
from ..papers.evaluation.measurement import Measurement, Measures, Sampler, has_prompts
from ..pipelines.inputs import EVALUATION_SEED, BatchSize, SampleInputs
from ..pipelines.named_schedulers import check_step_counts, load_scheduler
from ..pipelines.sampling import sample_images
from ..utils.files import remove_leftovers, write_text
from ..utils.tensors import FLOAT32, FLOAT64
from .arguments import PipelineSettings, TeacherSettings, argument, at_least_1, parse
from .processes import start_accelerator, sum_over_processes
from .reporting import describe_model, draw_samples


NUM_PICTURED = 10
SCHEDULERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler:timestep_spacing=trailing")


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
        (4, 6, 8), "of every scheduler but the teacher", type=at_least_1, nargs="+"
    )
    num_samples: int = argument(1024, "published Frechet distances are of 50000")
    seed: int = argument(EVALUATION_SEED, "of the first sample", type=int)
    batch_size: int = argument(64, "most samples per pipeline call and process, at most 64")
    reference: str = argument(
        "teacher",
        "what the Frechet distance is to: a .npz file with mu and sigma, a folder of images, a .safetensors file of an "
        "earlier run, or `teacher` for its samples from the same seeds (the distance is then lower than to other samples)",
    )
    feature_extractor: str | None = argument(
        None,
        "`inception` (package torch-fidelity), transformers:REPO_OR_FOLDER, a TorchScript file *.pt, or a folder as "
        "examples/teachers/digits/classifier",
    )
    trust_torchscript: bool = argument(False, "let a TorchScript feature extractor run its own code")
    compare_with_teacher: bool = argument(False, "mean squared distance of final states from the same seeds")
    clip_model: str | None = argument(None, "a CLIP model of Transformers, for the agreement with prompts")
    save_images: bool = argument(False, "in {output_dir}/images")
    output_dir: str = argument("evaluation_output")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_inference_steps = sorted(set(self.num_inference_steps))
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


def main(words: list[str] | None = None, models: Mapping[str, Any] | None = None) -> None:
    """Measures all samplers and writes the results. Arguments are those of [`parse`]."""
    evaluation = Evaluation(EvaluationSettings(**parse(EvaluationSettings, __doc__, words, models)))
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
            self.reference = self._reference()
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
            trust = settings.trust_torchscript
            features = load_feature_extractor(settings.feature_extractor, device, trust_torchscript=trust)
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
            gaussian = self._statistics_of_images(path).gaussian()
        elif path.suffix == ".npz" and path.is_file():
            gaussian = load_npz_reference(path)
        elif path.suffix == ".safetensors" and path.is_file():
            statistics, record = FeatureStatistics.load(path)
            if record.get("feature_extractor") != self.settings.feature_extractor:
                raise ValueError(
                    f"{path} holds features of {record.get('feature_extractor')}, not of {self.settings.feature_extractor}."
                )
            gaussian = statistics.gaussian()
        else:
            raise ValueError(
                f"`--reference {path}` must be a .npz or .safetensors file, a folder of images, or `teacher`."
            )
        if len(gaussian.mean) != self.num_features:
            raise ValueError(
                f"{path} has statistics of {len(gaussian.mean)} features, {self.settings.feature_extractor} makes "
                f"{self.num_features}: use the same feature extractor for both."
            )
        return gaussian

    def _statistics_of_images(self, folder: Path) -> FeatureStatistics:
        assert self.measures.features is not None
        paths, size = image_paths(folder)[self.rank :: self.num_processes], self.settings.batch_size
        statistics = FeatureStatistics.empty(self.num_features)
        for start in tqdm(range(0, len(paths), size), desc="Reference", unit="batch", disable=self.rank > 0):
            features = self.measures.features(read_images(paths[start : start + size]))
            statistics += FeatureStatistics.from_features(features)
        return statistics.reduce(self.reduce)

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
            f"Model:     {describe_model(self.pipe)}\n"
            f"Samples:   {len(self.inputs)}, seeds {self.inputs.seeds[0]} to {self.inputs.seeds[-1]}\n"
            f"Samplers:  {samplers}\n"
            f"Measures:  {', '.join(name for name, wanted in measured.items() if wanted)}\n"
            f"Output:    {self.output_dir}\n"
        )

    def measure(self) -> list[Result]:
        own = self.measurement.shards[self.rank :: self.num_processes]
        total = len(self.samplers) * sum(map(len, own))
        with tqdm(total=total, desc="Evaluating", unit="sample", disable=self.rank > 0) as progress:
            return [self._measure(sampler, own, progress) for sampler in self.samplers]

    def _measure(self, sampler: Sampler, shards: list[SampleInputs], progress: tqdm) -> Result:
        progress.set_postfix_str(sampler.label)
        statistics = FeatureStatistics.empty(self.num_features)
        sums = dict.fromkeys(("diverged", "clip_score", "distance"), 0.0)
        for shard in shards:
            measured = self.measurement.measure(sampler, shard)
            keep = ~measured["diverged"]
            sums["diverged"] += len(shard) - keep.sum().item()
            if "features" in measured:
                statistics += FeatureStatistics.from_features(measured["features"][keep])
            for name in {"clip_score", "distance"} & measured.keys():
                sums[name] += measured[name][keep].double().sum().item()
            progress.update(len(shard))
        statistics = statistics.reduce(self.reduce)
        totals = self.reduce(torch.tensor(list(sums.values()), **FLOAT64))
        num_diverged, clip_score, distance = totals.tolist()
        if sampler is self.teacher and num_diverged > 0:
            raise ValueError(
                f"{int(num_diverged)} of the teacher's samples diverged: choose another `--teacher_scheduler`."
            )
        result = Result(sampler.name, sampler.num_inference_steps, int(num_diverged))
        if num_diverged == 0:
            if self.num_features:
                result.frechet_distance = self._frechet_distance(sampler, statistics)
            if self.settings.clip_model is not None:
                result.clip_score = clip_score / len(self.inputs)
            if self.settings.compare_with_teacher:
                result.distance_to_teacher = distance / len(self.inputs)
        return result

    def _frechet_distance(self, sampler: Sampler, statistics: FeatureStatistics) -> float:
        gaussian = statistics.gaussian()
        if self.reference is None:
            self.reference = gaussian
        if self.accelerator.is_main_process and sampler is self.teacher:
            record = {"feature_extractor": self.settings.feature_extractor, "num_samples": statistics.count}
            statistics.save(self.output_dir / "teacher.safetensors", record)
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
        if draw_samples(picture, self._rows_of_images):
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
    path = Path(name.removeprefix(TRANSFORMERS_PREFIX))
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
