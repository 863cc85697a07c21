"""`EDMUNet`: the three U-Nets of EDM (arXiv 2206.00364)."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, pad, scaled_dot_product_attention, silu


# The taps of the filter with which each architecture resamples.
FILTERS = {"ddpm++": (1, 1), "ncsn++": (1, 3, 3, 1), "adm": (1, 1)}
MAX_PERIOD = 10_000
HEAD_WIDTH = 64  # of ADM; the others have one head


class EDMUNet(ModelMixin, ConfigMixin):
    """EDM's raw network F. A scheduler with EDM preconditioning computes `D = c_skip x + c_out F(c_in x, log(sigma) / 4)`.

    DDPM++ and NCSN++ (arXiv 2011.13456) or ADM (arXiv 2105.05233), for inference: there is no dropout. The network computes in
    the precision of its weights, but embeds the noise level in float32 or better. The output has the precision of the input.

    Args:
        sample_size (`int`): Height and width of the images, a multiple of 2 for each level but the first.
        in_channels, out_channels (`int`, defaults to 3): Channels of the images.
        architecture (`"ddpm++"`, `"ncsn++"` or `"adm"`, defaults to `"ddpm++"`): The architecture.
        model_channels (`int`, defaults to 128): Channels that `channel_mult` multiplies.
        channel_mult (`Sequence[int]`, defaults to `(2, 2, 2)`): Channels of each level, finest first, in units of `model_channels`.
        layers_per_block (`int`, defaults to 4): Residual blocks of each level of the encoder; the decoder has one more.
        attention_resolutions (`Sequence[int]`, defaults to `(16,)`): Heights of the levels with attention.
        num_class_embeds (`int`, *optional*): Number of classes of a class-conditional network.
        preconditioning (`"edm"`): The preconditioning that the weights were trained with. Others, which saved networks may have,
            are refused.
        sigma_data (`float`, defaults to 0.5): The `sigma_data` of the scheduler.

    Raises:
        ValueError: If the architecture or the preconditioning is unknown, or if `sample_size` has too few factors of 2.
    """

    # Half precision would round the phases of the noise level, on which every block depends.
    _keep_in_fp32_modules: ClassVar[list[str]] = [
        "noise_frequencies",
        "noise_layers",
        "class_embedding",
        "noise_projection",
    ]
    _no_split_modules: ClassVar[list[str]] = ["_Block"]

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int = 3,
        out_channels: int = 3,
        architecture: Literal["ddpm++", "ncsn++", "adm"] = "ddpm++",
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        layers_per_block: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        num_class_embeds: int | None = None,
        preconditioning: Literal["edm"] = "edm",
        sigma_data: float = 0.5,
    ):
        super().__init__()
        if architecture not in FILTERS:
            raise ValueError(f"`architecture` must be one of {tuple(FILTERS)}, got '{architecture}'.")
        if preconditioning != "edm":
            raise ValueError(f"`preconditioning` must be 'edm', got '{preconditioning}': use a network with EDM's.")
        factor, levels = 2 ** (len(channel_mult) - 1), len(channel_mult)
        if sample_size % factor:
            raise ValueError(f"`sample_size` must be a multiple of {factor} for {levels} levels, got {sample_size}.")
        adm = architecture == "adm"
        widths = [model_channels * factor for factor in channel_mult]
        attention = [sample_size >> level in attention_resolutions for level in range(len(widths))]
        embedding_width = 4 * model_channels
        noise_width = 2 * model_channels if architecture == "ncsn++" else model_channels
        filter_taps = FILTERS[architecture]
        kind: dict[str, Any] = {"embedding_width": embedding_width, "adm": adm, "filter_taps": filter_taps}

        if architecture == "ncsn++":
            self.register_buffer("noise_frequencies", 16 * torch.randn(noise_width // 2))
        self.noise_layers = nn.ModuleList(nn.Linear(n, embedding_width) for n in (noise_width, embedding_width))
        if num_class_embeds is not None:
            # The last row stands for no class.
            self.class_embedding = nn.Embedding(num_class_embeds + 1, embedding_width if adm else noise_width)

        width = widths[0] if adm else model_channels
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        skip_widths, image_width = [width], in_channels
        self.encoder, self.downsamplers, self.image_downsamplers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, out_width in enumerate(widths):
            if level > 0:
                self.downsamplers.append(_Block(width, width, resampling="down", **kind))
                if architecture == "ncsn++":
                    self.image_downsamplers.append(_ImageDownsampler(image_width, width, filter_taps))
                    image_width = width
                skip_widths.append(width)
            blocks = nn.ModuleList()
            for _ in range(layers_per_block):
                blocks.append(_Block(width, out_width, attention=attention[level], **kind))
                width = out_width
                skip_widths.append(width)
            self.encoder.append(blocks)

        self.middle = nn.ModuleList([_Block(width, width, attention=True, **kind), _Block(width, width, **kind)])

        self.decoder, self.upsamplers = nn.ModuleList(), nn.ModuleList()  # coarsest level first
        for level, out_width in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                self.upsamplers.append(_Block(width, width, resampling="up", **kind))
            blocks = nn.ModuleList()
            for i in range(layers_per_block + 1):
                attends = attention[level] and (adm or i == layers_per_block)
                blocks.append(_Block(width + skip_widths.pop(), out_width, attention=attends, **kind))
                width = out_width
            self.decoder.append(blocks)
        self.norm_out = _group_norm(width, adm)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """F of a scaled sample.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): c_in times the noisy image.
            timestep (`torch.Tensor` or `float`): c_noise = log(sigma) / 4, one number or one for each sample.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*): Classes. Without them, a class-conditional
                network denoises for no class in particular.
            return_dict (`bool`, defaults to `True`): Whether to return a [`UNet2DOutput`] or a tuple.

        Raises:
            ValueError: If an unconditional network is given classes.
        """
        precision = torch.promote_types(sample.dtype, torch.float32)
        c_noise = torch.as_tensor(timestep, dtype=precision, device=sample.device).expand(len(sample))
        embedding = self._embedding(c_noise, class_labels)
        image = sample.to(self.conv_in.weight.dtype)
        x = self.conv_in(image)
        skips = [x]
        for level, blocks in enumerate(cast(list[nn.ModuleList], self.encoder)):
            if level > 0:
                x = self.downsamplers[level - 1](x, embedding)
                if self.image_downsamplers:
                    x = image = (x + self.image_downsamplers[level - 1](image)) * math.sqrt(0.5)
                skips.append(x)
            for block in blocks:
                x = block(x, embedding)
                skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for level, blocks in enumerate(cast(list[nn.ModuleList], self.decoder)):
            if level > 0:
                x = self.upsamplers[level - 1](x, embedding)
            for block in blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        output = self.conv_out(silu(self.norm_out(x))).to(sample.dtype)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _embedding(self, c_noise: Tensor, class_labels: Tensor | None) -> Tensor:
        """The embedding of noise level and class that all blocks get, of shape `(batch_size, embedding_width)`."""
        first, second = cast(list[nn.Linear], self.noise_layers)
        classes = self._class_embedding(c_noise, class_labels)
        x = self._noise_features(c_noise).to(first.weight.dtype)
        if self.config.architecture == "adm":
            return silu(second(silu(first(x))) + classes)
        return silu(second(silu(first(x + classes))))

    def _noise_features(self, c_noise: Tensor) -> Tensor:
        if self.config.architecture == "ncsn++":
            frequencies = 2 * torch.pi * self.noise_frequencies
        else:
            # The weights were trained with frequencies in float32.
            half = cast(nn.Linear, self.noise_layers[0]).in_features // 2
            positions = torch.arange(half, dtype=torch.float32, device=c_noise.device)
            frequencies = (1 / MAX_PERIOD) ** (positions / (half if self.config.architecture == "adm" else half - 1))
        phases = torch.outer(c_noise, frequencies.to(c_noise.dtype))
        waves = [phases.cos(), phases.sin()] if self.config.architecture == "adm" else [phases.sin(), phases.cos()]
        return torch.cat(waves, dim=1)

    def _class_embedding(self, c_noise: Tensor, class_labels: Tensor | None) -> Tensor | float:
        num_classes = self.config.num_class_embeds
        if num_classes is None:
            if class_labels is not None:
                raise ValueError("`class_labels` were given, but the network is not class-conditional.")
            return 0.0
        if class_labels is None:
            class_labels = c_noise.new_full(c_noise.shape, num_classes, dtype=torch.int64)
        return self.class_embedding(class_labels)


class _Block(nn.Module):
    """A residual block with an embedding of the noise level, optionally with resampling, and attention after it."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        embedding_width: int,
        adm: bool,
        filter_taps: Sequence[int],
        resampling: Literal["up", "down"] | None = None,
        attention: bool = False,
    ):
        super().__init__()
        self.adm = adm
        self.norm1 = _group_norm(in_width, adm)
        self.resample = _Resample(resampling, filter_taps) if resampling else nn.Identity()
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.noise_projection = nn.Linear(embedding_width, 2 * out_width if adm else out_width)
        self.norm2 = _group_norm(out_width, adm)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        projected = in_width != out_width or (resampling is not None and not adm)
        self.shortcut = nn.Conv2d(in_width, out_width, 1) if projected else nn.Identity()
        self.attention = _Attention(out_width, adm) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv1(self.resample(silu(self.norm1(x))))
        noise = self.noise_projection(embedding.to(self.noise_projection.weight.dtype))[:, :, None, None].to(x.dtype)
        if self.adm:
            scale, shift = noise.chunk(2, dim=1)
            y = self.norm2(y) * (1 + scale) + shift
        else:
            y = self.norm2(y + noise)
        x = self._sum(self.shortcut(self.resample(x)), self.conv2(silu(y)))
        return x if self.attention is None else self._sum(x, self.attention(x))

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        # DDPM++ and NCSN++ divide by sqrt(2) to keep the variance.
        return x + y if self.adm else (x + y) * math.sqrt(0.5)


