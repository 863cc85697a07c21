"""Images of a scheduler, and the final states from which the pipeline decodes them, by one run of the pipeline."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from ..utils.tensors import FLOAT32
from .driving import quiet_sampling, recording_copy
from .inputs import BatchSize, SampleInputs


def sample_images(
    pipe: DiffusionPipeline,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    inputs: SampleInputs,
    batch_size: int | BatchSize = 32,
) -> list[np.ndarray]:
    """The images of [`sample_with_states`], each an array of shape `(height, width, channels)` in [0, 1]."""
    images, _ = sample_with_states(pipe, scheduler, num_inference_steps, inputs, batch_size)
    return [image.movedim(0, -1).numpy() for image in images]


def sample_with_states(
    pipe: DiffusionPipeline,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    inputs: SampleInputs,
    batch_size: int | BatchSize,
) -> tuple[Tensor, Tensor]:
    """Samples images, and keeps the final states from which they are decoded.

    Returns:
        `(Tensor, Tensor)` on the CPU: images of shape `(num_samples, channels, height, width)` in [0, 1], with the 256 levels of
        image files (of a video the middle frame), and final states of shape `(num_samples, ...)` in float32. Both have NaN
        where sampling diverged.

    Raises:
        RuntimeError: If the samples differ in size.
        ValueError: If the pipeline makes neither images nor videos.
    """
    final = torch.empty(0, **FLOAT32)
    samples_pixels = not any(hasattr(component, "decode") for component in pipe.components.values())

    def after_step(sample: Tensor, next_state: Tensor, is_last: bool) -> Tensor:
        nonlocal final
        if not is_last:
            return next_state
        final = next_state.float()
        return final if samples_pixels else next_state  # NumPy has no bfloat16

    def images_and_states(arguments: dict[str, Any]) -> Iterable[tuple[Tensor, Tensor]]:
        output = pipe(**arguments, num_inference_steps=num_inference_steps, output_type="np")
        if hasattr(output, "frames"):
            images = [video[len(video) // 2] for video in output.frames]
        elif hasattr(output, "images"):
            images = output.images
        else:
            raise ValueError(f"No picture: {type(pipe).__name__} makes {sorted(output.keys())}.")
        # DiT steps both halves of its doubled batch for guidance. It decodes the first half, and `zip` ends there.
        return zip(map(_eight_bit, images), final.detach().cpu())

    with quiet_sampling(pipe, recording_copy(scheduler, after_step)):
        images, states = zip(*inputs.in_calls(pipe, batch_size, images_and_states))
    return torch.stack(images), torch.stack(states)


def _eight_bit(image: np.ndarray) -> Tensor:
    """An image of shape (height, width, channels), or grey without the last axis, as (channels, height, width)."""
    tensor = torch.from_numpy(np.atleast_3d(image)).movedim(-1, 0).float().clamp(0, 1)
    return (tensor * 255).round() / 255
