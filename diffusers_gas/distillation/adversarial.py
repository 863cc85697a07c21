"""Adversarial training of a solver: the relativistic pairing loss with gradient penalties (R3GAN, arXiv 2501.05441).

A pair is a teacher's sample (real) and a student's sample (fake) from the same noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..pipelines.inputs import call_parameters


# Networks of pipelines, with the entries in their configs that have the number of channels of samples.
_CHANNEL_ENTRIES = [
    (network, entry) for network in ("transformer", "unet") for entry in ("in_channels", "out_channels")
]
_CHANNEL_ENTRIES += [("vae", "latent_channels")]


class DiscriminatorLoss(NamedTuple):
    """The loss of a discriminator and its parts, all of shape `(batch_size,)`.

    Attributes:
        loss: softplus(fake_logits - real_logits) + r1_weight * r1 + r2_weight * r2. The discriminator minimises its mean.
        real_logits, fake_logits: The logits of the real and of the fake samples.
        r1, r2: The squared norm of the logit's gradient at the real and at the fake sample, or `None` with weight 0.
    """

    loss: Tensor
    real_logits: Tensor
    fake_logits: Tensor
    r1: Tensor | None
    r2: Tensor | None


def generator_loss(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """softplus(real - fake) for each pair, which is low if the fake sample looks more real than the real one.

    Args:
        fake_logits, real_logits (`Tensor` of shape `(batch_size,)`): The logits of the pairs.

    Raises:
        ValueError: If the shapes differ.
    """
    if fake_logits.shape != real_logits.shape:
        raise ValueError(
            f"Real and fake samples are pairs, got {tuple(real_logits.shape)} real and {tuple(fake_logits.shape)} fake "
            "logits: pass one fake sample for each real one."
        )
    return softplus(real_logits - fake_logits)


def discriminator_loss(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    r1_weight: float = 0.1,
    r2_weight: float = 0.1,
) -> DiscriminatorLoss:
    """The relativistic pairing loss with zero-centred penalties R1 and R2.

    Gradients reach the discriminator only: both batches are detached. The default weights of the penalties, gamma / 2 in the
    R3GAN paper, are those of the GAS paper (arXiv 2510.17699).

    Args:
        discriminator: Maps samples to logits of shape `(batch_size,)`. A logit must depend on its own sample only.
        real, fake (`Tensor` of shape `(batch_size, ...)`): The samples of the pairs.
        r1_weight, r2_weight: Weights of the penalties at the real and at the fake samples.

    Raises:
        ValueError: If the numbers of real and fake samples differ.
    """
    real_logits, r1 = _logits_and_penalty(discriminator, real, r1_weight)
    fake_logits, r2 = _logits_and_penalty(discriminator, fake, r2_weight)
    # The generator's loss with the roles exchanged.
    loss = generator_loss(real_logits, fake_logits)
    for weight, penalty in ((r1_weight, r1), (r2_weight, r2)):
        if penalty is not None:
            loss = loss + weight * penalty
    return DiscriminatorLoss(loss, real_logits, fake_logits, r1, r2)


def _logits_and_penalty(
    discriminator: Callable[[Tensor], Tensor], samples: Tensor, weight: float
) -> tuple[Tensor, Tensor | None]:
    samples = samples.detach()
    if weight == 0:
        return discriminator(samples), None
    samples.requires_grad_()
    logits = discriminator(samples)
    # Each logit depends on its own sample only. The gradient of their sum therefore holds the gradient of each.
    (gradient,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
    return logits, gradient.square().flatten(1).sum(1)


@dataclass
class AdversarialRecipe:
    """Adversarial training, --loss gas.

    Args:
        adversarial_weight: Of the adversarial loss beside the distillation loss; published: 1, on CIFAR-10 0.1.
        discriminator_learning_rate: Adam's; published: 1e-5, which is the default for a pretrained one.
        discriminator_warmup_steps: First steps, of --max_train_steps, in which only the discriminator learns. An untrained one gives
            random directions, in which Adam would move the solver as far as in any other.
        r1_weight, r2_weight: Of the gradient penalties at teacher and student samples.
        reuse_fakes: The discriminator learns after the solver, from the samples that the solver was just trained on: a rollout less.
            In the published order it learns before the solver, from samples of fresh noise.
    """

    adversarial_weight: float = 1.0
    discriminator_learning_rate: float = 1e-4
    discriminator_warmup_steps: int = 0
    r1_weight: float = 0.1
    r2_weight: float = 0.1
    reuse_fakes: bool = False


@dataclass(eq=False)
class Adversary:
    """The opponent of the solver in adversarial training: a discriminator of teacher and student samples with its optimizer.

    Args:
        discriminator: Maps a batch of samples to one logit for each.
        recipe: The settings.
        as_grid: Maps final states of the pipeline to the discriminator's inputs, differentiably.
    """

    discriminator: nn.Module
    recipe: AdversarialRecipe
    as_grid: Callable[[Tensor], Tensor] = lambda samples: samples

    def __post_init__(self) -> None:
        if any(parameter.is_inference() for parameter in self.discriminator.parameters()):
            raise ValueError("A discriminator cannot learn that was made in inference mode: make it outside of that.")
        self.discriminator.requires_grad_(False)
        learning_rate = self.recipe.discriminator_learning_rate
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=learning_rate)

    def generator_loss(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of every student sample, paired with the teacher's sample, and the differences of their logits."""
        fake, real = (self.discriminator(self._grid(samples)) for samples in (student, teacher))
        return generator_loss(fake, real), fake - real

    def _grid(self, samples: Tensor) -> Tensor:
        return self.as_grid(samples).to(next(self.discriminator.parameters()).dtype)

    def accumulate(self, student: Tensor, teacher: Tensor, total_batch_size: int) -> dict[str, float]:
        """Adds the discriminator's gradients on a part of a step's samples; returns sums over these samples for a log."""
        self.discriminator.requires_grad_(True)
        real, fake = self._grid(teacher), self._grid(student)
        result = discriminator_loss(self.discriminator, real, fake, self.recipe.r1_weight, self.recipe.r2_weight)
        (result.loss.sum() / total_batch_size).backward()
        self.discriminator.requires_grad_(False)
        sign = (result.real_logits - result.fake_logits).sign()
        values = {"loss": result.loss, "sign": sign, "r1": result.r1, "r2": result.r2}
        return {f"discriminator/{name}": value.sum().item() for name, value in values.items() if value is not None}


