"""Networks whose features a Frechet distance compares, loaded by name. Their packages are imported when they are used."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .classifier import SmallClassifier


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
