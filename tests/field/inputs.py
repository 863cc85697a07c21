"""Arguments for calls of pipelines, from the names of their parameters."""

import inspect
from fnmatch import fnmatchcase
from typing import Any

from diffusers import DiffusionPipeline

from .exceptions import INPUTS, Table
from .material import FRAMES, TOKENS, film, half_mask, other_picture, picture, pictures
from .sizes import SIZE


# What a pipeline gets if its call has a parameter of that name. Functions make the argument.
GIVEN: dict[str, Any] = {
    "prompt": "a fox",
    "height": SIZE,
    "width": SIZE,
    "num_frames": FRAMES,
    "output_type": "latent",
    "max_sequence_length": TOKENS,
    "image": picture,
    "images": pictures,
    "mask_image": half_mask,
    "control_image": other_picture,
    "original_image": other_picture,
    "video": film,
    "control_video": film,
    "class_labels": [1],
    "strength": 0.5,
    "use_resolution_binning": False,
    "clean_caption": False,
}


def merged(table: Table, name: str) -> dict[str, Any]:
    """What the rows of a table say about a class: later ones over earlier ones, settings of one component joined."""
    found: dict[str, Any] = {}
    for patterns, entries in table:
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            for key, value in entries.items():
                joined = isinstance(value, dict) and isinstance(found.get(key), dict)
                found[key] = found[key] | value if joined else value
    return found


def call_arguments(pipeline_class: type[DiffusionPipeline]) -> dict[str, Any]:
    """The arguments of a call, without the number of steps and the generator."""
    names = inspect.signature(pipeline_class.__call__).parameters
    arguments = GIVEN | merged(INPUTS, pipeline_class.__name__)
    return {
        name: value() if callable(value) else value
        for name, value in arguments.items()
        if name in names and value is not None
    }
