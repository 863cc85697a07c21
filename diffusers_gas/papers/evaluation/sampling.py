"""Images and final samples (before decoding) of a scheduler, from one run of its pipeline."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor

from ...pipelines.driving import forgiving_copy, quiet_sampling
from ...pipelines.inputs import SampleInputs


def sample_with_states(
    pipe: DiffusionPipeline,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    inputs: SampleInputs,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Images, and the final samples from which they are decoded.

    Args:
        pipe: The pipeline. Its own scheduler is in place again afterwards.
        scheduler: The scheduler to sample with. It is not changed.
        num_inference_steps: Number of steps.
        inputs: The seed and the arguments of each sample.
        batch_size: Largest number of samples in a pipeline call.

    Returns:
        `(Tensor, Tensor)` on the CPU: images of shape `(num_samples, channels, height, width)` in [0, 1], with the 256 levels of
        image files (of a video the middle frame), and final samples of shape `(num_samples, ...)` in float32. Both have NaN
        where sampling diverged.

    Raises:
        ValueError: If the samples differ in size.
    """
    scheduler = forgiving_copy(scheduler)
    step, state = scheduler.step, torch.empty(0)

    @functools.wraps(step)
    def recording_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal state
        output = step(*args, **kwargs)
        state = output[0]
        return output

    def images_and_states(arguments: dict[str, Any]) -> Iterable[tuple[Tensor, Tensor]]:
        output = pipe(**arguments, num_inference_steps=num_inference_steps, output_type="np")
        images = getattr(output, "images", None)
        if images is None:
            images = [video[len(video) // 2] for video in output.frames]
        # DiT steps the samples of both halves of its guidance and decodes the first half only. `zip` ends with that.
        return zip(map(_eight_bit, images), state.detach().float().cpu())

    scheduler.step = recording_step
    with quiet_sampling(pipe, scheduler):
        images, states = zip(*inputs.in_calls(pipe, batch_size, images_and_states))
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1:
        raise ValueError(f"The samples have different sizes, {sorted(sizes)}: make them all of one size.")
    return torch.stack(images), torch.stack(states)


def _eight_bit(image: np.ndarray) -> Tensor:
    """An image (height, width, channels), or grey without the last axis, as (channels, height, width)."""
    tensor = torch.from_numpy(np.atleast_3d(image)).movedim(-1, 0).float().clamp(0, 1)
    return (tensor * 255).round() / 255
