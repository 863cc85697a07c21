"""From a pipeline's final states to images, with gradients, by the pipeline's own code."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..schedulers.scheduling_gas import GASScheduler
from ..utils.diffusers_hooks import differentiable_call
from .driving import (
    LeavePipeline,
    call_with_scheduler,
    frozen,
    networks_of,
    recording_copy,
    scheduler_config,
    wrapped_methods,
)


# Image-to-image pipelines skip most of their steps. With this many, at least one is left.
NUM_RECORDED_STEPS = 10

# Names of the decoding network in Diffusers' pipelines, to recognise one that was not loaded.
AUTOENCODERS = ("vae", "vqvae", "movq", "vqgan")


class StateDecoder:
    """Decodes final states to images in [-1, 1]. In a pipeline that samples pixels, the states are the images.

    Between its last step and its decoder every pipeline applies an affine map of its own: it unpacks, permutes, scales and
    shifts. This map is recorded from one sample and then applied to any. Images are clamped only if the decoder does it.

    Args:
        pipe: The pipeline. Its networks are left unchanged.
        pipeline_inputs: Arguments of `pipe.__call__` for one sample. They decide the size of the states. They are not
            needed for pipelines that sample pixels.

    Raises:
        ValueError: If the pipeline does more than that before it decodes: it blends images in (inpainting), decodes in
            pieces, or removes the gradients; or if it was loaded without its autoencoder.
    """

    def __init__(self, pipe: DiffusionPipeline, **pipeline_inputs: Any):
        self._pipe = pipe
        missing = [name for name in AUTOENCODERS if pipe.components.get(name, pipe) is None]
        if missing:
            raise ValueError(f"{type(pipe).__name__} was loaded without its {missing}: cannot decode its states.")
        networks = [network for network in networks_of(pipe) if hasattr(network, "decode")]
        self._decoder: Any = None
        if not networks:
            return
        dtypes = {network: network.dtype for network in networks}
        self._state, latents, decoder, self._arguments = _record(pipe, networks, pipeline_inputs)
        self._constant = latents.detach()
        self._linearize(latents)
        self._decoder = decoder
        if decoder.dtype != dtypes[decoder]:
            # The pipeline has changed its decoder's precision for decoding. Ours is a copy, and the decoder goes back.
            self._decoder = type(decoder).from_config(decoder.config).to(decoder.device).requires_grad_(False).eval()
            self._decoder.load_state_dict(decoder.state_dict())
            decoder.to(dtypes[decoder])

    def _linearize(self, latents: Tensor) -> None:
        # The transpose J^T v is a backward pass; it is linear in v, and its own backward pass is J.
        name = type(self._pipe).__name__
        if not latents.requires_grad:
            raise ValueError(f"{name} removes the gradients between its last step and its decoder: cannot decode it.")
        self._cotangent = torch.ones_like(latents).requires_grad_()
        (self._transposed,) = torch.autograd.grad(latents, self._state, self._cotangent, create_graph=True)
        (curvature,) = torch.autograd.grad(
            self._transposed, self._state, torch.ones_like(self._state), retain_graph=True, allow_unused=True
        )
        if curvature is not None or (self._transposed == 0).any():
            raise ValueError(
                f"{name} does not hand its whole final state to its decoder at once, rearranged and scaled only: a loss "
                "of decoded images is not possible. Use one of states."
            )

    def latents(self, states: Tensor) -> Tensor:
        """The decoder's input: unpacked and rescaled states, `(batch_size, channels, ..., height, width)`."""
        return states if self._decoder is None else _by_sample(self._to_decoder(states), len(states))

    def __call__(self, states: Tensor) -> Tensor:
        """Images `(batch_size, channels, height, width)` or videos `(batch_size, channels, frames, height, width)`."""
        if self._decoder is None:
            return states
        args, kwargs = self._arguments
        with frozen(self._pipe):
            images = self._decoder.decode(self._to_decoder(states), *args, **kwargs)[0]
        return _by_sample(images, len(states))

    def _to_decoder(self, states: Tensor) -> Tensor:
        if states.shape[1:] != self._state.shape[1:]:
            raise ValueError(
                f"States of shape {tuple(states.shape[1:])} cannot be decoded: the pipeline's are of shape "
                f"{tuple(self._state.shape[1:])} with the arguments given."
            )
        keep = torch.is_grad_enabled() and states.requires_grad
        rows = [
            torch.autograd.grad(self._transposed, self._cotangent, state, retain_graph=True, create_graph=keep)[0]
            for state in states.to(self._state).split(1)
        ]
        return torch.cat([row + self._constant for row in rows])


def _by_sample(rows: Tensor, batch_size: int) -> Tensor:
    """Undoes what pipelines do that decode the frames of a video as a batch."""
    return rows if len(rows) == batch_size else rows.unflatten(0, (batch_size, -1)).transpose(1, 2)


def _record(
    pipe: DiffusionPipeline, decoders: list[Any], pipeline_inputs: dict[str, Any]
) -> tuple[Tensor, Tensor, Any, tuple[tuple, dict]]:
    """A final state of zeros, the decoder's input for it, the decoder, and the decoder's further arguments.

    The zeros stand in the place of the first sample's final state. Autograd records what the pipeline does with them.
    """
    zeros: Tensor | None = None

    def after_step(sample: Tensor, next_state: Tensor, is_last: bool) -> Tensor:
        nonlocal zeros
        if not is_last:
            return next_state
        zeros = torch.zeros_like(sample[:1]).requires_grad_()
        return torch.cat([zeros, sample[1:]])

    def leaving_after_the_last_step(decoder: Any, decode: Callable) -> Callable:
        def leave(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            if zeros is None:
                return decode(latents, *args, **kwargs)
            raise LeavePipeline((zeros, latents, decoder, (args, kwargs)))

        return leave

    scheduler = recording_copy(GASScheduler.from_config(scheduler_config(pipe)), after_step)
    inputs = {"num_inference_steps": NUM_RECORDED_STEPS, **pipeline_inputs}
    with torch.enable_grad(), frozen(pipe), wrapped_methods(decoders, "decode", leaving_after_the_last_step):
        try:
            return call_with_scheduler(pipe, scheduler, differentiable_call(pipe), inputs)
        except ValueError as error:
            if zeros is None:
                raise
            raise ValueError(f"{type(pipe).__name__} does not decode its final state with these arguments.") from error
