"""Feature extractors by name: the shipped classifier, and refusals."""

import sys

import pytest
import torch
from conftest import TEACHER

from diffusers_gas.papers.evaluation.feature_extractors import SmallClassifier, load_feature_extractor


def test_classifier_folder():
    extract = load_feature_extractor(TEACHER / "classifier")
    images = torch.rand(5, 1, 8, 8)
    features = extract(images)
    assert not features.requires_grad
    classifier = SmallClassifier.from_pretrained(TEACHER / "classifier")
    torch.testing.assert_close(features, classifier.features(images), rtol=0, atol=0)


def test_inception_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        load_feature_extractor("inception")


def test_unknown_name(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for name in ("best", tmp_path):
        with pytest.raises(ValueError, match="is not a feature extractor: it must be 'inception'"):
            load_feature_extractor(name)
