"""Decoding states as the pipelines themselves do, with gradients."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipelines import FAMILIES, TinyPipeline, build, generators
from torch import Tensor, nn

from diffusers_gas import GASScheduler
from diffusers_gas.pipelines.decoding import StateDecoder, _by_sample
from diffusers_gas.pipelines.driving import quiet_sampling, sample_latents


def states_and_images(tiny: TinyPipeline) -> tuple[Tensor, Tensor]:
    """Final states of two samples and what the pipeline shows, with channels first."""
    scheduler = GASScheduler.from_config(tiny.pipe.scheduler.config)
    _, final = sample_latents(tiny.pipe, scheduler, 4, **tiny.inputs(2), generator=generators(2))
    with quiet_sampling(tiny.pipe, scheduler):
        output = tiny.pipe(**tiny.inputs(2), generator=generators(2), num_inference_steps=4, output_type="np")
    images = output.frames if hasattr(output, "frames") else output.images
    return final[:2], torch.from_numpy(np.moveaxis(images, -1, 1))


def weights(tiny: TinyPipeline) -> list[nn.Parameter]:
    networks = [component for component in tiny.pipe.components.values() if isinstance(component, nn.Module)]
    return [weight for network in networks for weight in network.parameters()]


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "stable-diffusion-inpaint"])
def test_images_are_the_pipelines_own(family):
    tiny = build(family)
    states, expected = states_and_images(tiny)
    images = StateDecoder(tiny.pipe, **tiny.inputs(1))(states)
    assert expected.std() > 0.01
    torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["stable-diffusion", "flux", "wan", "dit", "ldm", "ddpm"])
def test_gradients_reach_the_states_and_no_weights(family):
    tiny = build(family)
    decoder = StateDecoder(tiny.pipe, **tiny.inputs(1))
    states = states_and_images(tiny)[0].requires_grad_()
    decoder(states).square().sum().backward()
    assert (states.grad.flatten(1) != 0).float().mean() > 0.99
    assert all(weight.requires_grad and weight.grad is None for weight in weights(tiny))
    assert not decoder(states.detach()).requires_grad


@pytest.mark.parametrize("family", ["stable-diffusion", "flux"])
def test_gradients_are_finite_differences(family):
    tiny = build(family, torch.float64)
    decoder = StateDecoder(tiny.pipe, **tiny.inputs(1))
    states = torch.randn_like(states_and_images(tiny)[0], dtype=torch.float64).requires_grad_()
    direction, weight = torch.randn_like(states), torch.randn_like(decoder(states))
    (gradient,) = torch.autograd.grad((weight * decoder(states)).sum(), states)
    ahead, behind = ((weight * decoder(states + size * direction)).sum() for size in (1e-6, -1e-6))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind).item() / 2e-6, rel=1e-5)


def test_packed_states_are_unpacked_for_features_of_latents():
    tiny = build("flux")
    noise = torch.randn(2, *tiny.noise_shape)
    config = tiny.pipe.vae.config
    latents = StateDecoder(tiny.pipe, **tiny.inputs(1)).latents(tiny.to_state(noise))
    torch.testing.assert_close(latents, noise / config.scaling_factor + config.shift_factor)


def test_frames_decoded_as_a_batch_are_videos_again():
    videos = torch.randn(2, 3, 4, 8, 8)
    frames = videos.transpose(1, 2).flatten(0, 1)
    assert torch.equal(_by_sample(frames, 2), videos)
    assert torch.equal(_by_sample(frames, 8), frames)


def test_pixels_are_images_already(digits):
    states = torch.randn(2, 1, 8, 8)
    decoder = StateDecoder(digits)
    assert decoder(states) is decoder.latents(states) is states


@pytest.mark.filterwarnings("ignore:.*upcast_vae.*:FutureWarning")
def test_the_pipeline_is_left_as_it_was():
    tiny = build("stable-diffusion-xl", torch.float16)  # decodes in float32
    scheduler = tiny.pipe.scheduler
    decoder = StateDecoder(tiny.pipe, **tiny.inputs(1))
    states = torch.randn(2, *tiny.noise_shape, requires_grad=True)
    images = decoder(states)
    images.sum().backward()
    assert images.dtype == torch.float32 and states.grad.isfinite().all()
    assert {weight.dtype for weight in weights(tiny)} == {torch.float16}
    assert tiny.pipe.scheduler is scheduler and "decode" not in vars(tiny.pipe.vae)
    states_and_images(tiny)


def test_what_is_not_a_function_of_the_state_is_refused():
    tiny = build("stable-diffusion-inpaint")
    with pytest.raises(ValueError, match="does not hand its whole final state to its decoder"):
        StateDecoder(tiny.pipe, **tiny.inputs(1))


def test_a_pipeline_that_does_not_decode():
    tiny = build("stable-diffusion")
    with pytest.raises(ValueError, match="does not decode its final state with these arguments"):
        StateDecoder(tiny.pipe, **tiny.inputs(1), output_type="latent")


def test_a_pipeline_without_its_autoencoder():
    tiny = build("stable-diffusion")
    tiny.pipe.vae = None
    with pytest.raises(ValueError, match=r"loaded without its \['vae'\]"):
        StateDecoder(tiny.pipe, **tiny.inputs(1))


def test_missing_arguments_are_reported_as_the_pipeline_does():
    with pytest.raises(ValueError, match="prompt_embeds"):
        StateDecoder(build("stable-diffusion").pipe)


def test_states_of_another_size():
    tiny = build("stable-diffusion")
    decoder = StateDecoder(tiny.pipe, **tiny.inputs(1))
    with pytest.raises(ValueError, match=r"shape \(4, 4, 8\) cannot be decoded: .* \(4, 8, 8\)"):
        decoder(torch.randn(2, 4, 4, 8))


def test_nonlinear_maps_are_refused(monkeypatch):
    tiny = build("stable-diffusion")

    class Squashing(StableDiffusionPipeline):
        @torch.no_grad()
        def __call__(self, **inputs):
            latents = StableDiffusionPipeline.__call__.__wrapped__(self, **inputs, output_type="latent").images
            return self.vae.decode(latents.tanh())

    tiny.pipe.__class__ = Squashing
    with pytest.raises(ValueError, match="Squashing does not hand its whole final state"):
        StateDecoder(tiny.pipe, **tiny.inputs(1))
