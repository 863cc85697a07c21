"""Teacher samples: what a pipeline makes of a seed and its inputs in many steps, kept on disk."""

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from ..oracle import sample_latents
from ..schedulers.solver_files import save_safetensors


# Samples per file, and with that the work that an interruption can cost.
SHARD_SIZE = 64

# As in the GS paper, so that solvers are never judged on seeds that they have seen.
TRAINING_SEED = 0
EVALUATION_SEED = 50_000


@dataclass(frozen=True)
class SampleInputs:
    """Which samples: a seed for each, and the arguments of the pipeline's call.

    The seed makes a sample's noise whatever batch it is in, for pipelines with and without a `latents` argument.

    Args:
        seeds: One per sample.
        per_sample: Arguments that differ, one mapping per sample, e.g. `{"prompt": "a fox"}`; all with the same names.
        common: Arguments that all samples share, e.g. `{"guidance_scale": 7.5}`.
    """

    seeds: Sequence[int]
    per_sample: Sequence[Mapping[str, Any]]
    common: Mapping[str, Any]

    @classmethod
    def create(
        cls, first_seed: int, num_samples: int, cycle: Sequence[Mapping[str, Any]] = ({},), **common: Any
    ) -> "SampleInputs":
        """`num_samples` samples with consecutive seeds, which take their own arguments from `cycle` in turn."""
        per_sample = [cycle[i % len(cycle)] for i in range(num_samples)]
        return cls(range(first_seed, first_seed + num_samples), per_sample, common)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: slice) -> "SampleInputs":
        return SampleInputs(self.seeds[index], self.per_sample[index], self.common)

    def pipeline_arguments(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Arguments of one call of the pipeline that makes all of these samples."""
        arguments = dict(self.common)
        for name in self.per_sample[0]:
            values = [inputs[name] for inputs in self.per_sample]
            arguments[name] = torch.cat(values) if isinstance(values[0], Tensor) else values
        # One call makes all samples: as many as arguments of their own, or copies of what they share.
        counts = (
            {"batch_size"} if self.per_sample[0] else {"batch_size", "num_images_per_prompt", "num_videos_per_prompt"}
        )
        arguments |= dict.fromkeys(counts & inspect.signature(type(pipe).__call__).parameters.keys(), len(self))
        arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return arguments


@dataclass(frozen=True)
class TeacherSamples:
    """Samples with what the teacher made of them.

    Attributes:
        inputs: Which samples.
        noise (`Tensor` of shape `(num_samples, ...)`): Their initial states.
        final (`Tensor` of shape `(num_samples, ...)`): The teacher's final states, not decoded.
    """

    inputs: SampleInputs
    noise: Tensor
    final: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: slice) -> "TeacherSamples":
        return TeacherSamples(self.inputs[index], self.noise[index], self.final[index])

    def batches(self, batch_size: int) -> Iterator["TeacherSamples"]:
        """The samples in batches, the last one possibly smaller."""
        for start in range(0, len(self), batch_size):
            yield self[start : start + batch_size]


class TeacherCache:
    """Teacher samples in a folder of safetensors files, `SHARD_SIZE` samples each.

    A file's name is a hash of the teacher's description, the arguments and the seeds, so that none is taken for another's
    unless the weights behind the same name have changed.

    Args:
        folder: Where the files lie.
        pipeline_name: What the pipeline was loaded from, with revision and precision.
        scheduler: The teacher's scheduler.
        num_inference_steps: The teacher's steps.
    """

    def __init__(
        self, folder: str | os.PathLike, pipeline_name: str, scheduler: SchedulerMixin, num_inference_steps: int
    ):
        self.folder, self.scheduler, self.num_inference_steps = Path(folder), scheduler, num_inference_steps
        self.teacher = {
            "pipeline": pipeline_name,
            "scheduler": type(scheduler).__name__,
            "scheduler_config": {k: v for k, v in scheduler.config.items() if not k.startswith("_")},
            "num_inference_steps": num_inference_steps,
        }

    def collect(self, pipe: DiffusionPipeline, inputs: SampleInputs, batch_size: int, label: str) -> TeacherSamples:
        """The teacher's samples, from the cache as far as it has them; an interruption costs one shard at most."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = [inputs[start : start + SHARD_SIZE] for start in range(0, len(inputs), SHARD_SIZE)]
        noise, final = [], []
        with tqdm(total=len(inputs), desc=label, unit="sample") as progress:
            for shard in shards:
                path = self.folder / f"samples-{self._fingerprint(shard)}.safetensors"
                tensors = _read_shard(path, len(shard)) or self._generate(pipe, shard, batch_size, path)
                noise.append(tensors["noise"])
                final.append(tensors["final"])
                progress.update(len(shard))
        return TeacherSamples(inputs, torch.cat(noise), torch.cat(final))

    def _generate(
        self, pipe: DiffusionPipeline, shard: SampleInputs, batch_size: int, path: Path
    ) -> dict[str, Tensor]:
        results = []
        for start in range(0, len(shard), batch_size):
            batch = shard[start : start + batch_size]
            arguments = batch.pipeline_arguments(pipe)
            states = sample_latents(pipe, self.scheduler, self.num_inference_steps, **arguments)
            # A pipeline that steps both halves of its guidance (DiT) decodes the first.
            results.append([state[: len(batch)] for state in states])
        tensors = {name: torch.cat(parts).cpu() for name, parts in zip(("noise", "final"), zip(*results))}
        save_safetensors(tensors, path, {"teacher": json.dumps(self.teacher, default=str)})
        return tensors

    def _fingerprint(self, shard: SampleInputs) -> str:
        def encode(value: Any) -> str:
            if isinstance(value, Tensor):
                return hashlib.sha256(value.detach().cpu().float().numpy().tobytes()).hexdigest()
            return str(value)

        parts = [self.teacher, shard.common, list(shard.seeds), list(shard.per_sample)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=encode).encode()).hexdigest()[:20]


def _read_shard(path: Path, num_samples: int) -> dict[str, Tensor] | None:
    """A shard's tensors, or `None` if there is no such file or not a whole one."""
    try:
        tensors = load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None
    whole = all(len(tensors.get(name, ())) == num_samples for name in ("noise", "final"))
    return tensors if whole else None
