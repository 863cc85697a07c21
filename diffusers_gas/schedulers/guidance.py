"""The guidance scale that a solver was distilled with, against the one that it is used with."""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging


logger = logging.get_logger(__name__)

# Names of the argument in Diffusers' pipelines. It has one value for all samples of a call.
GUIDANCE_ARGUMENTS = ("guidance_scale", "guidance_scale_2", "true_cfg_scale", "image_guidance_scale")

# How far outside the scales of its distillation a solver is used without a warning.
TOLERANCE = 1.25

# How many frames above `set_timesteps` the pipeline's call may be.
MAX_FRAMES = 8


def default_guidance(pipe: DiffusionPipeline) -> dict[str, float]:
    """The scales that a pipeline uses unless told otherwise, by argument."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    defaults = {name: parameters[name].default for name in GUIDANCE_ARGUMENTS if name in parameters}
    return {name: float(scale) for name, scale in defaults.items() if isinstance(scale, int | float)}


def warn_of_other_guidance(provenance: Mapping[str, Any]) -> None:
    """Warns if the calling pipeline's guidance is far from that of a solver's distillation.

    A scheduler is not told the scale. A pipeline that calls `set_timesteps` has it among the local variables of its call.

    Args:
        provenance: The record of a solver. `pipeline_arguments` holds the scale or a list of scales, by argument.
    """
    arguments = provenance.get("pipeline_arguments")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    trained = {name: _numbers(arguments.get(name)) for name in GUIDANCE_ARGUMENTS}
    used = _callers_arguments() if any(trained.values()) else {}
    for name, scales in trained.items():
        scale = used.get(name)
        if not scales or not isinstance(scale, int | float):
            continue
        if not min(scales) / TOLERANCE <= scale <= max(scales) * TOLERANCE:
            logger.warning(
                f"This solver was distilled with `{name}` {_listed(scales)} and is used with {scale}: it may do no better "
                "than an untrained one. Distill one for this scale, or for several (`--guidance_scale 3 5 7.5`)."
            )


def _numbers(recorded: Any) -> list[float]:
    scales = recorded if isinstance(recorded, list) else [recorded]
    return [scale for scale in scales if isinstance(scale, int | float)]


def _listed(scales: list[float]) -> str:
    return f"{scales[0]}" if len(scales) == 1 else f"from {min(scales)} to {max(scales)}"


def _callers_arguments() -> Mapping[str, Any]:
    frame = inspect.currentframe()
    for _ in range(MAX_FRAMES):
        if frame is None:
            break
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}
