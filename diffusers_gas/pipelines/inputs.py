"""Which samples a pipeline is to make: a seed for each, and the arguments of its call."""

import inspect
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from diffusers import DiffusionPipeline
from diffusers.utils import load_image, logging
from PIL.Image import Image
from torch import Tensor

from ..schedulers.configs import to_python
from ..schedulers.scheduling_utils import GUIDANCE_ARGUMENTS
from ..utils.files import read_text


logger = logging.get_logger(__name__)

T = TypeVar("T")

# First seeds as in the GS paper. They lie so far apart that no solver is evaluated on a seed that it was trained on.
TRAINING_SEED = 0
EVALUATION_SEED = 50_000


# Arguments for the number of samples of a prompt.
COUNT_ARGUMENTS = {"num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"}

# Arguments for the image that a pipeline starts from.
IMAGE_ARGUMENTS = {"image", "mask_image", "original_image"}

# Arguments that nobody else may choose: the schedulers, the seeds and what is kept of a sampling decide them.
OWN_ARGUMENTS = COUNT_ARGUMENTS | {
    *("batch_size", "generator", "latents", "num_inference_steps", "sigmas", "timesteps"),
    *("callback", "callback_on_step_end", "output_type", "return_dict"),
}

# Arguments that have one entry for every sample of a batch: prompts, labels, embeddings, and masks of embeddings. The first axis
# of Llama's embeddings (HiDream) is that of its layers.
_TEXT_OR_LABEL = re.compile(r"(neg_|negative_)?prompt(_\d)?|class_labels")
_ONE_EACH = re.compile(rf"{_TEXT_OR_LABEL.pattern}|(?!.*(ip_adapter|llama)).*(_embeds|_embeddings|attention_mask).*")


class BatchSize:
    """The most samples in a call of a pipeline. All who share it go on with half as many after a call that ran out of memory."""

    def __init__(self, most: "int | BatchSize"):
        self.most: int = most.most if isinstance(most, BatchSize) else most

    def halve(self, number: int, error: RuntimeError) -> None:
        """Halves the number of samples of a call that failed, or raises its error if it is another one or cannot be halved."""
        if number == 1 or not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
            raise error
        self.most = number // 2
        logger.warning(f"{number} samples in a call do not fit into memory. Going on with {self.most}.")


