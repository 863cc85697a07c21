"""Which samples a pipeline is to make: a seed for each, and the arguments of its call."""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..schedulers.guidance import GUIDANCE_ARGUMENTS, default_guidance


# First seeds as in the GS paper. They lie so far apart that no solver is evaluated on a seed that it was trained on.
TRAINING_SEED = 0
EVALUATION_SEED = 50_000


@dataclass(frozen=True)
class SampleInputs:
    """Samples that a pipeline is to make: a seed for each, and the arguments of the pipeline's call.

    A sample's noise depends on its seed alone, in any batch, for pipelines with and without a `latents` argument.

    Args:
        seeds: One for each sample.
        per_sample: Arguments that differ between samples, one mapping for each, e.g. `{"prompt": "a fox"}`. All have the
            same names. Samples with different guidance scales are made by different calls.
        common: Arguments that all samples share, e.g. `{"guidance_scale": 7.5}`.
    """

    seeds: Sequence[int]
    per_sample: Sequence[Mapping[str, Any]]
    common: Mapping[str, Any]

    @classmethod
    def create(
        cls, first_seed: int, num_samples: int, cycle: Sequence[Mapping[str, Any]] = ({},), **common: Any
    ) -> "SampleInputs":
        """`num_samples` samples with consecutive seeds. Their own arguments are the entries of `cycle` in turn."""
        per_sample = [cycle[i % len(cycle)] for i in range(num_samples)]
        return cls(range(first_seed, first_seed + num_samples), per_sample, common)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: slice | Sequence[int]) -> "SampleInputs":
        if isinstance(index, slice):
            return SampleInputs(self.seeds[index], self.per_sample[index], self.common)
        return SampleInputs([self.seeds[i] for i in index], [self.per_sample[i] for i in index], self.common)

    def calls(self, batch_size: int) -> Iterator[list[int]]:
        """Positions of the samples of each call of a pipeline, at most `batch_size` for a call."""
        groups: dict[tuple, list[int]] = {}
        for position, inputs in enumerate(self.per_sample):
            groups.setdefault(tuple(inputs.get(name) for name in GUIDANCE_ARGUMENTS), []).append(position)
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                yield group[start : start + batch_size]

    def in_calls(
        self, pipe: DiffusionPipeline, batch_size: int, call: Callable[[dict[str, Any]], Iterable[Any]]
    ) -> list[Any]:
        """A result for every sample. `call` gets the arguments of the pipeline for a batch and returns its results."""
        results: dict[int, Any] = {}
        for positions in self.calls(batch_size):
            results |= dict(zip(positions, call(self[positions].pipeline_arguments(pipe))))
        return [results[position] for position in range(len(self))]

    def pipeline_arguments(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Arguments of the one pipeline call that makes all of these samples."""
        arguments = dict(self.common)
        for name in self.per_sample[0]:
            values = [inputs[name] for inputs in self.per_sample]
            if name in GUIDANCE_ARGUMENTS:
                arguments[name] = values[0]
            else:
                arguments[name] = torch.cat(values) if isinstance(values[0], Tensor) else values
        # Without arguments of their own, the samples are copies of one prompt.
        counts = {"batch_size"}
        if not self.per_sample[0].keys() - set(GUIDANCE_ARGUMENTS):
            counts |= {"num_images_per_prompt", "num_videos_per_prompt"}
        arguments |= dict.fromkeys(counts & inspect.signature(type(pipe).__call__).parameters.keys(), len(self))
        arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        return arguments

    def record(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """For a solver's provenance: numbers and texts that all samples share, and all guidance scales."""
        shared = {**default_guidance(pipe), **self.common}
        shared = {name: value for name, value in shared.items() if isinstance(value, int | float | str)}
        own = [name for name in GUIDANCE_ARGUMENTS if name in self.per_sample[0]]
        return shared | {name: list(dict.fromkeys(inputs[name] for inputs in self.per_sample)) for name in own}


def load_sample_inputs(pipe: DiffusionPipeline, path: str | None, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments that differ between samples, to be used in turn.

    Args:
        pipe: The pipeline.
        path: A text file with one prompt a line, or a `.jsonl` file with one object of pipeline arguments a line.
        common: Arguments that all samples share.

    Raises:
        ValueError: If the file is empty or malformed, or if the pipeline needs arguments that are not given.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    if path is not None:
        return _read(Path(path), set(parameters))
    given = {"prompt", "prompt_embeds"} & common.keys()
    if "prompt" in parameters and not given:
        raise ValueError(f"{type(pipe).__name__} needs prompts: pass `--prompts_file` with one prompt a line.")
    required = [
        name
        for name, parameter in list(parameters.items())[1:]
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    missing = sorted(set(required) - common.keys())
    if missing:
        raise ValueError(
            f"{type(pipe).__name__} needs the arguments {missing}: pass `--prompts_file` with a .jsonl file of them, "
            "one object a sample."
        )
    return [{}]


def with_guidance_scales(cycle: Sequence[dict[str, Any]], guidance_scales: Sequence[float]) -> list[dict[str, Any]]:
    """Every sample's arguments with every guidance scale. Within a pass through the samples, the scales take turns."""
    scales = [[*guidance_scales[i:], *guidance_scales[:i]] for i in range(len(guidance_scales))]
    return [
        {**inputs, "guidance_scale": rotated[i % len(rotated)]} for rotated in scales for i, inputs in enumerate(cycle)
    ]


def _read(path: Path, known: set[str]) -> list[dict[str, Any]]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty.")
    if path.suffix != ".jsonl":
        if "prompt" not in known:
            raise ValueError(f"{path} has prompts, but the pipeline takes none.")
        return [{"prompt": line} for line in lines]
    try:
        entries = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a line that is not JSON: {error}.") from error
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or entry.keys() != entries[0].keys() or not entry.keys() <= known:
            raise ValueError(
                f"{path}, line {number}: every line must be an object with the same arguments of the pipeline, got {entry}."
            )
    return entries
