"""Relativistic losses with gradient penalties, and states as a discriminator's input."""

import math

import pytest
import torch
from conftest import ROOT
from diffusers import (
    AutoencoderKLHunyuanVideo,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    Kandinsky5T2VPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from safetensors.torch import load_file
from tiny_pipelines import MATRIX, build, random_states

from diffusers_gas.distillation.adversarial import as_grid, discriminator_loss, generator_loss
from diffusers_gas.distillation.discriminator import R3GANDiscriminator
from diffusers_gas.papers.r3gan import convert_state, published_name


@pytest.fixture(scope="module")
def golden():
    return load_file(ROOT / "tests" / "golden" / "r3gan_reference.safetensors")


@pytest.fixture
def discriminator(golden):
    return convert_state(
        {name.removeprefix("state."): tensor for name, tensor in golden.items() if name.startswith("state.")}
    )


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12 * float(expected.abs().max()))


def test_generator_loss_of_the_published_implementation(golden, discriminator):
    fake = golden["fake_input"].clone().requires_grad_()
    with torch.no_grad():
        real_logits = discriminator(golden["input"])
    fake_logits = discriminator(fake)
    loss = generator_loss(fake_logits, real_logits)
    close(fake_logits - real_logits, golden["generator_relativistic_logits"])
    close(loss, golden["generator_loss"])
    loss.mean().backward()
    close(fake.grad, golden["grad_generator.fake_input"])


def test_discriminator_loss_of_the_published_implementation(golden, discriminator):
    result = discriminator_loss(discriminator, golden["input"], golden["fake_input"])
    close(result.real_logits, golden["logits"])
    close(result.fake_logits, golden["fake_logits"])
    close(result.r1, golden["r1"])
    close(result.r2, golden["r2"])
    close(result.loss, golden["discriminator_loss"])
    result.loss.mean().backward()
    gradients = {published_name(name): parameter.grad for name, parameter in discriminator.named_parameters()}
    prefix = "grad_discriminator."
    assert {prefix + name for name in gradients} == {name for name in golden if name.startswith(prefix)}
    for name, gradient in gradients.items():
        close(gradient, golden[prefix + name])

    plain = discriminator_loss(discriminator, golden["input"], golden["fake_input"], r1_weight=0, r2_weight=0)
    close(plain.loss, golden["discriminator_adversarial_loss"])


def test_penalties_of_known_functions():
    real, fake = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    direction = torch.randn(3, 5, dtype=torch.float64)

    linear = discriminator_loss(lambda x: (direction * x).sum(dim=(1, 2)), real, fake)
    torch.testing.assert_close(linear.r1, direction.square().sum().expand(4))
    torch.testing.assert_close(linear.r2, linear.r1)

    quadratic = discriminator_loss(lambda x: 0.5 * x.square().sum(dim=(1, 2)), real, fake, r1_weight=2, r2_weight=3)
    torch.testing.assert_close(quadratic.r1, real.square().sum(dim=(1, 2)))
    torch.testing.assert_close(quadratic.r2, fake.square().sum(dim=(1, 2)))
    margin = quadratic.real_logits - quadratic.fake_logits
    expected = (1 + torch.exp(-margin)).log() + 2 * quadratic.r1 + 3 * quadratic.r2
    torch.testing.assert_close(quadratic.loss, expected)


@pytest.mark.parametrize("size", [(19,), (9, 12), (5, 9, 8)])
def test_gradient_through_the_penalties_is_that_of_finite_differences(size):
    """Along a random direction of all weights, in audio, image and video networks."""
    discriminator = R3GANDiscriminator.for_samples((2, *size), width=8, group_width=4).double()
    parameters = dict(discriminator.named_parameters())
    for parameter in parameters.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    real, fake = torch.randn(2, 3, 2, *size, dtype=torch.float64)
    direction = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def loss(step):
        discriminator.load_state_dict({name: start[name] + step * direction[name] for name in start})
        return discriminator_loss(discriminator, real, fake, r1_weight=0.3, r2_weight=0.7).loss.mean()

    loss(0.0).backward()
    slope = sum((parameter.grad * direction[name]).sum() for name, parameter in parameters.items())
    h = 1e-7
    torch.testing.assert_close(((loss(h) - loss(-h)) / (2 * h)).detach(), slope, rtol=1e-5, atol=1e-8)


def test_penalties_of_weight_zero_are_not_computed():
    seen = []

    def linear(x):
        seen.append(x.requires_grad)
        return x.sum(dim=1)

    real, fake = torch.randn(2, 4, 3)
    for weights, differentiated in (((0, 0), [False, False]), ((0.1, 0), [True, False]), ((0, 0.1), [False, True])):
        seen.clear()
        result = discriminator_loss(linear, real, fake, *weights)
        assert seen == differentiated
        assert [penalty is not None for penalty in (result.r1, result.r2)] == differentiated


def test_nothing_reaches_what_made_the_samples():
    discriminator = R3GANDiscriminator.for_samples((2, 8), width=8)
    real = torch.randn(3, 2, 8)
    student = torch.ones((), requires_grad=True)
    fake = student * torch.randn(3, 2, 8)
    discriminator_loss(discriminator, real, fake).loss.mean().backward()
    assert student.grad is None
    assert not real.requires_grad
    assert fake.requires_grad
    assert discriminator.extraction.weight.grad.any()