def as_grid(
    samples: Tensor,
    pipe: DiffusionPipeline,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
) -> Tensor:
    """A pipeline's final samples, before decoding, with channels second and the tokens of images and videos on their grid.

    Pipelines that pack their latents (Flux, Qwen-Image, LTX) have token sequences `(batch_size, length, channels)`. These become
    `(batch_size, channels, rows, columns)`, for videos `(batch_size, channels, frames, rows, columns)`. If the length does not
    fit the given size, they become `(batch_size, channels, length)`.

    A later dimension becomes the second if, by the configs of the pipeline's networks, the second cannot be the channels and
    exactly that one can. CogVideoX, for example, has frames before channels.

    Args:
        samples (`Tensor` of shape `(batch_size, ...)`): The final samples.
        pipe: The pipeline that made them.
        height, width: Size of the images in pixels. By default that in the signature of the pipeline's call. If the signature
            has none, images are assumed to be square.
        num_frames: Number of frames of the videos, before compression. By default that in the signature of the pipeline's call.

    Raises:
        ValueError: If only one of `height` and `width` is given.
    """
    if samples.ndim == 3 and hasattr(pipe, "_pack_latents"):
        sizes = _token_grid(samples.shape[1], pipe, height, width, num_frames)
        return samples.transpose(1, 2).unflatten(2, sizes)
    networks = [(getattr(pipe, name, None), entry) for name, entry in _CHANNEL_ENTRIES]
    channels = {network.config.get(entry) for network, entry in networks if network is not None}
    candidates = [dim for dim in range(2, samples.ndim) if samples.shape[dim] in channels]
    if samples.shape[1] in channels or len(candidates) != 1:
        return samples
    return samples.movedim(candidates[0], 1)


def _token_grid(
    length: int, pipe: DiffusionPipeline, height: int | None, width: int | None, num_frames: int | None
) -> tuple[int, ...]:
    """The sizes of the grid that has `length` tokens, or `(length,)` if no grid fits."""
    if (height is None) != (width is None):
        raise ValueError(f"Give both `height` and `width` or none, got {height} and {width}.")
    defaults: dict[str, Any] = {name: parameter.default for name, parameter in call_parameters(pipe).items()}
    height, width = height or defaults.get("height"), width or defaults.get("width")
    num_frames = num_frames or defaults.get("num_frames")
    frames = 1 if num_frames is None else (num_frames - 1) // pipe.vae_temporal_compression_ratio + 1
    if height is None or width is None:
        height = width = math.isqrt(length // frames)
    # A token covers a square of `scale` by `scale` pixels, and remainders are cut off. Only one grid has `length` tokens.
    for scale in range(math.isqrt(frames * height * width // length), 0, -1):
        rows, columns = height // scale, width // scale
        if frames * rows * columns == length:
            return (rows, columns) if num_frames is None else (frames, rows, columns)
    return (length,)
