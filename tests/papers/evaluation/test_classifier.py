"""The shipped classifier of digits: what it recognises, at which sizes and in which colours."""

import sys

import pytest
import torch
from conftest import ROOT, TEACHER

from diffusers_gas.papers.evaluation.feature_extractors import SmallClassifier


sys.path.insert(0, str(TEACHER))

from train_classifier import distort, split_digits


@pytest.fixture(scope="module")
def classifier() -> SmallClassifier:
    return SmallClassifier.from_pretrained(TEACHER / "classifier")


def test_accuracy_on_held_out_digits(classifier):
    _, images, _, labels = split_digits()
    assert classifier.accuracy(images, labels) >= 0.97
    assert classifier.accuracy(distort(images), labels) >= 0.97
    assert classifier.accuracy(images, (labels + 1) % 10) < 0.01


def test_size_and_colour_do_not_matter(classifier):
    images = split_digits()[1][:50]
    expected = classifier.features(images)
    assert expected.shape == (50, classifier.config.num_features)
    large = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    painted = large * torch.tensor([0.2, 1.0, 0.3]).view(1, 3, 1, 1)
    for same in (large, painted):
        torch.testing.assert_close(classifier.features(same), expected, rtol=1e-4, atol=1e-4)


def test_forward_is_a_linear_map_of_the_features(classifier):
    images = split_digits()[1][:20]
    hidden = torch.nn.functional.silu(classifier.features(images))
    torch.testing.assert_close(classifier(images), hidden @ classifier.head.weight.T + classifier.head.bias)


def test_save_and_load(tmp_path):
    model = SmallClassifier(sample_size=5, channels=(2, 3), num_features=4, num_classes=2).eval()
    model.save_pretrained(tmp_path)
    loaded = SmallClassifier.from_pretrained(tmp_path)
    images = torch.rand(3, 3, 9, 9)
    assert loaded(images).shape == (3, 2)
    assert torch.equal(loaded(images), model(images))


def test_colours_matter_with_three_input_channels(tmp_path):
    model = SmallClassifier(sample_size=9, channels=(2, 3, 4, 5), num_features=4, num_classes=2, in_channels=3).eval()
    images = torch.rand(3, 3, 9, 9)
    assert model(images).shape == (3, 2)
    assert not torch.allclose(model(images), model(images.flip(1)))
    model.save_pretrained(tmp_path)
    assert torch.equal(SmallClassifier.from_pretrained(tmp_path)(images), model(images))


def test_shipped_weights_are_small():
    weights = ROOT / "examples/teachers/digits/classifier/diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 200_000


def test_labels_must_match(classifier):
    with pytest.raises(ValueError, match="2 images need as many labels, got 3"):
        classifier.accuracy(torch.rand(2, 1, 8, 8), torch.zeros(3))
