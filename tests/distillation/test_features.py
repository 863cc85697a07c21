"""What losses compare, and the Laplacian pyramid."""

import math

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import build

from diffusers_gas import GASScheduler
from diffusers_gas.distillation.features import laplacian_pyramid, make_features
from diffusers_gas.distillation.gauss_newton import Problem, distill_gauss_newton
from diffusers_gas.distillation.losses import Loss
from diffusers_gas.distillation.lpips import LPIPS
from diffusers_gas.pipelines.decoding import StateDecoder
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache


def level_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Sizes of a pyramid's levels for one channel, finest first."""
    shapes = [shape]
    while max(shapes[-1]) > 1:
        shapes.append(tuple(math.ceil(size / 2) for size in shapes[-1]))
    return shapes


class TestPyramid:
    @pytest.mark.parametrize("shape", [(13,), (1,), (8, 8), (5, 12), (3, 4, 6)])
    def test_it_is_linear_and_loses_nothing(self, shape):
        size = math.prod(shape)
        matrix = laplacian_pyramid(torch.eye(size, dtype=torch.float64).view(size, 1, *shape))
        assert matrix.shape[1] == sum(math.prod(level) for level in level_shapes(shape))
        assert torch.linalg.matrix_rank(matrix) == size
        x = torch.randn(2, size, dtype=torch.float64)
        torch.testing.assert_close(laplacian_pyramid(x.view(2, 1, *shape)), x @ matrix)

    def test_channels_do_not_mix(self):
        x = torch.randn(2, 3, 6, 9)
        expected = torch.stack([laplacian_pyramid(x[:, [i]]).square().mean(1) for i in range(3)]).mean(0)
        torch.testing.assert_close(laplacian_pyramid(x).square().mean(1), expected)

    def test_constants_are_in_the_last_level_only(self):
        features = laplacian_pyramid(torch.full((1, 1, 16, 16), 3.0))
        assert features[:, :-1].abs().max() < 1e-5
        assert features.square().mean().item() == pytest.approx(9 / 5)  # the mean over five levels

    def test_ramps_leave_their_level_but_at_the_border(self):
        ramp = torch.arange(17.0).expand(1, 1, 17, 17)
        finest = laplacian_pyramid(ramp)[0, : 17 * 17].view(17, 17)
        assert finest[:, 2:-2].abs().max() < 1e-4 < finest.abs().max()

    def test_levels_count_equally(self):
        """Waves of the same height have about the same norm, however long."""
        position = torch.arange(256, dtype=torch.float64)
        lengths = (4, 8, 16, 32, 64)
        waves = torch.stack([torch.sin(2 * math.pi * position / length + 0.3) for length in lengths])
        norms = laplacian_pyramid(waves[:, None]).square().mean(1)
        assert norms.max() < 2 * norms.min()
        sizes = [math.prod(level) for level in level_shapes((256,))]
        bands = laplacian_pyramid(waves[:, None]).split(sizes, dim=1)
        loudest = torch.stack([band.square().sum(1) for band in bands]).argmax(0)
        assert loudest.tolist() == sorted(set(loudest.tolist()))  # each wave in a level of its own


@pytest.fixture
def weight_file(tmp_path):
    path = tmp_path / "lpips.safetensors"
    save_file({name: weight.clone() for name, weight in LPIPS()._named_weights()}, path)
    return path


def test_states_need_no_features(digits):
    assert make_features("states", digits) is None


@pytest.mark.parametrize("family", ["stable-diffusion", "flux", "wan", "ddpm"])
def test_features_of_pipelines(family, weight_file):
    tiny = build(family)
    states = tiny.to_state(torch.randn(2, *tiny.noise_shape))
    decoder = StateDecoder(tiny.pipe, **tiny.inputs(1))
    expected = {
        "pixels": decoder(states),
        "pyramid": laplacian_pyramid(decoder.latents(states)),
        "lpips": LPIPS.from_pretrained(weight_file, size=16)(decoder(states)),
    }
    for name, features in expected.items():
        made = make_features(name, tiny.pipe, weights=weight_file, size=16, pipeline_inputs=tiny.inputs(1))
        torch.testing.assert_close(made(states), features)
        assert not made(states).requires_grad


def test_unknown_features(digits):
    with pytest.raises(ValueError, match=r"must be one of .*'lpips'.*, got 'ssim'"):
        make_features("ssim", digits)


@pytest.mark.parametrize("name", ["pixels", "lpips", "pyramid"])
def test_latent_pipelines_are_distilled_by_features(name, weight_file, tmp_path):
    tiny = build("stable-diffusion")
    arguments = tiny.inputs(1)
    entry = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    common = {key: value for key, value in arguments.items() if key not in entry}
    inputs = SampleInputs.create(0, 4, [entry], **common)
    samples = TeacherCache(tmp_path, name, GASScheduler.from_config(tiny.pipe.scheduler.config), 12).collect(
        tiny.pipe, inputs, 4, ""
    )
    features = make_features(name, tiny.pipe, weights=weight_file, size=16, pipeline_inputs=arguments)
    start = GASScheduler.from_config(tiny.pipe.scheduler.config, t_start=0.8).theory_solver(3)
    problem = Problem(tiny.pipe, Loss(features=features), 4)
    result = distill_gauss_newton(problem, start, samples, samples, max_iterations=2)
    assert result.history[-1].training_loss < problem.losses(start, samples)[0]
    assert result.distance < result.initial_distance