def test_losses_of_both_sides_oppose_each_other():
    real, fake = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 3.0, 1.0], requires_grad=True)
    loss = generator_loss(fake, real)
    assert loss[1] < loss[0] < loss[2]
    assert loss[0].item() == pytest.approx(math.log(2))
    (towards_real,) = torch.autograd.grad(loss.sum(), fake)
    (towards_fake,) = torch.autograd.grad(generator_loss(real, fake).sum(), fake)
    assert (towards_real < 0).all()
    assert (towards_fake > 0).all()
    assert generator_loss(torch.tensor([-1e4]), torch.tensor([1e4])).isfinite().all()


def test_unpaired_samples():
    with pytest.raises(ValueError, match=r"\(3,\) real and \(1,\) fake logits"):
        generator_loss(torch.zeros(1), torch.zeros(3))


# Stable Diffusion's states are the same with a LoRA, which needs another package.
@pytest.mark.parametrize("family", [name for name in MATRIX if "lora" not in name])
def test_states_of_pipelines_become_their_unpacked_latents(family):
    """Up to the patches that a packed token has for channels."""
    tiny = build(family)
    states = random_states(tiny, 2)
    sizes = {name: value for name, value in tiny.inputs(2).items() if name in ("height", "width", "num_frames")}
    grid = as_grid(states, tiny.pipe, **sizes)
    if hasattr(tiny.pipe, "_pack_latents"):
        dims = [
            n for n in tiny.noise_shape if n > 1
        ]  # Qwen-Image draws a single frame, which is no dimension of its states
        assert grid.ndim == 1 + len(dims)
        assert torch.equal(grid.flatten(2), states.mT)
    elif family == "cogvideox":
        assert torch.equal(grid, states.transpose(1, 2))
    else:
        assert grid is states


@pytest.fixture(scope="module")
def flux():
    return build("flux").pipe


@pytest.mark.parametrize("rows, columns", [(4, 4), (4, 7), (31, 17)])
def test_packed_images(flux, rows, columns):
    """Neighbours in the picture are neighbours in the grid, and a token's own patch is its channels."""
    image = torch.randn(2, 4, 2 * rows, 2 * columns)
    packed = flux._pack_latents(image, *image.shape)
    patches = image.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    # The sizes that a caller asks for are cut to whole tokens, 16 pixels here.
    for extra in (0, 15):
        assert torch.equal(as_grid(packed, flux, 16 * rows + extra, 16 * columns + extra), patches)
    by_default = as_grid(packed, flux)
    assert torch.equal(by_default, patches if rows == columns else patches.flatten(2))


def test_packed_images_of_another_size_stay_sequences(flux):
    assert as_grid(torch.randn(2, 35, 16), flux, 64, 64).shape == (2, 16, 35)
    with pytest.raises(ValueError, match="both `height` and `width` or none, got 64 and None"):
        as_grid(torch.randn(2, 35, 16), flux, height=64)


def test_packed_videos():
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=1, attention_head_dim=8, cross_attention_dim=8, num_layers=1
    )
    pipe = LTXPipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=transformer)
    video = torch.randn(2, 8, 3, 2, 4)
    packed = pipe._pack_latents(video)
    assert torch.equal(as_grid(packed, pipe, height=70, width=130, num_frames=24), video)
    assert as_grid(packed, pipe).shape == (2, 8, 24)
    video = torch.randn(1, 8, 21, 16, 22)  # the pipeline's own size: 161 frames of 512 x 704
    assert torch.equal(as_grid(pipe._pack_latents(video), pipe), video)


@pytest.mark.parametrize("in_channels, out_channels", [(4, 4), (8, 4), (4, 9)])
def test_frames_before_channels(in_channels, out_channels):
    """Also where the network is given an image's latents beside the state's, or predicts a variance too."""
    transformer = CogVideoXTransformer3DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        num_attention_heads=1,
        attention_head_dim=16,
        num_layers=1,
        text_embed_dim=8,
    )
    pipe = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=None)
    states = torch.randn(2, 3, 4, 6, 7)
    assert torch.equal(as_grid(states, pipe), states.transpose(1, 2))
    # Which dimension has the channels cannot be told: three frames four latents high.
    ambiguous = torch.randn(2, 3, 4, 4, 7)
    assert as_grid(ambiguous, pipe) is ambiguous


def test_channels_last():
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    others = dict.fromkeys(("transformer", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler"))
    states = torch.randn(2, 3, 6, 7, 4)
    assert torch.equal(as_grid(states, Kandinsky5T2VPipeline(vae=vae, **others)), states.permute(0, 4, 1, 2, 3))


@pytest.mark.parametrize("family", ["stable-diffusion", "ddpm-learned-variance"])
def test_sizes_that_could_be_channels_change_nothing(family):
    tiny = build(family)
    channels = tiny.noise_shape[0]
    for other in (channels, tiny.denoiser.config.out_channels):
        states = torch.randn(2, channels, other, 7)
        assert as_grid(states, tiny.pipe) is states


def test_gradients_reach_the_states(flux):
    states = torch.randn(2, 16, 16, requires_grad=True)
    as_grid(states, flux).square().sum().backward()
    assert torch.equal(states.grad, 2 * states)
