"""Which guidance scales samples have, and which is in force in the running call of a pipeline."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from .scheduling_utils import GUIDANCE_ARGUMENTS, PipelineCall


def guidance_range(per_sample: Sequence[Mapping[str, Any]]) -> tuple[str, list[float]] | None:
    """The argument for guidance that samples differ in, and the scales that they have, ascending.

    Raises:
        ValueError: If they differ in more than one, or a scale is not positive.
    """
    found = {
        name: sorted({inputs[name] for inputs in per_sample}) for name in GUIDANCE_ARGUMENTS if name in per_sample[0]
    }
    found = {name: scales for name, scales in found.items() if len(scales) > 1}
    if len(found) > 1:
        raise ValueError(f"Only one guidance scale can be a range, got several values of {', '.join(found)}.")
    if any(scales[0] <= 0 for scales in found.values()):
        raise ValueError(f"The guidance scales of a range must be positive, got {found}.")
    return next(iter(found.items()), None)


def guidance_of_call(call: PipelineCall, argument: str) -> float | None:
    """The guidance scale that a call of a pipeline was given or uses by default; `None` if it is not one number."""
    scale = (call.defaults | call.arguments).get(argument)
    return float(scale) if isinstance(scale, Real) else None


def may_change_guidance(call: PipelineCall, argument: str) -> bool:
    """Whether a callback may change the guidance scale of the running call.

    It may where the pipeline reads its own property in every step. Others keep a number or a tensor that they have made before, and
    CogVideoX has a schedule of its own.
    """
    own_schedule = call.arguments.get("use_dynamic_cfg")
    return "callback_on_step_end" in call.arguments and argument in call.names and not own_schedule


def changed_guidance(call: PipelineCall, argument: str) -> float | None:
    """The guidance scale that is in force in a call in which it may change."""
    scale = getattr(call.pipe, f"_{argument}", None)
    return float(scale) if isinstance(scale, Real) else None
