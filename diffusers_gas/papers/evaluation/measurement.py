"""Measures many samples and keeps the results on disk, so that processes share them and interrupted runs continue."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ...comparison import log_power_of_detail
from ...pipelines.inputs import BatchSize, SampleInputs
from ...pipelines.sampling import sample_with_states
from ...pipelines.teacher import SHARD_SIZE, fingerprint, fingerprint_of_pipeline, fingerprint_of_scheduler
from ...utils.files import load_safetensors, remove_leftovers, replacing, save_safetensors
from .feature_extractors import FeatureExtractor


@dataclass(frozen=True)
class Sampler:
    """A scheduler with a number of steps, and its name in tables."""

    name: str
    scheduler: SchedulerMixin
    num_inference_steps: int

    @property
    def label(self) -> str:
        return f"{self.name}, {self.num_inference_steps} steps"


@dataclass
class Measurement:
    """Measures samplers on the same seeds, in shards of `SHARD_SIZE` samples. The results of a shard are a file.

    Args:
        folder: The folder of the files, which processes share. A file's name is a hash of everything that its content depends on.
        pipe: The pipeline, whose weights stay as they are.
        pipeline_name: The name that the pipeline was loaded by, with revision and precision.
        batch_size: Largest number of samples in a pipeline call.
        images_folder: The folder for the images. By default they are not kept.
        extractor: What tells the feature extractor from others. It distinguishes the files of different measures.
        features: The feature extractor for Frechet distances.
        teacher: The sampler of the teacher. The mean squared and absolute distances to its final states from the same seeds are
            measured, and the power of the finest detail.
    """

    folder: Path
    pipe: DiffusionPipeline
    pipeline_name: str
    inputs: SampleInputs
    batch_size: int | BatchSize
    images_folder: Path | None = None
    extractor: str = ""
    features: FeatureExtractor | None = None
    teacher: Sampler | None = None

    def __post_init__(self) -> None:
        for written in (self.folder, *(self.images_folder.glob("*/") if self.images_folder else ())):
            remove_leftovers(written)
        self.shards = self.inputs.split(SHARD_SIZE)
        self._model = self.pipeline_name, fingerprint_of_pipeline(self.pipe)  # once: it reads all weights

    def measure(self, sampler: Sampler, shard: SampleInputs) -> dict[str, Tensor]:
        """The results of a shard, from its file if an earlier run has measured it.

        Returns:
            `dict[str, Tensor]` with one row per sample: `diverged`, and the measured ones of `features`, `distance` and `absolute`
            distance to the teacher, and `detail`, the [`log_power_of_detail`]. For the teacher's sampler, the final states `state`
            instead of the distances.

        Raises:
            ValueError: If a file is damaged.
        """
        return self._read(sampler, self._name(sampler), shard)

    def results(self, sampler: Sampler) -> dict[str, Tensor]:
        """The results of all samples, but for the states, which may be large."""
        name = self._name(sampler)
        shards = [
            {key: values for key, values in self._read(sampler, name, shard).items() if key != "state"}
            for shard in self.shards
        ]
        return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}

    def _name(self, sampler: Sampler) -> str:
        """A hash of what all results of a sampler depend on."""
        both = (sampler, self.teacher)
        samplers = [one and fingerprint_of_scheduler(one.scheduler, one.num_inference_steps) for one in both]
        return fingerprint(*self._model, self.extractor, self.teacher and "detail", *samplers, sampler is self.teacher)

    def _read(self, sampler: Sampler, name: str, shard: SampleInputs) -> dict[str, Tensor]:
        path = self.folder / f"shard-{fingerprint(name, shard)}.safetensors"
        image_files = []
        if self.images_folder is not None:
            label = re.sub(r"[^\w.=]+", "-", sampler.label).strip("-.")
            image_files = [self.images_folder / f"{label}-{name[:6]}" / f"{seed:06}.png" for seed in shard.seeds]
        if not (path.exists() and all(file.exists() for file in image_files)):
            save_safetensors(self._measure(sampler, shard, image_files), path, {})
        try:
            return load_safetensors(path)[0]
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}) Delete it to have its samples made again.") from error

    def _measure(self, sampler: Sampler, shard: SampleInputs, image_files: list[Path]) -> dict[str, Tensor]:
        steps = sampler.num_inference_steps
        images, states = sample_with_states(self.pipe, sampler.scheduler, steps, shard, batch_size=self.batch_size)
        size = BatchSize(self.batch_size).most
        diverged = ~(images.flatten(1).isfinite().all(1) & states.flatten(1).isfinite().all(1))
        images = images.nan_to_num(0)
        for image, file in zip(images, image_files):
            save_image(image, file)
        results = {"diverged": diverged}
        if self.features is not None:
            results["features"] = torch.cat([self.features(batch) for batch in images.split(size)])
        if self.teacher is not None:
            results["detail"] = log_power_of_detail(images)
        if sampler is self.teacher:
            results["state"] = states
        elif self.teacher is not None:
            error = (states - self.measure(self.teacher, shard)["state"]).flatten(1).double()
            results["distance"], results["absolute"] = error.square().mean(1), error.abs().mean(1)
        return results


def save_image(image: Tensor, path: Path) -> None:
    """Writes an image of shape `(channels, height, width)` in [0, 1] as a PNG file, complete or not at all."""
    (picture,) = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image[None]))
    with replacing(path) as partial:
        picture.save(partial, format="PNG")
