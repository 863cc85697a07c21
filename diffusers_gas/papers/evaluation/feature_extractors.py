"""Networks whose features a Frechet distance compares: the published one by name, and a small classifier for drawings."""

import json
import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


FeatureExtractor = Callable[[Tensor], Tensor]


def load_feature_extractor(name: str | os.PathLike, device: str | torch.device = "cpu") -> FeatureExtractor:
    """A function of images of shape `(batch_size, 1 or 3, height, width)` in [0, 1] to features.

    The features are float32 of shape `(batch_size, num_features)` on the CPU.

    Args:
        name: One of
            - `inception`: the Inception network of published Frechet inception distances, from the package torch-fidelity,
              which downloads its weights;
            - a folder with a [`SmallClassifier`].

    Raises:
        ValueError: If there is no such extractor, or if a package that it needs is missing.
    """
    name = os.fspath(name)
    if name == "inception":
        features = _inception(device)
    elif _class_name(Path(name)) == SmallClassifier.__name__:
        features = SmallClassifier.from_pretrained(name).to(device).features
    else:
        raise ValueError(
            f"{name} is not a feature extractor: it must be 'inception' or a folder with a {SmallClassifier.__name__}."
        )

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        return features(images).float().cpu()

    return extract


def _inception(device: str | torch.device) -> FeatureExtractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(
            f"The feature extractor 'inception' needs a package that is not installed ({error}): pip install torch-fidelity."
        ) from error
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    # It takes 8-bit RGB images, as a file would have them.
    return lambda images: network((images * 255).round().to(device, torch.uint8).expand(-1, 3, -1, -1))[0]


def _class_name(folder: Path) -> str | None:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("_class_name") if path.is_file() else None


class SmallClassifier(ModelMixin, ConfigMixin):
    """Convolutions, a feature layer and a linear classifier, for drawings such as digits.

    Images of any size are averaged to `sample_size`. With one input channel the largest of the colour channels is taken at each
    pixel, so that drawings in different colours on black look the same.

    Args:
        sample_size: Height and width of the averaged images.
        channels: Output channels of the convolutions. All but the first halve the size.
        num_features: Width of the layer before the last.
        num_classes: Number of classes.
        in_channels: 1, or 3 for classes that differ in colour.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        channels: tuple[int, ...] = (16, 32),
        num_features: int = 32,
        num_classes: int = 10,
        in_channels: int = 1,
    ):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels[0], 3, padding=1), nn.SiLU()]
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        size = math.ceil(sample_size / 2 ** (len(channels) - 1))
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * size**2, num_features))
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """The layer before the last, before its nonlinearity, of shape `(batch_size, num_features)`.

        Args:
            images (`Tensor` of shape `(batch_size, channels, height, width)`): In [0, 1].
        """
        drawings = images.amax(1, keepdim=True) if self.config.in_channels == 1 else images
        drawings = drawings.to(self.device, self.dtype)
        drawings = nn.functional.interpolate(drawings, (self.config.sample_size, self.config.sample_size), mode="area")
        return self.body(drawings * 2 - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape `(batch_size, num_classes)`, for images as in `features`."""
        return self.logits(self.features(images))

    def logits(self, features: Tensor) -> Tensor:
        """Logits of shape `(batch_size, num_classes)`, for what `features` returns."""
        return self.head(nn.functional.silu(features.to(self.device, self.dtype)))

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images, as in `features`, whose class is their label. Labels have shape `(batch_size,)`."""
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images need as many labels, got {len(labels)}.")
        return (self(images).argmax(1) == labels.to(self.device)).double().mean().item()
