"""Measures samplers of a diffusion pipeline on many seeded samples: Frechet distance, distance to a teacher.

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

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from ..comparison import Row, markdown_table
from ..papers.evaluation import frechet
from ..papers.evaluation.feature_extractors import load_feature_extractor
from ..papers.evaluation.measurement import Measurement, Sampler
from ..pipelines.inputs import EVALUATION_SEED, BatchSize
from ..pipelines.named_schedulers import check_step_counts, load_scheduler
from ..utils.files import remove_leftovers, write_text
from ..utils.tensors import FLOAT32
from .arguments import AtLeast0, AtLeast1, PipelineSettings, TeacherSettings, parse
from .processes import start_accelerator
from .reporting import describe_model


@dataclass
class EvaluationSettings(TeacherSettings, PipelineSettings):
    """The evaluation.

    Args:
        schedulers: Scheduler folders or Hub ids, names of Diffusers' or our classes with settings (Class:name=value,name=value), or
            `teacher`.
        num_inference_steps: Of every scheduler but the teacher.
        num_samples: Published Frechet distances are of 50000.
        seed: Of the first sample.
        batch_size: Most samples per pipeline call and process, at most 64.
        reference: What the Frechet distance is to: a .npz file with mu and sigma, e.g. teacher.npz of an earlier run, or `teacher`
            for its samples from the same seeds (the distance is then lower than to other samples).
        feature_extractor: `inception` (package torch-fidelity), or a folder with a classifier as
            examples/teachers/digits/classifier.
        compare_with_teacher: The squared and the absolute distance of final states from the same seeds, and the power of fine detail
            relative to the teacher's: more than 1 is grain, less is blur.
        save_images: In {output_dir}/images, to look at or for other measures.
        output_dir: The folder of the results.
    """

    schedulers: Sequence[str] = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler:timestep_spacing=trailing")
    num_inference_steps: Sequence[AtLeast1] = (4, 6, 8)
    num_samples: int = 1024
    seed: AtLeast0 = EVALUATION_SEED
    batch_size: int = 64
    reference: str = "teacher"
    feature_extractor: str | None = None
    compare_with_teacher: bool = False
    save_images: bool = False
    output_dir: str = "evaluation_output"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_inference_steps = sorted(set(self.num_inference_steps))
        if self.feature_extractor is None and not self.compare_with_teacher:
            raise ValueError("Nothing to measure: pass `--feature_extractor` or `--compare_with_teacher`.")


def main(words: list[str] | None = None, model: Mapping[str, Any] | None = None) -> None:
    """Measures all samplers and writes the results. Arguments are those of [`parse`]. Every process measures its share."""
    settings = EvaluationSettings(**parse(EvaluationSettings, __doc__, words, model))
    accelerator, output_dir = start_accelerator(), Path(settings.output_dir)
    rank, say = accelerator.process_index, partial(accelerator.print, flush=True)

    # The samplers, and what is measured of their samples.
    pipe, batch_size = settings.load_pipeline(accelerator.device), BatchSize(settings.batch_size)
    inputs = settings.sample_inputs(pipe, settings.seed, settings.num_samples)
    teacher = Sampler("teacher", settings.load_teacher(pipe), settings.teacher_num_inference_steps)
    samplers = all_samplers(settings, pipe, teacher)
    features, num_features, reference, extractor = None, 0, None, identity(settings.feature_extractor)
    if settings.feature_extractor is not None:
        features = load_feature_extractor(settings.feature_extractor, accelerator.device)
        num_features = features(torch.zeros(1, 3, 64, 64, **FLOAT32)).shape[1]
        reference = load_reference(settings, num_features)
    remove_leftovers(output_dir)
    images = output_dir / "images" if settings.save_images else None
    compared = teacher if settings.compare_with_teacher else None
    measurement = Measurement(
        output_dir / "shards", pipe, settings.pipeline_name, inputs, batch_size, images, extractor, features, compared
    )
    separator = "\n" + " " * 11
    listed = [sampler.label for sampler in samplers]
    listed += [f"(teacher: {type(teacher.scheduler).__name__})"] * (teacher in samplers)
    say(
        f"Model:     {describe_model(pipe)}\n"
        f"Samples:   {len(inputs)}, seeds {inputs.seeds[0]} to {inputs.seeds[-1]}\n"
        f"Samplers:  {separator.join(listed)}\n"
        f"Output:    {output_dir}\n"
    )

    # The samples. The teacher comes first, as others are compared with it. Every process leaves its results in files.
    shards = measurement.shards[rank :: accelerator.num_processes]
    total = len(samplers) * sum(map(len, shards))
    with tqdm(total=total, desc="Evaluating", unit="sample", disable=rank > 0) as progress:
        for sampler in samplers:
            progress.set_postfix_str(sampler.label)
            for shard in shards:
                diverged = measurement.measure(sampler, shard)["diverged"]
                if sampler is teacher and diverged.any():
                    raise ValueError(
                        f"{diverged.sum()} teacher samples diverged: choose another `--teacher_scheduler`."
                    )
                progress.update(len(shard))
    accelerator.wait_for_everyone()

    # Table and numbers.
    if accelerator.is_main_process:
        results = []
        detail = None
        for sampler in samplers:
            values = measurement.results(sampler)
            if sampler is teacher:  # which comes first
                detail = values.get("detail")
            results.append(summary(sampler, values, detail))
            if num_features > 0 and results[-1].num_diverged == 0:
                gaussian = frechet.Gaussian.of_features(values["features"])
                reference = gaussian if reference is None else reference
                results[-1].frechet_distance = frechet.frechet_distance(gaussian, reference)
                if sampler is teacher:
                    frechet.save_reference(gaussian, extractor, output_dir / "teacher.npz")
        table = markdown_table(results)
        say(f"\n{len(inputs)} samples:\n\n{table}\n")
        if num_features >= len(inputs):
            say(
                f"Note: {len(inputs)} samples do not determine a covariance of {num_features} features. Compare "
                "these Frechet distances with others of as many samples only."
            )
        write_text(output_dir / "results.md", table + "\n")
        report = {"arguments": vars(settings), "results": [asdict(result) for result in results]}
        write_text(output_dir / "results.json", json.dumps(report, indent=2) + "\n")
        say(f"Results:   {output_dir / 'results.json'}")
    accelerator.end_training()


def all_samplers(settings: EvaluationSettings, pipe: DiffusionPipeline, teacher: Sampler) -> list[Sampler]:
    """The samplers of `--schedulers`, and the teacher where something is compared with it."""
    samplers = []
    is_reference = settings.feature_extractor is not None and settings.reference == "teacher"
    if is_reference or settings.compare_with_teacher or "teacher" in settings.schedulers:
        samplers.append(teacher)
    for entry in dict.fromkeys(settings.schedulers):
        if entry != "teacher":
            scheduler = load_scheduler(entry, pipe)
            check_step_counts(entry, scheduler, settings.num_inference_steps)
            samplers += [Sampler(entry, scheduler, n) for n in settings.num_inference_steps]
    return samplers


def identity(name: str | None) -> str:
    """What tells a network from others: hashes of its files if they are on this machine, else its name."""
    if name is None:
        return ""
    path = Path(name)
    files = sorted(file for file in [path, *path.rglob("*")] if file.is_file())
    return " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files) or name


def load_reference(settings: EvaluationSettings, num_features: int) -> frechet.Gaussian | None:
    """The statistics that `--reference` names; `None` for those of the teacher, which are still to be made."""
    path, extractor = Path(settings.reference), settings.feature_extractor
    if settings.reference == "teacher":
        return None
    if not path.is_file():
        raise ValueError(f"`--reference {path}` must be a .npz file with mu and sigma, or `teacher`.")
    gaussian, found = frechet.load_reference(path)
    if found not in (None, identity(extractor)):
        raise ValueError(f"{path} holds features of another extractor than {extractor}: use the same for both.")
    if len(gaussian.mean) != num_features:
        raise ValueError(
            f"{path} has statistics of {len(gaussian.mean)} features, {extractor} makes {num_features}: use the same feature "
            "extractor for both."
        )
    return gaussian


def summary(sampler: Sampler, measured: Mapping[str, Tensor], teacher_detail: Tensor | None) -> Row:
    """The means over all samples, unless some diverged. That of the detail is relative to the teacher's."""
    row = Row(sampler.num_inference_steps, sampler.name, num_diverged=int(measured["diverged"].sum()))
    if row.num_diverged == 0 and teacher_detail is not None:
        # The teacher has no distance to itself.
        row.distance = measured["distance"].mean().item() if "distance" in measured else 0.0
        row.absolute = measured["absolute"].mean().item() if "absolute" in measured else 0.0
        row.detail = (measured["detail"] - teacher_detail).mean().exp().item()
    return row
