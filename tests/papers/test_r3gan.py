"""R3GAN's published discriminators: against the authors' implementation, and damaged ones."""

import json

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open

from diffusers_gas.distillation.discriminator import R3GANDiscriminator
from diffusers_gas.papers.r3gan import convert_state


LAST = "MainLayers.2.Layers.2.LinearLayer.weight"


@pytest.fixture(scope="module")
def golden():
    with safe_open(ROOT / "tests" / "golden" / "r3gan_reference.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return json.loads(file.metadata()["config"]), tensors


@pytest.fixture
def published(golden):
    """The published module's state: a new mapping for each test."""
    return {name.removeprefix("state."): tensor for name, tensor in golden[1].items() if name.startswith("state.")}


def test_logits_of_the_published_network(golden, published):
    tensors = golden[1]
    discriminator = convert_state(published)
    for samples, logits in (("input", "logits"), ("fake_input", "fake_logits")):
        torch.testing.assert_close(discriminator(tensors[samples]), tensors[logits], rtol=1e-12, atol=1e-13)
    float32 = convert_state({name: tensor.float() for name, tensor in published.items()})
    assert float32.dtype == torch.float32
    torch.testing.assert_close(float32(tensors["input"].float()), tensors["logits_float32"], rtol=1e-4, atol=1e-5)


def test_configuration_is_inferred_from_the_shapes(golden, published):
    expected, config = golden[0], convert_state(published).config
    assert config.widths == expected["WidthPerStage"]
    assert config.cardinalities == expected["CardinalityPerStage"]
    assert config.blocks_per_stage == expected["BlocksPerStage"]
    assert config.expansion_factor == expected["ExpansionFactor"]
    assert config.kernel_size == expected["KernelSize"]
    assert config.in_channels == expected["input_channels"]
    assert tuple(config.sample_size) == (expected["input_size"],) * 2


def test_prefixed_names_are_the_same_network(golden, published):
    prefixed = convert_state({f"Model.{name}": tensor for name, tensor in published.items()})
    assert torch.equal(prefixed(golden[1]["input"]), convert_state(published)(golden[1]["input"]))


def test_equal_widths_need_no_projection():
    """A published state without 1x1 convolutions after the downsampling: two stages of one width."""
    own = R3GANDiscriminator.for_samples((3, 8, 8), width=8, group_width=4).double()
    for parameter in own.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    kernel = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    state = {
        "ExtractionLayer.Layer.weight": own.extraction.weight,
        "MainLayers.0.Layers.1.Resampler.Kernel": torch.outer(kernel, kernel),
        "MainLayers.1.Layers.1.Basis.weight": own.stages[1][1].basis.weight,
        "MainLayers.1.Layers.1.LinearLayer.weight": own.stages[1][1].linear.weight,
    }
    for s in range(2):
        block = own.stages[s][0]
        for i, convolution in enumerate((block.conv1, block.conv2, block.conv3), start=1):
            state[f"MainLayers.{s}.Layers.0.LinearLayer{i}.Layer.weight"] = convolution.weight
        for i, convolution in enumerate((block.conv1, block.conv2), start=1):
            state[f"MainLayers.{s}.Layers.0.NonLinearity{i}.Bias"] = convolution.bias
    samples = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(convert_state(state)(samples), own(samples))


def test_conditional_network(golden, published):
    """The published logit is the dot product of the last layer's outputs and the class's embedding."""
    samples, num_features, num_classes = golden[1]["input"], 5, 3
    last = torch.randn(num_features, published[LAST].shape[1], dtype=torch.float64)
    embedding = torch.randn(num_features, num_classes, dtype=torch.float64)
    features = torch.stack([convert_state({**published, LAST: row[None]})(samples) for row in last], dim=1)
    by_class = features @ embedding
    conditional = {**published, LAST: last, "EmbeddingLayer.weight": embedding}
    torch.testing.assert_close(convert_state(conditional)(samples), by_class.mean(dim=1))
    assert conditional.keys() == {*published, "EmbeddingLayer.weight"}

    with pytest.raises(ValueError, match=r"EmbeddingLayer.weight' should be a matrix .*got shape \(4, 3\)"):
        convert_state({**conditional, "EmbeddingLayer.weight": embedding[:4]})


@pytest.mark.parametrize("part", ["ExtractionLayer", "LinearLayer2", "NonLinearity1", "Kernel", "Basis", LAST])
def test_missing_and_misshapen_tensors_are_named(published, part):
    for name in [name for name in published if part in name]:
        without = {other: tensor for other, tensor in published.items() if other != name}
        with pytest.raises(ValueError, match=f"missing tensors .*{name}"):
            convert_state(without)
        with pytest.raises(ValueError, match=f"'{name}' should|divisible by groups|must be odd"):
            convert_state({**published, name: published[name].repeat_interleave(3, dim=-1)[..., 1:]})


def test_every_block_of_a_stage_is_required(published):
    name = "MainLayers.2.Layers.1.LinearLayer1.Layer.weight"
    del published[name]
    with pytest.raises(ValueError, match=f"missing tensors .*{name}"):
        convert_state(published)


def test_foreign_tensors_are_named(published):
    with pytest.raises(ValueError, match=r"unexpected tensors .*Surprise"):
        convert_state({**published, "Surprise.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="missing tensors"):
        convert_state({})
    with pytest.raises(ValueError, match="should be the weight of a 2-D convolution"):
        convert_state({**published, "ExtractionLayer.Layer.weight": torch.ones(16, 3)})


def test_another_resampling_filter_is_refused(published):
    name = "MainLayers.1.Layers.1.Resampler.Kernel"
    with pytest.raises(ValueError, match=f"'{name}' should be the outer product"):
        convert_state({**published, name: torch.full((4, 4), 1 / 16)})


def test_published_weights_are_saved_and_loaded(golden, published, tmp_path):
    discriminator = convert_state(published)
    discriminator.save_pretrained(tmp_path)
    loaded = R3GANDiscriminator.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert torch.equal(loaded(golden[1]["input"]), discriminator(golden[1]["input"]))