@dataclass(frozen=True)
class SampleInputs:
    """Samples that a pipeline is to make: a seed for each, and the arguments of the pipeline's call.

    A sample's noise depends on its seed alone, in any batch, for pipelines with and without a `latents` argument.

    Args:
        seeds: One for each sample.
        per_sample: Arguments that differ between samples, one mapping for each, e.g. `{"prompt": "a fox"}`. All have the
            same names. Samples with different numbers (guidance scales), mappings (`cross_attention_kwargs`) or sizes of images
            are made by different calls. Final states of several sizes cannot be fitted together.
        common: Arguments that all samples share, e.g. `{"guidance_scale": 7.5}`.

    Raises:
        ValueError: If there is not one mapping for each seed, or if they differ in their names.
    """

    seeds: Sequence[int]
    per_sample: Sequence[Mapping[str, Any]]
    common: Mapping[str, Any]

    def __post_init__(self) -> None:
        names = list(dict.fromkeys(tuple(sorted(own)) for own in self.per_sample))
        if len(self.seeds) != len(self.per_sample) or len(names) > 1:
            raise ValueError(
                f"`per_sample` must have a mapping for each of the {len(self.seeds)} seeds, all of the same names, got "
                f"{len(self.per_sample)} of {' and '.join(map(str, names[:2]))}."
            )

    @classmethod
    def create(
        cls, first_seed: int, num_samples: int, cycle: Sequence[Mapping[str, Any]] = ({},), **common: Any
    ) -> "SampleInputs":
        """`num_samples` samples with consecutive seeds.

        Their own arguments are the entries of `cycle` in turn, and so are those of lists in `common`: prompts, labels,
        embeddings, and as many images as prompts. Guidance scales take turns within every pass through the others, so that all
        meet all.

        Raises:
            ValueError: If these lists differ in length.
        """
        common, *cycle = map(_with_plain_numbers, [common, *cycle])
        common = {name: value for name, value in common.items() if name not in cycle[0]}
        rows, common = _rows(common, cycle[0])
        scales = {name: common.pop(name) for name in GUIDANCE_ARGUMENTS if isinstance(common.get(name), list)}
        turn = math.lcm(len(rows), len(cycle))
        per_sample = [
            {
                **rows[i % len(rows)],
                **cycle[i % len(cycle)],
                **{name: values[(i % turn + i // turn) % len(values)] for name, values in scales.items()},
            }
            for i in range(num_samples)
        ]
        return cls(range(first_seed, first_seed + num_samples), per_sample, common)

    @classmethod
    def of_call(
        cls, pipe: DiffusionPipeline, inputs: "SampleInputs | None", num_samples: int, arguments: Mapping[str, Any]
    ) -> "SampleInputs":
        """The given `inputs`, or `num_samples` samples of the given arguments, but at least one for each entry of a list.

        Raises:
            ValueError: If both are given, or for arguments that the pipeline's call does not have.
        """
        if inputs is not None and arguments:
            raise ValueError(f"Pass {sorted(arguments)} as part of `inputs`, not beside it.")
        if inputs is None:
            check_arguments(pipe, arguments)
            num_samples = max(num_samples, len(_rows(arguments)[0]))
            return cls.create(TRAINING_SEED, num_samples, **arguments)
        check_arguments(pipe, {**inputs.common, **dict(*inputs.per_sample[:1])})
        samples = {
            (
                int(seed),
                *(value if isinstance(value, str | int | float) else id(value) for _, value in sorted(own.items())),
            )
            for seed, own in zip(inputs.seeds, inputs.per_sample)
        }
        if len(samples) < len(inputs):
            raise ValueError(
                "`inputs` has a sample twice, of one seed and the same arguments: what is fitted to it cannot be judged by it."
            )
        return inputs

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: slice | Sequence[int]) -> "SampleInputs":
        if isinstance(index, slice):
            return SampleInputs(self.seeds[index], self.per_sample[index], self.common)
        return SampleInputs([self.seeds[i] for i in index], [self.per_sample[i] for i in index], self.common)

    def split(self, size: int) -> list["SampleInputs"]:
        """Parts of so many consecutive samples; the last may have fewer."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def map_calls(self, batch_size: int | BatchSize, call: Callable[[list[int]], T]) -> Iterator[T]:
        """Results of `call` for the positions of the samples of each call of a pipeline.

        A call that runs out of memory is made again with half as many samples, as with Accelerate's
        `find_executable_batch_size`, which would collect garbage before every call.
        """
        limit = batch_size if isinstance(batch_size, BatchSize) else BatchSize(batch_size)
        groups: dict[tuple, list[int]] = {}
        for position, inputs in enumerate(self.per_sample):
            key = tuple(_alike_in_a_call(name, value) for name, value in sorted(inputs.items()))
            groups.setdefault(key, []).append(position)
        for group in groups.values():
            while group:
                positions = group[: limit.most]
                try:
                    result = call(positions)
                except RuntimeError as error:
                    limit.halve(len(positions), error)
                else:
                    group = group[len(positions) :]
                    yield result
                    continue
                clear_device_cache(garbage_collection=True)  # here, where no traceback keeps tensors alive

    def in_calls(
        self, pipe: DiffusionPipeline, batch_size: int | BatchSize, call: Callable[[dict[str, Any]], Iterable[Any]]
    ) -> list[Any]:
        """A result for every sample. `call` gets the arguments of the pipeline for a batch and returns its results."""

        def results(positions: list[int]) -> dict[int, Any]:
            return dict(zip(positions, call(self[positions].pipeline_arguments(pipe))))

        found = {position: result for some in self.map_calls(batch_size, results) for position, result in some.items()}
        return [found[position] for position in range(len(self))]

    def pipeline_arguments(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Arguments of the one pipeline call that makes all of these samples.

        Common prompts, embeddings, masks and labels are repeated for every sample, so that a batch means what its parts
        mean. A pipeline's own argument for the number of samples serves only where there is nothing to repeat: some
        pipelines overwrite it.
        """
        n = len(self)
        parameters = call_parameters(pipe).keys()
        alike = not any(
            _ONE_EACH.fullmatch(name) and value is not None
            for name, value in {**self.common, **self.per_sample[0]}.items()
        )
        # Pipelines that start from an image draw noise for every image that they are given.
        repeats_images = n > 1 and ("strength" in parameters or (alike and not COUNT_ARGUMENTS & parameters))
        arguments: dict[str, Any] = {}
        for name, value in self.common.items():
            is_repeated = _num_samples(name, value) == 1 and (repeats_images or name not in IMAGE_ARGUMENTS)
            arguments[name] = _batched([value] * n) if is_repeated else value
        for name in self.per_sample[0]:
            values = [inputs[name] for inputs in self.per_sample]
            arguments[name] = values[0] if _is_of_call(name, values[0]) else _batched(values)
        numbers = {"batch_size"} | (COUNT_ARGUMENTS if alike else set())
        arguments |= dict.fromkeys(numbers & parameters, n)
        arguments["generator"] = [torch.Generator().manual_seed(operator.index(seed)) for seed in self.seeds]
        return arguments

    def value(self, argument: str) -> Any:
        """What the first sample has for an argument, as all samples of a call do."""
        return self.per_sample[0].get(argument, self.common.get(argument))

    def guidance_range(self) -> tuple[str, list[float]] | None:
        """The argument for guidance that the samples differ in, and the scales that they have, ascending.

        Raises:
            ValueError: If they differ in more than one, or a scale is not positive.
        """
        found = {name: sorted(scales) for name, scales in self._own_scales().items() if len(scales) > 1}
        if len(found) > 1:
            raise ValueError(f"Only one guidance scale can be a range, got several values of {', '.join(found)}.")
        if any(scales[0] <= 0 for scales in found.values()):
            raise ValueError(f"The guidance scales of a range must be positive, got {found}.")
        return next(iter(found.items()), None)

    def record(self, pipe: DiffusionPipeline) -> dict[str, Any]:
        """For a solver's provenance: numbers and texts that all samples share, and all guidance scales."""
        shared = {**default_guidance(pipe), **_with_plain_numbers(self.common)}
        shared = {name: value for name, value in shared.items() if isinstance(value, int | float | str)}
        return shared | self._own_scales()

    def _own_scales(self) -> dict[str, list[float]]:
        """The guidance scales that samples have of their own, by argument."""
        names = [name for name in GUIDANCE_ARGUMENTS if name in self.per_sample[0]]
        return {name: list(dict.fromkeys(to_python(inputs[name]) for inputs in self.per_sample)) for name in names}


def _with_plain_numbers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with numbers of NumPy and PyTorch, and their lists of guidance scales, as those of Python."""
    return {
        name: to_python(value) if name in GUIDANCE_ARGUMENTS or getattr(value, "ndim", None) == 0 else value
        for name, value in arguments.items()
    }


def _rows(common: Mapping[str, Any], own: Mapping[str, Any] = {}) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What lists of prompts, labels, embeddings and images say of each sample, and what all samples share."""
    found = {name: _num_samples(name, value) for name, value in common.items()}
    lengths = {name: length for name, length in found.items() if length is not None and length != 1}
    images = {name: lengths.pop(name) for name in IMAGE_ARGUMENTS & lengths.keys()}
    # Several images beside one prompt may be one sample's.
    if lengths or not any(map(_ONE_EACH.fullmatch, {**common, **own})):
        lengths |= {name: length for name, length in images.items() if {*lengths.values()} <= {length}}
    if len({*lengths.values()}) > 1 or 0 in lengths.values():
        raise ValueError(f"Lists of arguments have one entry a sample: they need the same length, got {lengths}.")
    rows = [{name: _entry(common[name], i) for name in lengths} for i in range(max(lengths.values(), default=1))]
    return rows, {name: value for name, value in common.items() if name not in lengths}


def _num_samples(name: str, value: Any) -> int | None:
    """The number of samples that the value of an argument is for; `None` if it is for any number."""
    is_image = name in IMAGE_ARGUMENTS
    if not is_image and not _ONE_EACH.fullmatch(name):
        return None
    if isinstance(value, list | tuple) or getattr(value, "ndim", 0) > (3 if is_image else 0):
        return len(value)
    is_one = isinstance(value, Image) if is_image else _TEXT_OR_LABEL.fullmatch(name) and isinstance(value, str | int)
    return 1 if is_one else None


def _is_of_call(name: str, value: Any) -> bool:
    """Whether all samples of a pipeline's call have one value of an argument, such as a guidance scale."""
    is_number_or_mapping = isinstance(value, int | float | Mapping) and not _TEXT_OR_LABEL.fullmatch(name)
    return is_number_or_mapping or name in GUIDANCE_ARGUMENTS


def _alike_in_a_call(name: str, value: Any) -> str:
    """What the samples of a call must share of an argument: its value if the call has only one, else the size of an image or tensor."""
    if _is_of_call(name, value):
        return str(to_python(value))  # of a tensor within a mapping all numbers, which `str` abbreviates
    return str(getattr(value, "shape", getattr(value, "size", None)))


def _entry(value: Any, i: int) -> Any:
    """The value for a sample, with a first axis of length 1 where there are axes."""
    return value[i] if isinstance(value[i], str | Image) else value[i : i + 1]


def _batched(values: list[Any]) -> Any:
    """The values of an argument for every sample as one argument of a batch."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    if isinstance(first, list | tuple):
        return [entry for value in values for entry in value]
    return first if len(values) == 1 and isinstance(first, str) else values


def call_parameters(pipe: DiffusionPipeline) -> dict[str, inspect.Parameter]:
    """The named arguments of a pipeline's call. A call that takes `**kwargs` passes them on to that of its base class."""
    found: dict[str, inspect.Parameter] = {}
    for owner in type(pipe).__mro__:
        if "__call__" in vars(owner):
            own = inspect.signature(vars(owner)["__call__"]).parameters
            found = {**own, **found}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
                break
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: parameter for name, parameter in found.items() if parameter.kind in named and name != "self"}


def default_guidance(pipe: DiffusionPipeline) -> dict[str, float]:
    """The guidance scales that a pipeline uses unless told otherwise, by argument."""
    parameters = call_parameters(pipe)
    defaults = {name: parameters[name].default for name in GUIDANCE_ARGUMENTS if name in parameters}
    return {name: float(scale) for name, scale in defaults.items() if isinstance(scale, int | float)}


def check_arguments(pipe: DiffusionPipeline, names: Iterable[str]) -> None:
    """Raises a `ValueError` for arguments that a pipeline's call does not have or that are not the user's to choose.

    Also where it takes `**kwargs`: the pipelines of Diffusers ignore what they find there. Of a call without any named argument
    nothing is known, and everything is allowed.
    """
    parameters = call_parameters(pipe)
    allowed = sorted(parameters.keys() - OWN_ARGUMENTS)
    for name in names:
        if name in OWN_ARGUMENTS:
            raise ValueError(
                f"`{name}` cannot be a pipeline argument here: it is set for every call. Leave it out. Number and seeds of "
                "the samples are those of `inputs=SampleInputs.create(first_seed, num_samples, ...)`."
            )
        if name not in allowed and parameters:
            meant = "".join(f" Did you mean `{match}`?" for match in get_close_matches(name, allowed, 1))
            raise ValueError(
                f"{type(pipe).__name__} has no argument `{name}`.{meant} It has {', '.join(allowed) or 'none to choose'}."
            )


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """An `int`, also of NumPy's or a tensor's with one entry. A `ValueError` names others, and numbers less than `least`."""
    return whole_numbers(name, [value], least)[0]


def whole_numbers(name: str, values: Any, least: int = 1) -> list[int]:
    """A [`whole_number`] or several of them, sorted and each once; at least one."""
    several = isinstance(values, Iterable) and getattr(values, "ndim", 1) > 0
    try:
        numbers = sorted({operator.index(value) for value in (values if several else [values])})
    except TypeError:
        numbers = []
    if not numbers or numbers[0] < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {values!r}.")
    return numbers


def load_sample_inputs(pipe: DiffusionPipeline, path: str | None, common: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments that differ between samples, to be used in turn.

    Args:
        pipe: The pipeline.
        path: A UTF-8 `.txt` file with one prompt a line, or a `.jsonl` file with one object of pipeline arguments a line.
            Images are paths relative to that file.
        common: Arguments that all samples share.

    Raises:
        ValueError: If the file is empty, malformed or of another kind, or if the pipeline needs arguments that are not given.
    """
    check_arguments(pipe, common)
    if path is not None:
        return _read(pipe, Path(path))
    parameters = call_parameters(pipe)
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    if "prompt" in parameters and "prompt_embeds" not in common:
        needed.add("prompt")
    if missing := sorted(needed - common.keys()):
        raise ValueError(
            f"{type(pipe).__name__} needs {missing}: pass `--prompts_file`, a text file with one prompt a line, or a .jsonl "
            "file with one object of arguments a sample."
        )
    return [{}]


def _read(pipe: DiffusionPipeline, path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() not in (".jsonl", ".txt", ""):
        raise ValueError(f"{path} must be a .txt file with one prompt a line, or a .jsonl file of pipeline arguments.")
    lines = _lines(path)
    if path.suffix.lower() != ".jsonl":
        if "prompt" not in call_parameters(pipe):
            raise ValueError(f"{path} has prompts, but {type(pipe).__name__} takes none.")
        return [{"prompt": line} for _, line in lines]
    entries: list[dict[str, Any]] = []
    for number, line in lines:
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or (entries and entry.keys() != entries[0].keys()):
                raise ValueError(f"got {entry}.")
            check_arguments(pipe, entry)
            entries.append({name: _loaded(name, value, path.parent) for name, value in entry.items()})
        except (ValueError, OSError) as error:
            reason = f"{path}, line {number}: {error}"
            raise ValueError(f"{reason} Every line must be a JSON object of the same pipeline arguments.") from error
    return entries


def _lines(path: Path) -> list[tuple[int, str]]:
    """Number and text of the lines that are not empty. Only line feeds end a line: prompts may have other separators."""
    stripped = (line.strip(" \t\r") for line in read_text(path).split("\n"))
    if lines := [(number, line) for number, line in enumerate(stripped, start=1) if line]:
        return lines
    raise ValueError(f"{path} is empty.")


def _loaded(name: str, value: Any, folder: Path) -> Any:
    """The value of an argument in a file. Paths and addresses of images become images."""
    if "image" not in name or not isinstance(value, str):
        return value
    is_address = value.startswith(("http://", "https://"))
    return load_image(value if is_address else str(folder / value))