class _Attention(nn.Module):
    """Self-attention over the pixels. Queries of all heads come first, then keys, then values."""

    def __init__(self, width: int, adm: bool):
        super().__init__()
        self.num_heads = width // HEAD_WIDTH if adm else 1
        self.norm = _group_norm(width, adm)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(1, (3, self.num_heads, -1)).flatten(4)
        query, key, value = qkv.transpose(3, 4).unbind(1)
        attended = scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(2, 3).reshape(x.shape))


class _Resample(nn.Module):
    """Halves or doubles height and width with a separable filter."""

    kernel: Tensor

    def __init__(self, direction: Literal["up", "down"], filter_taps: Sequence[int]):
        super().__init__()
        self.direction = direction
        self.padding = len(filter_taps) // 2 - 1
        self.register_buffer("kernel", filter_kernel(filter_taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(width, 1, -1, -1)
        if self.direction == "down":
            return conv2d(x, kernel, stride=2, padding=self.padding, groups=width)
        return conv_transpose2d(x, 4 * kernel, stride=2, padding=self.padding, groups=width)


class _ImageDownsampler(nn.Module):
    """Makes the input image of NCSN++ smaller for the next level: convolution, then filter, with one padding before both."""

    def __init__(self, in_width: int, out_width: int, filter_taps: Sequence[int]):
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, 3)
        self.resample = _Resample("down", filter_taps)
        self.padding, self.resample.padding = 1 + self.resample.padding, 0

    def forward(self, image: Tensor) -> Tensor:
        # The filter's weights add up to 1: the bias may come before it.
        return self.resample(self.conv(pad(image, (self.padding,) * 4)))


def filter_kernel(filter_taps: Sequence[int]) -> Tensor:
    """The separable filter of these taps, of sum 1."""
    taps = torch.tensor(filter_taps, dtype=torch.float32)
    return torch.outer(taps, taps) / taps.sum() ** 2


def _group_norm(width: int, adm: bool) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, width // 4), width, eps=1e-5 if adm else 1e-6)
