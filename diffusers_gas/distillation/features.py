"""Features that a loss compares: the final samples, decoded images, or features of either."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

from diffusers import DiffusionPipeline
from torch import Tensor

from ..noise_schedules import check_choice
from ..pipelines.decoding import StateDecoder
from .lpips import LPIPS


FeatureName: TypeAlias = Literal["states", "pixels", "lpips"]


def make_features(
    name: FeatureName,
    pipe: DiffusionPipeline,
    *,
    size: int | None = 224,
    pipeline_inputs: Mapping[str, Any] | None = None,
) -> Callable[[Tensor], Tensor] | None:
    """The `features` of a [`Loss`]: a function of final samples, with the batch as the first dimension of both.

    Args:
        name: What to compare:

            - `"states"`: the final samples, latents or pixels. `None` is returned.
            - `"pixels"`: decoded images, not clamped.
            - `"lpips"`: LPIPS of decoded images. The loss must be `"l2"`.
        pipe: The pipeline whose final samples are compared.
        size: See [`LPIPS`].
        pipeline_inputs: Arguments of the pipeline's call for one sample, which a latent pipeline needs; see [`StateDecoder`].

    Raises:
        ValueError: If there are no features of this name, if the pipeline's samples cannot be decoded, or if LPIPS's weights
            cannot be had.
    """
    check_choice("name", name, FeatureName)
    if name == "states":
        return None
    decoder = StateDecoder(pipe, **(pipeline_inputs or {}))
    if name == "pixels":
        return decoder
    lpips = LPIPS.from_pretrained(size)

    def perceptual(states: Tensor) -> Tensor:
        images = decoder(states)
        return lpips.to(images.device)(images)

    return perceptual
