"""Feature extractors by name: the shipped classifier, TorchScript files, and refusals."""

import sys

import pytest
import torch
from conftest import TEACHER
from torch import nn

from diffusers_gas.papers.evaluation.classifier import SmallClassifier
from diffusers_gas.papers.evaluation.feature_extractors import load_feature_extractor, rgb_bytes


class ChannelMeans(nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        means = images.float().mean(dim=[2, 3])
        return means if return_features else means.argmax(1)


class Doubled(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * images.float().flatten(1)


def save_script(module: nn.Module, path) -> str:
    torch.jit.script(module).save(str(path))
    return str(path)


def test_classifier_folder():
    extract = load_feature_extractor(TEACHER / "classifier")
    images = torch.rand(5, 1, 8, 8)
    features = extract(images)
    assert not features.requires_grad
    classifier = SmallClassifier.from_pretrained(TEACHER / "classifier")
    torch.testing.assert_close(features, classifier.features(images), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript(tmp_path):
    images = torch.rand(4, 1, 6, 6)
    path = save_script(ChannelMeans(), tmp_path / "means.pt")
    features = load_feature_extractor(path, trust_torchscript=True)(images)
    torch.testing.assert_close(features, rgb_bytes(images).float().mean((2, 3)))
    path = save_script(Doubled(), tmp_path / "doubled.pt")
    features = load_feature_extractor(path, trust_torchscript=True)(images)
    torch.testing.assert_close(features, 2 * rgb_bytes(images).float().flatten(1))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_must_be_trusted(tmp_path):
    path = save_script(Doubled(), tmp_path / "doubled.pt")
    with pytest.raises(ValueError, match="--trust_torchscript"):
        load_feature_extractor(path)
    with pytest.raises(ValueError, match=r"missing\.pt is not a TorchScript file"):
        load_feature_extractor(tmp_path / "missing.pt", trust_torchscript=True)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt is not a TorchScript file"):
        load_feature_extractor(tmp_path / "weights.pt", trust_torchscript=True)


def test_inception_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        load_feature_extractor("inception")


def test_unknown_name(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for name in ("best", tmp_path):
        with pytest.raises(ValueError, match="is not a feature extractor: it must be 'inception'"):
            load_feature_extractor(name)


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.rand(2, 4, 8, 8), r"got \(2, 4, 8, 8\)"),
        (torch.rand(8, 8), r"got \(8, 8\)"),
        (torch.rand(2, 1, 8, 8) * 2 - 1, r"\[-1, 1\] there by x / 2 \+ 0.5"),
        (torch.full((2, 1, 8, 8), float("nan")), r"in \[0, 1\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "floating-point"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        load_feature_extractor(TEACHER / "classifier")(images)
