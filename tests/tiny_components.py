"""Components of the tiny pipelines, and the description of one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn


SIZE = 8  # of images and, as the autoencoders do not downsample, of latents
MAX_BATCH_SIZE = 4
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class TinyPipeline(NamedTuple):
    """A pipeline, its call arguments, and the conversions that its code does around the network.

    Attributes:
        pipe: The pipeline, in evaluation mode.
        inputs: Call arguments for a batch size, without `generator`. Those of a smaller batch are the first ones of a larger.
        noise_shape: Shape of the noise that the pipeline draws for one sample.
        guidance_scale: Scale of classifier-free guidance, or `None` without guidance.
        conditional_first: Whether the conditional output precedes the unconditional one.
        flow_shift: Shift of the noise levels of a flow-matching pipeline; `None` for a variance-preserving one.
        inverted: Whether the network is told 1 - sigma (flow matching).
        timestep_scale: Factor by which the pipeline multiplies the scheduler's times.
        to_state: Converts drawn noise to the first state that the scheduler sees.
        has_latent_output: Whether the pipeline knows `output_type="latent"`.
    """

    pipe: DiffusionPipeline
    inputs: Callable[[int], dict[str, Any]]
    noise_shape: tuple[int, ...]
    guidance_scale: float | None = None
    conditional_first: bool = False
    flow_shift: float | None = None
    inverted: bool = False
    timestep_scale: float = 1.0
    to_state: Callable[[Tensor], Tensor] = lambda noise: noise
    has_latent_output: bool = True

    @property
    def denoiser(self) -> nn.Module:
        return self.pipe.unet if hasattr(self.pipe, "unet") else self.pipe.transformer

    @property
    def decoder(self) -> nn.Module | None:
        return getattr(self.pipe, "vae", None) or getattr(self.pipe, "vqvae", None)

    def network_time(self, t: float) -> float:
        """Diffusers' `timestep` at a time t in [0, 1], independent of the package's code."""
        if self.flow_shift is None:
            return 1000 * t - 1
        level = self.flow_shift * t / (1 + (self.flow_shift - 1) * t)
        return 1000 * (1 - level if self.inverted else level)


def random_rows(pipe: DiffusionPipeline, seed: int, batch_size: int, *shape: int) -> Tensor:
    """The first rows of a fixed random tensor, in the pipeline's dtype."""
    rows = torch.randn(MAX_BATCH_SIZE, *shape, generator=torch.Generator().manual_seed(seed))
    return rows[:batch_size].to(pipe.dtype)


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        shift_factor=0.1,
    )


def embeddings(pipe: DiffusionPipeline, batch_size: int, pooled: bool = False) -> dict[str, Tensor]:
    """Embeddings of prompts and negative prompts, strong enough to matter."""
    embeds = {
        "prompt_embeds": 3 * random_rows(pipe, 1, batch_size, 5, 16),
        "negative_prompt_embeds": 3 * random_rows(pipe, 2, batch_size, 5, 16),
    }
    if pooled:
        embeds["pooled_prompt_embeds"] = 3 * random_rows(pipe, 3, batch_size, 16)
        embeds["negative_pooled_prompt_embeds"] = 3 * random_rows(pipe, 4, batch_size, 16)
    return embeds
