"""The discriminator of R3GAN (arXiv 2501.05441), a residual network that tells the teacher's samples from a student's.

Samples are latents or pixels of audio, images or videos, of any size.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..utils.tensors import FLOAT32


NEGATIVE_SLOPE = 0.2

# By the number of spatial dimensions.
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FUNCTIONS = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


def stage_sizes(sample_size: Sequence[int]) -> list[tuple[int, ...]]:
    """The spatial sizes of every stage. The first are those of the samples, and in the last stage all are below 8.

    Between two stages, sizes of 8 or more are halved and rounded down. Other sizes stay.
    """
    sizes = [tuple(sample_size)]
    while max(sizes[-1]) >= 8:
        sizes.append(tuple(n // 2 if n >= 8 else n for n in sizes[-1]))
    return sizes


class R3GANDiscriminator(ModelMixin, ConfigMixin):
    """One logit per sample, higher for samples that look real, from a grouped residual network without normalisation.

    It has a 1x1 convolution, stages of residual blocks with a downsampling between each two, a depthwise convolution from the
    last map to one number per channel, and a linear map. On squares of `4 * 2**(num_stages - 1)` pixels this is the published
    network. Stage 0 has the highest resolution. The number of stages follows from `sample_size` by [`stage_sizes`].

    Args:
        in_channels (`int`): Channels of the samples.
        sample_size (`Sequence[int]`): The samples' 1, 2 or 3 spatial sizes, e.g. `(length,)`, `(height, width)` or
            `(frames, height, width)`.
        widths (`Sequence[int]`): Channels in each stage.
        cardinalities (`Sequence[int]`): Groups of the convolution in the middle of each stage's residual blocks.
        blocks_per_stage (`Sequence[int]`): Residual blocks in each stage.
        expansion_factor (`int`, defaults to 2): Channels inside a residual block, as a multiple of the stage's width.
        kernel_size (`int`, defaults to 3): Size of the convolution in the middle of a residual block, odd.

    Raises:
        ValueError: If the sizes do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        sample_size: Sequence[int],
        widths: Sequence[int],
        cardinalities: Sequence[int],
        blocks_per_stage: Sequence[int],
        expansion_factor: int = 2,
        kernel_size: int = 3,
    ):
        super().__init__()
        if len(sample_size) not in _CONVOLUTIONS or min(sample_size) < 1:
            raise ValueError(f"`sample_size` must be 1, 2 or 3 positive sizes, got {tuple(sample_size)}.")
        if kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, got {kernel_size}.")
        sizes = stage_sizes(sample_size)
        per_stage = {"widths": widths, "cardinalities": cardinalities, "blocks_per_stage": blocks_per_stage}
        for name, values in per_stage.items():
            if len(values) != len(sizes):
                raise ValueError(
                    f"Samples of size {tuple(sample_size)} have {len(sizes)} stages, {sizes}: `{name}` must have as "
                    f"many entries, got {list(values)}."
                )

        num_dims, num_blocks = len(sample_size), sum(blocks_per_stage)
        stages: list[list[nn.Module]] = []
        for width, cardinality, blocks in zip(widths, cardinalities, blocks_per_stage):
            block = (num_dims, width, expansion_factor * width, cardinality, kernel_size, num_blocks)
            stages.append([_ResidualBlock(*block) for _ in range(blocks)])
        for s, stage in enumerate(stages[:-1]):
            halved = [after < before for before, after in zip(sizes[s], sizes[s + 1])]
            stage.append(_Downsampling(widths[s], widths[s + 1], halved))
        stages[-1].append(_Aggregation(widths[-1], sizes[-1]))
        self.extraction = _initialised(_CONVOLUTIONS[num_dims](in_channels, widths[0], 1, bias=False, **FLOAT32))
        self.stages = nn.Sequential(*(nn.Sequential(*stage) for stage in stages))

    @classmethod
    def for_samples(
        cls, shape: Sequence[int], width: int = 128, group_width: int = 16, blocks_per_stage: int = 1
    ) -> "R3GANDiscriminator":
        """A discriminator with the same width in all stages.

        The default is small, as a solver has a hundred parameters at most. The published one for CIFAR-10 is
        `for_samples((3, 32, 32), width=768, blocks_per_stage=2)`.

        Args:
            shape: A sample's shape without the batch, `(channels, *sizes)`.
            width: Channels in each stage.
            group_width: Channels in a group of a residual block's middle convolution, which has twice as many as the stage.
            blocks_per_stage: Residual blocks in each stage.

        Raises:
            ValueError: If the sizes do not fit each other.
        """
        in_channels, *sample_size = shape
        if 2 * width % group_width:
            raise ValueError(f"2 * `width` must be a multiple of `group_width`, got 2 * {width} and {group_width}.")
        num_stages = len(stage_sizes(sample_size)) if sample_size else 0
        per_stage = [width], [2 * width // group_width], [blocks_per_stage]
        return cls(in_channels, sample_size, *(values * num_stages for values in per_stage))

    def forward(self, samples: Tensor) -> Tensor:
        """The logits, of shape `(batch_size,)`, for samples of shape `(batch_size, in_channels, *sample_size)`."""
        expected = (self.config.in_channels, *self.config.sample_size)
        if samples.shape[1:] != expected:
            raise ValueError(
                f"This discriminator is for samples of shape {expected}, got {tuple(samples.shape[1:])}: make another "
                "with `R3GANDiscriminator.for_samples`."
            )
        return self.stages(self.extraction(samples)).squeeze(1)


class _ResidualBlock(nn.Module):
    """x + conv3(act(conv2(act(conv1(x))))). It starts as the identity, because conv3 starts at zero."""

    def __init__(self, num_dims: int, width: int, expanded: int, groups: int, kernel_size: int, num_blocks: int):
        super().__init__()
        convolution = _CONVOLUTIONS[num_dims]
        # Fixup (arXiv 1901.09321): the two convolutions before the one that starts at zero share the scale num_blocks^(-1/2).
        gain = nn.init.calculate_gain("leaky_relu", NEGATIVE_SLOPE) * num_blocks**-0.25
        # The published biases of the activations are biases of the convolutions here.
        self.conv1 = _initialised(convolution(width, expanded, 1, **FLOAT32), gain)
        middle = convolution(expanded, expanded, kernel_size, padding=kernel_size // 2, groups=groups, **FLOAT32)
        self.conv2 = _initialised(middle, gain)
        self.conv3 = _initialised(convolution(expanded, width, 1, bias=False, **FLOAT32), 0)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.leaky_relu(self.conv1(x), NEGATIVE_SLOPE)
        y = nn.functional.leaky_relu(self.conv2(y), NEGATIVE_SLOPE)
        return x + self.conv3(y)


class _Downsampling(nn.Module):
    """The low-pass filter [1, 3, 3, 1] / 8 with stride 2 along the halved dimensions, and a 1x1 convolution."""

    kernel: Tensor

    def __init__(self, in_width: int, out_width: int, halved: Sequence[bool]):
        super().__init__()
        self.stride = tuple(2 if half else 1 for half in halved)
        self.padding = tuple(1 if half else 0 for half in halved)
        self.register_buffer("kernel", low_pass_kernel(halved), persistent=False)
        self.projection = nn.Identity()
        if in_width != out_width:
            self.projection = _initialised(_CONVOLUTIONS[len(halved)](in_width, out_width, 1, bias=False, **FLOAT32))

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(width, 1, *self.kernel.shape)
        filtered = _FUNCTIONS[self.kernel.ndim](x, kernel, stride=self.stride, padding=self.padding, groups=width)
        return self.projection(filtered)


class _Aggregation(nn.Module):
    """A weighted sum over the positions of each channel, then over the channels."""

    def __init__(self, width: int, size: Sequence[int]):
        super().__init__()
        convolution: Any = _CONVOLUTIONS[len(size)]
        self.basis = _initialised(convolution(width, width, size, groups=width, bias=False, **FLOAT32))
        self.linear = _initialised(nn.Linear(width, 1, bias=False, **FLOAT32))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.basis(x).flatten(1))


def _initialised(layer: Any, gain: float = 1.0) -> Any:
    """The convolution or linear layer, with normal weights of standard deviation gain / sqrt(fan_in) and zero bias."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def low_pass_kernel(halved: Sequence[bool]) -> Tensor:
    """The outer product of [1, 3, 3, 1] / 8 along the halved dimensions, of size 1 along the others."""
    kernel = torch.ones((), **FLOAT32)
    for half in halved:
        kernel = kernel[..., None] * torch.tensor([0.125, 0.375, 0.375, 0.125] if half else [1.0], **FLOAT32)
    return kernel
