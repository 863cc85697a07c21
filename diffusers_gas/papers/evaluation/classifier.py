"""A small convolutional classifier, which is saved and loaded like the models of Diffusers."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class SmallClassifier(ModelMixin, ConfigMixin):
    """Two convolutions, a feature layer and a linear classifier, for drawings on black such as digits.

    Images of any size are averaged to `sample_size`. The largest of the colour channels is taken at each pixel, so that drawings
    in different colours look the same.

    Args:
        sample_size: Height and width of the averaged images.
        channels: Output channels of the two convolutions.
        num_features: Width of the layer before the last.
    """

    @register_to_config
    def __init__(
        self, sample_size: int = 8, channels: tuple[int, int] = (16, 32), num_features: int = 32, num_classes: int = 10
    ):
        super().__init__()
        first, second = channels
        self.body = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(second * ((sample_size + 1) // 2) ** 2, num_features),
        )
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """The layer before the last, before its nonlinearity, of shape `(batch_size, num_features)`.

        Args:
            images (`Tensor` of shape `(batch_size, channels, height, width)`): In [0, 1].
        """
        drawings = images.amax(1, keepdim=True).to(self.device, self.dtype)
        drawings = nn.functional.interpolate(drawings, (self.config.sample_size, self.config.sample_size), mode="area")
        return self.body(drawings * 2 - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape `(batch_size, num_classes)`, for images as in `features`."""
        return self.head(nn.functional.silu(self.features(images)))

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images, as in `features`, whose class is their label. Labels have shape `(batch_size,)`."""
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images need as many labels, got {len(labels)}.")
        return (self(images).argmax(1) == labels.to(self.device)).double().mean().item()
