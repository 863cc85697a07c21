"""The R3GAN discriminator for samples of any size. tests/papers/test_r3gan.py compares it with the published one."""

import itertools
import math

import pytest
import torch
from torch import nn

from diffusers_gas.distillation.discriminator import R3GANDiscriminator, stage_sizes


SIZES = [(16,), (37,), (16, 16), (7, 13), (1, 33), (8, 8, 8), (7, 13, 60), (5, 16, 9), (1, 8, 8)]


def randomised(discriminator):
    """The discriminator with all weights and biases at work, in float64."""
    for name, parameter in discriminator.double().named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
        elif "conv3" in name:
            nn.init.normal_(parameter, std=0.5 / parameter.shape[1] ** 0.5)
    return discriminator


def small(*shape):
    return randomised(R3GANDiscriminator.for_samples(shape, width=8, group_width=4))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_published_sizes_end_on_four_by_four(num_stages):
    sizes = stage_sizes((4 * 2 ** (num_stages - 1),) * 2)
    assert len(sizes) == num_stages
    assert sizes[-1] == (4, 4)


@pytest.mark.parametrize("size", SIZES)
def test_maps_have_the_sizes_of_the_stages(size):
    discriminator = small(3, *size)
    maps = []
    for stage in discriminator.stages:
        stage.register_forward_pre_hook(lambda stage, inputs: maps.append(tuple(inputs[0].shape[2:])))
    logits = discriminator(torch.randn(2, 3, *size, dtype=torch.float64))
    assert logits.shape == (2,)
    assert maps == stage_sizes(size)
    assert max(maps[-1]) < 8
    for before, after in itertools.pairwise(maps):
        assert all(b == a // 2 if a >= 8 else b == a for a, b in zip(before, after))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sample_value_and_every_weight_counts(size, dtype):
    """Of the logits and, through double backward, of their gradients' norm: no pixel is cut off, no layer is idle."""
    discriminator = small(3, *size).to(dtype)
    samples = torch.randn(2, 3, *size, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(samples).sum(), samples, create_graph=True)
    # An odd size's last entry reaches the next map through the filter's outer tap.
    assert (gradient != 0).flatten(1).double().mean() == 1
    gradient.square().sum().backward()
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any() or name.endswith("bias")  # piecewise linear: biases only choose the piece


@pytest.mark.parametrize("size", [(21,), (9, 17), (5, 9, 4)])
def test_a_logit_depends_on_its_own_sample_only(size):
    discriminator = small(2, *size)
    samples = torch.randn(3, 2, *size, dtype=torch.float64)
    logits = discriminator(samples)
    torch.testing.assert_close(logits, torch.cat([discriminator(sample[None]) for sample in samples]))
    jacobian = torch.autograd.functional.jacobian(discriminator, samples).flatten(2).abs().sum(2)
    assert torch.equal(jacobian != 0, torch.eye(3, dtype=torch.bool))


def test_video_network_without_mixing_of_frames_is_the_mean_of_the_image_network():
    image, frames = small(3, 19, 16), 5
    video = small(3, frames, 19, 16)
    weights = {}
    for name, weight in image.state_dict().items():
        if weight.ndim == 4:
            weight = weight.unsqueeze(2)
            if "conv2" in name:
                weight = nn.functional.pad(weight, (0, 0, 0, 0, 1, 1))
            if "basis" in name:
                weight = weight.expand(-1, -1, frames, -1, -1) / frames
        weights[name] = weight
    video.load_state_dict(weights)
    samples = torch.randn(2, 3, frames, 19, 16, dtype=torch.float64)
    torch.testing.assert_close(video(samples), torch.stack([image(s) for s in samples.unbind(2)]).mean(0))


def test_dimensions_are_treated_alike():
    """Transposed weights give the same logits for transposed samples, also where one dimension is halved longer."""
    wide, tall = small(3, 9, 40), small(3, 40, 9)
    tall.load_state_dict({name: w.mT if w.ndim == 4 else w for name, w in wide.state_dict().items()})
    samples = torch.randn(2, 3, 9, 40, dtype=torch.float64)
    torch.testing.assert_close(tall(samples.mT), wide(samples))


@pytest.mark.parametrize("size", [(64,), (16, 16), (8, 9, 10)])
def test_downsampling_keeps_constants_away_from_the_border(size):
    downsampling = small(2, *size).stages[0][-1]
    assert torch.equal(downsampling.kernel.sum(), torch.tensor(1.0, dtype=torch.float64))
    filtered = downsampling(torch.ones(1, 8, *size, dtype=torch.float64))
    interior = filtered[(..., *(slice(1, -1) for _ in size))]
    torch.testing.assert_close(interior, torch.ones_like(interior))


def test_initialisation():
    discriminator = R3GANDiscriminator(
        in_channels=64,
        sample_size=(9, 21, 8),
        widths=[256, 192, 128],
        cardinalities=[32, 12, 16],
        blocks_per_stage=[1, 3, 2],
    )
    gain = math.sqrt(2 / 1.04) * 6**-0.25
    checked = 0
    for name, parameter in discriminator.named_parameters():
        if name.endswith("bias") or "conv3" in name:
            assert not parameter.any(), name
            continue
        fan_in = parameter[0].numel()  # inputs of one output: channels of its group times kernel area
        expected = (gain if "conv" in name else 1) / math.sqrt(fan_in)
        uncertainty = 1 / math.sqrt(parameter.numel())
        assert parameter.std().item() == pytest.approx(expected, rel=4 * uncertainty), name
        assert abs(parameter.mean()) < 5 * expected * uncertainty, name
        checked += 1
    assert checked == 1 + 6 * 2 + 2 + 2


def test_residual_blocks_start_as_the_identity():
    block = R3GANDiscriminator.for_samples((3, 8)).stages[0][0]
    x = torch.randn(2, 128, 8)
    assert torch.equal(block(x), x)


def test_for_samples():
    config = R3GANDiscriminator.for_samples((16, 5, 30, 52)).config
    assert (config.in_channels, config.sample_size) == (16, [5, 30, 52])
    assert config.widths == [128] * 4
    assert config.cardinalities == [16] * 4
    with torch.device("meta"):
        cifar = R3GANDiscriminator.for_samples((3, 32, 32), width=768, blocks_per_stage=2).config
    assert (cifar.widths, cifar.cardinalities, cifar.blocks_per_stage) == ([768] * 4, [96] * 4, [2] * 4)


@pytest.mark.parametrize("shape", [(4, 40), (3, 16, 12), (2, 3, 9, 8)])
def test_save_and_load(shape, tmp_path):
    discriminator = small(*shape).float()
    discriminator.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = R3GANDiscriminator.from_pretrained(tmp_path)
    assert dict(loaded.config).keys() >= {"widths", "sample_size"}
    samples = torch.randn(2, *shape)
    assert torch.equal(loaded(samples), discriminator(samples))
    assert loaded.state_dict().keys() == {name for name, _ in discriminator.named_parameters()}


def test_errors():
    with pytest.raises(ValueError, match=r"1, 2 or 3 positive sizes, got \(\)"):
        R3GANDiscriminator.for_samples((3,))
    with pytest.raises(ValueError, match=r"1, 2 or 3 positive sizes, got \(4, 4, 4, 4\)"):
        R3GANDiscriminator.for_samples((3, 4, 4, 4, 4))
    with pytest.raises(ValueError, match=r"1, 2 or 3 positive sizes, got \(0, 4\)"):
        R3GANDiscriminator.for_samples((3, 0, 4))
    with pytest.raises(ValueError, match=r"multiple of `group_width`, got 2 \* 12 and 16"):
        R3GANDiscriminator.for_samples((3, 8, 8), width=12)
    with pytest.raises(ValueError, match="`kernel_size` must be odd, got 4"):
        R3GANDiscriminator(3, (8, 8), widths=[8, 8], cardinalities=[4, 4], blocks_per_stage=[1, 1], kernel_size=4)
    with pytest.raises(ValueError, match=r"have 2 stages, .*`cardinalities` must have as many entries, got \[4\]"):
        R3GANDiscriminator(3, (8, 8), widths=[8, 8], cardinalities=[4], blocks_per_stage=[1, 1])
    with pytest.raises(ValueError, match="divisible by groups"):
        R3GANDiscriminator(3, (8, 8), widths=[8, 8], cardinalities=[4, 3], blocks_per_stage=[1, 1])
    with pytest.raises(ValueError, match=r"samples of shape \(3, 8, 8\), got \(3, 8, 9\)"):
        small(3, 8, 8)(torch.zeros(1, 3, 8, 9))
