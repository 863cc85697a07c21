"""The guidance scale that a solver was distilled with, against the one that it is used with."""

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging

from ..utils.diffusers_hooks import pipeline_call


logger = logging.get_logger(__name__)

# Names of the argument in Diffusers' pipelines. It has one value for all samples of a call.
GUIDANCE_ARGUMENTS = ("guidance_scale", "guidance_scale_2", "true_cfg_scale", "image_guidance_scale")

# How far outside the scales of its distillation a solver is used without a warning.
TOLERANCE = 1.25


def default_guidance(pipe: DiffusionPipeline) -> dict[str, float]:
    """The scales that a pipeline uses unless told otherwise, by argument."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    defaults = {name: parameters[name].default for name in GUIDANCE_ARGUMENTS if name in parameters}
    return {name: float(scale) for name, scale in defaults.items() if isinstance(scale, int | float)}


def warn_of_other_guidance(scheduler: SchedulerMixin, provenance: Mapping[str, Any]) -> None:
    """Warns if the calling pipeline's guidance is far from that of a solver's distillation.

    Args:
        scheduler: What the pipeline samples with. It is not told the scale.
        provenance: The record of a solver. `pipeline_arguments` holds the scale or a list of scales, by argument.
    """
    arguments = provenance.get("pipeline_arguments")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    trained = {name: _numbers(arguments.get(name)) for name in GUIDANCE_ARGUMENTS}
    call = pipeline_call(scheduler) if any(trained.values()) else None
    used = {} if call is None else call.defaults | call.arguments
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
