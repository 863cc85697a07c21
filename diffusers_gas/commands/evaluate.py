"""Measures samplers of a diffusion pipeline on many seeded samples: Frechet distance, distance to a teacher, CLIP score.

    accelerate launch training/evaluate.py
    accelerate launch training/evaluate.py --schedulers gas_output/scheduler UniPCMultistepScheduler --num_inference_steps 4
    accelerate launch training/evaluate.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt \\
        --schedulers you/some-model-gas DPMSolverMultistepScheduler:timestep_spacing=trailing --num_samples 50000 \\
        --feature_extractor inception --reference statistics.npz

Without arguments it compares training-free schedulers on the teacher in examples/teachers/digits. A run that was ended goes
on when started again; an added sampler costs its own samples only.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..comparison import comparison_picture, count_parameters, sample_images
from ..papers.evaluation.clip_score import CLIPScore
from ..papers.evaluation.feature_extractors import load_feature_extractor
from ..papers.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance, load_npz_reference
from ..papers.evaluation.image_files import image_paths, read_images
from ..papers.evaluation.measurement import Measurement, Measures, has_prompts
from ..papers.evaluation.samplers import Sampler
from ..pipelines.inputs import EVALUATION_SEED, SampleInputs
from ..pipelines.named_schedulers import check_step_counts, load_scheduler
from ..utils.files import remove_leftovers, write_text
from .common import (
    TEACHERS,
    Processes,
    add_pipeline_arguments,
    add_teacher_arguments,
    common_arguments,
    load_pipeline,
    parse,
    pipeline_name,
    positive,
    sample_arguments,
    teacher_scheduler,
)


NUM_PICTURED = 10
SCHEDULERS = ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler:timestep_spacing=trailing"]
DIGITS_CLASSIFIER = TEACHERS / "digits" / "classifier"


@dataclass
class Result:
    """One line of the table; what was not measured, and everything of a sampler that diverged, is `None`."""

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


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_pipeline_arguments(parser)
    add(
        "--schedulers",
        nargs="+",
        default=SCHEDULERS,
        help="scheduler folders or Hub ids, names of Diffusers' or our classes with settings "
        "(Class:name=value,name=value), or `teacher`",
    )
    add(
        "--num_inference_steps", type=positive, nargs="+", default=[4, 6, 8], help="of every scheduler but the teacher"
    )
    add("--num_samples", type=positive, default=1024, help="published Frechet distances are of 50000")
    add("--seed", type=int, default=EVALUATION_SEED, help="of the first sample")
    add("--batch_size", type=positive, default=64, help="samples per pipeline call and process, at most 64")
    add_teacher_arguments(add)
    add(
        "--reference",
        default="teacher",
        help="what the Frechet distance is to: a .npz file with mu and sigma, a folder of images, a .safetensors file of "
        "an earlier run, or `teacher` for its samples from the same seeds (which is lower than from others)",
    )
    add(
        "--feature_extractor",
        help="`digits`, `inception` (package torch-fidelity), transformers:REPO_OR_FOLDER, or a TorchScript file *.pt",
    )
    add("--trust_torchscript", action="store_true", help="let a TorchScript feature extractor run its own code")
    add(
        "--compare_with_teacher", action="store_true", help="mean squared distance of final states from the same seeds"
    )
    add("--clip_model", help="a CLIP model of Transformers, for the agreement with prompts")
    add("--save_images", action="store_true", help="in {output_dir}/images")
    add("--output_dir", default="evaluation_output")
    args = parse(parser, arguments)
    if args.feature_extractor is None and Path(args.pretrained_model_name_or_path).parent == TEACHERS:
        args.feature_extractor = "digits"
    if args.feature_extractor is None and not (args.compare_with_teacher or args.clip_model):
        raise ValueError("Nothing to measure: pass `--feature_extractor`, `--compare_with_teacher` or `--clip_model`.")
    return args


class Run(Processes):
    """One run of the script: its samplers, what is measured of them, and where its files lie."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(Accelerator())
        self.args, self.output_dir = args, Path(args.output_dir)
        device = self.accelerator.device
        self.pipe = load_pipeline(args, device)
        common = common_arguments(args)
        cycle = sample_arguments(args, self.pipe, common)
        self.inputs = SampleInputs.create(args.seed, args.num_samples, cycle, **common)
        self.teacher = Sampler("teacher", teacher_scheduler(args, self.pipe), args.teacher_num_inference_steps)
        self.samplers = self._samplers()
        self.measures = self._measures(device)
        self.num_features, self.reference = 0, None
        if self.measures.features is not None:
            self.num_features = self.measures.features(torch.zeros(1, 3, 64, 64)).shape[1]
            self.reference = self._reference()
        remove_leftovers(self.output_dir)
        self.measurement = Measurement(
            self.output_dir / "shards",
            self.pipe,
            pipeline_name(args),
            self.inputs,
            self.measures,
            args.batch_size,
            self.output_dir / "images" if args.save_images else None,
        )

    def _samplers(self) -> list[Sampler]:
        args, samplers = self.args, []
        uses_teacher = args.compare_with_teacher or (args.feature_extractor and args.reference == "teacher")
        if uses_teacher or "teacher" in args.schedulers:
            samplers.append(self.teacher)  # first: the others are compared with its samples
        for entry in dict.fromkeys(args.schedulers):
            if entry == "teacher":
                continue
            scheduler = load_scheduler(entry, self.pipe)
            check_step_counts(entry, scheduler, args.num_inference_steps)
            samplers += [Sampler(entry, scheduler, n) for n in args.num_inference_steps]
        return samplers

    def _measures(self, device: torch.device) -> Measures:
        args, features, clip_score = self.args, None, None
        if args.feature_extractor is not None:
            name = DIGITS_CLASSIFIER if args.feature_extractor == "digits" else args.feature_extractor
            features = load_feature_extractor(name, device, trust_torchscript=args.trust_torchscript)
        if args.clip_model is not None:
            if not has_prompts(self.inputs):
                raise ValueError("`--clip_model` compares images with prompts, but the samples have none.")
            clip_score = CLIPScore(args.clip_model, device)
        names = {"feature_extractor": args.feature_extractor, "clip_model": args.clip_model}
        return Measures(names, features, clip_score, self.teacher if args.compare_with_teacher else None)

    def _reference(self) -> Gaussian | None:
        """The statistics that `--reference` names; `None` for those of the teacher, which are still to be made."""
        path = Path(self.args.reference)
        if self.args.reference == "teacher":
            return None
        if path.is_dir():
            gaussian = self._statistics_of_images(path).gaussian()
        elif path.suffix == ".npz" and path.is_file():
            gaussian = load_npz_reference(path)
        elif path.suffix == ".safetensors" and path.is_file():
            statistics, record = FeatureStatistics.load(path)
            if record.get("feature_extractor") != self.args.feature_extractor:
                raise ValueError(
                    f"{path} holds features of {record.get('feature_extractor')}, not of {self.args.feature_extractor}."
                )
            gaussian = statistics.gaussian()
        else:
            raise ValueError(
                f"`--reference {path}` must be a .npz or .safetensors file, a folder of images, or `teacher`."
            )
        if len(gaussian.mean) != self.num_features:
            raise ValueError(
                f"{path} has statistics of {len(gaussian.mean)} features, {self.args.feature_extractor} makes "
                f"{self.num_features}: use the same feature extractor for both."
            )
        return gaussian

    def _statistics_of_images(self, folder: Path) -> FeatureStatistics:
        paths, size = image_paths(folder)[self.rank :: self.accelerator.num_processes], self.args.batch_size
        statistics = FeatureStatistics.empty(self.num_features)
        for start in tqdm(range(0, len(paths), size), desc="Reference", unit="batch", disable=self.rank > 0):
            features = self.measures.features(read_images(paths[start : start + size]))
            statistics += FeatureStatistics.from_features(features)
        return statistics.reduce(self.reduce)

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    def announce(self) -> None:
        args = self.args
        measured = {
            f"Frechet distance of {args.feature_extractor} features to {args.reference}": args.feature_extractor,
            "distance to the teacher": args.compare_with_teacher,
            f"CLIP score of {args.clip_model}": args.clip_model,
        }
        samplers = "\n           ".join(sampler.label for sampler in self.samplers)
        if self.teacher in self.samplers:
            samplers += f"\n           (teacher: {type(self.teacher.scheduler).__name__})"
        self.print(
            f"Model:     {type(self.pipe).__name__} from {args.pretrained_model_name_or_path}, "
            f"{count_parameters(self.pipe) / 1e6:.2f} M weights\n"
            f"Samples:   {len(self.inputs)}, seeds {self.inputs.seeds[0]} to {self.inputs.seeds[-1]}\n"
            f"Samplers:  {samplers}\n"
            f"Measures:  {', '.join(name for name, wanted in measured.items() if wanted)}\n"
            f"Output:    {self.output_dir}\n"
        )

    def measure(self) -> list[Result]:
        """Measures all samplers; every process takes its share of the samples."""
        own = self.measurement.shards[self.rank :: self.accelerator.num_processes]
        total = len(self.samplers) * sum(map(len, own))
        results = []
        with tqdm(total=total, desc="Evaluating", unit="sample", disable=self.rank > 0) as progress:
            for sampler in self.samplers:
                progress.set_postfix_str(sampler.label)
                results.append(self._measure(sampler, own, progress))
        return results

    def _measure(self, sampler: Sampler, shards: list[SampleInputs], progress: tqdm) -> Result:
        statistics = FeatureStatistics.empty(self.num_features)
        num_diverged, sums = 0, dict.fromkeys(("clip_score", "distance"), 0.0)
        for shard in shards:
            measured = self.measurement.measure(sampler, shard)
            keep = ~measured["diverged"]
            num_diverged += len(shard) - keep.sum().item()
            if "features" in measured:
                statistics += FeatureStatistics.from_features(measured["features"][keep])
            for name in sums.keys() & measured.keys():
                sums[name] += measured[name][keep].double().sum().item()
            progress.update(len(shard))
        statistics = statistics.reduce(self.reduce)
        num_diverged, clip_score, distance = self.reduce(
            torch.tensor([num_diverged, sums["clip_score"], sums["distance"]], dtype=torch.float64)
        ).tolist()
        if sampler is self.teacher and num_diverged > 0:
            raise ValueError(
                f"{int(num_diverged)} of the teacher's samples diverged: choose another `--teacher_scheduler`."
            )
        result = Result(sampler.name, sampler.num_inference_steps, int(num_diverged))
        if num_diverged == 0:
            if self.num_features:
                result.frechet_distance = self._distance(sampler, statistics)
            if self.args.clip_model is not None:
                result.clip_score = clip_score / len(self.inputs)
            if self.args.compare_with_teacher:
                result.distance_to_teacher = distance / len(self.inputs)
        return result

    def _distance(self, sampler: Sampler, statistics: FeatureStatistics) -> float:
        gaussian = statistics.gaussian()
        if self.reference is None:
            self.reference = gaussian
        if self.accelerator.is_main_process and sampler is self.teacher:
            record = {"feature_extractor": self.args.feature_extractor, "num_samples": statistics.count}
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
        report = {"arguments": vars(self.args), "results": [asdict(result) for result in results]}
        write_text(self.output_dir / "results.json", json.dumps(report, indent=2) + "\n")
        pictured = self.inputs[:NUM_PICTURED]
        images = {
            sampler.label.replace(":", ":\n"): sample_images(
                self.pipe, sampler.scheduler, sampler.num_inference_steps, pictured
            )
            for sampler in self.samplers
        }
        comparison_picture(images, self.output_dir / "results.png")
        self.print(f"Results:   {self.output_dir / 'results.json'}\nPicture:   {self.output_dir / 'results.png'}")


def markdown_table(results: list[Result]) -> str:
    """Results as a table of what was measured."""
    shown = {
        name: column
        for name, column in COLUMNS.items()
        if any(getattr(result, name) is not None for result in results)
    }

    def cell(result: Result, name: str, form: str) -> str:
        value = getattr(result, name)
        return f"{result.num_diverged} samples diverged" if value is None else format(value, form)

    header = ["scheduler", "steps", *(title for title, _ in shown.values())]
    rows = [
        [
            result.scheduler,
            str(result.num_inference_steps),
            *(cell(result, name, form) for name, (_, form) in shown.items()),
        ]
        for result in results
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def main(arguments: list[str] | None = None) -> None:
    run = Run(parse_args(arguments))
    run.announce()
    results = run.measure()
    if run.accelerator.is_main_process:
        run.report(results)
    run.accelerator.end_training()
