"""Prompts and other per-sample arguments from files."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline


def load_sample_inputs(pipe: DiffusionPipeline, path: str | None, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments by which samples differ, to be used in turn.

    Args:
        pipe: The pipeline that they are for.
        path: A text file with one prompt a line, or a `.jsonl` file with one object of pipeline arguments a line.
        common: Arguments that all samples share.

    Raises:
        ValueError: If the file is empty or malformed, or if the pipeline needs prompts and has none.
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
    """Every sample's arguments with every guidance scale; a first pass through the samples has all scales in turn."""
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
