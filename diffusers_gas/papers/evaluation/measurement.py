"""Measures many samples and keeps the results on disk, so that processes share them and runs continue."""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ...pipelines.inputs import SampleInputs
from ...pipelines.teacher import SHARD_SIZE
from ...utils.files import load_safetensors, remove_leftovers, save_safetensors
from .clip_score import CLIPScore
from .feature_extractors import FeatureExtractor
from .image_files import save_image
from .samplers import Sampler
from .sampling import sample_with_states


@dataclass(frozen=True)
class Measures:
    """What to measure of samples.

    Attributes:
        names: Names of the extractor and the CLIP model, in JSON's types. They distinguish the files of different measures.
        features: The feature extractor for Frechet distances.
        clip_score: The measure of agreement with prompts.
        teacher: The sampler of the teacher. The mean squared distance to its final samples from the same seeds is measured.
    """

    names: dict[str, Any]
    features: FeatureExtractor | None = None
    clip_score: CLIPScore | None = None
    teacher: Sampler | None = None


class Measurement:
    """Measures samplers on the same seeds, in shards of `SHARD_SIZE` samples. The results of a shard are a file.

    Args:
        folder: The folder of the files, which processes share. A file's name is a hash of everything that its content depends on,
            except weights that change while their name stays.
        pipe: The pipeline.
        pipeline_name: The name that the pipeline was loaded by, with revision and precision.
        inputs: The seed and the arguments of each sample.
        measures: What to measure.
        batch_size: Largest number of samples in a pipeline call.
        images_folder: The folder for the images. By default they are not kept.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        pipe: DiffusionPipeline,
        pipeline_name: str,
        inputs: SampleInputs,
        measures: Measures,
        batch_size: int,
        images_folder: Path | None = None,
    ):
        self.folder, self.pipe, self.pipeline_name = Path(folder), pipe, pipeline_name
        self.measures, self.batch_size, self.images_folder = measures, batch_size, images_folder
        for written in (self.folder, *(images_folder.glob("*/") if images_folder else ())):
            remove_leftovers(written)
        self.shards = [inputs[start : start + SHARD_SIZE] for start in range(0, len(inputs), SHARD_SIZE)]

    def measure(self, sampler: Sampler, shard: SampleInputs) -> dict[str, Tensor]:
        """The results of a shard, from its file if an earlier run has measured it.

        Returns:
            `dict[str, Tensor]` with one row per sample: `diverged`, and the measured ones of `features`, `clip_score` and
            `distance` to the teacher. For the teacher's sampler, the final samples `state` instead of `distance`.

        Raises:
            ValueError: If a file is damaged.
        """
        path = self._path(sampler, shard)
        image_files = self._image_files(sampler, shard)
        if not (path.exists() and all(file.exists() for file in image_files)):
            save_safetensors(self._measure(sampler, shard, image_files), path, {})
        try:
            return load_safetensors(path)[0]
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}) Delete it to have its samples made again.") from error

    def _measure(self, sampler: Sampler, shard: SampleInputs, image_files: list[Path]) -> dict[str, Tensor]:
        measures, size = self.measures, self.batch_size
        images, states = sample_with_states(
            self.pipe, sampler.scheduler, sampler.num_inference_steps, shard, batch_size=size
        )
        diverged = ~(images.flatten(1).isfinite().all(1) & states.flatten(1).isfinite().all(1))
        images = images.nan_to_num(0)
        for image, file in zip(images, image_files):
            save_image(image, file)
        results = {"diverged": diverged}
        if measures.features is not None:
            results["features"] = torch.cat([measures.features(batch) for batch in images.split(size)])
        if measures.clip_score is not None:
            prompts = _prompts(shard)
            scores = [
                measures.clip_score(batch, prompts[i * size : (i + 1) * size])
                for i, batch in enumerate(images.split(size))
            ]
            results["clip_score"] = torch.cat(scores)
        if sampler is measures.teacher:
            results["state"] = states
        elif measures.teacher is not None:
            error = states - self.measure(measures.teacher, shard)["state"]
            results["distance"] = error.flatten(1).double().square().mean(1)
        return results

    def _path(self, sampler: Sampler, shard: SampleInputs) -> Path:
        parts = [self._fingerprint(sampler), shard.common, list(shard.seeds), list(shard.per_sample)]
        return self.folder / f"shard-{_hash(parts)}.safetensors"

    def _image_files(self, sampler: Sampler, shard: SampleInputs) -> list[Path]:
        if self.images_folder is None:
            return []
        name = re.sub(r"[^\w.=]+", "-", sampler.label).strip("-.")
        folder = self.images_folder / f"{name}-{self._fingerprint(sampler)[:6]}"
        return [folder / f"{seed:06}.png" for seed in shard.seeds]

    def _fingerprint(self, sampler: Sampler) -> str:
        teacher = self.measures.teacher and self.measures.teacher.description
        is_teacher = sampler is self.measures.teacher
        return _hash([self.pipeline_name, self.measures.names, sampler.description, teacher, is_teacher])


def has_prompts(inputs: SampleInputs) -> bool:
    """Whether every sample has a prompt."""
    return all(isinstance(prompt, str) for prompt in _prompts(inputs))


def _prompts(inputs: SampleInputs) -> list[Any]:
    return [arguments.get("prompt", inputs.common.get("prompt")) for arguments in inputs.per_sample]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]
