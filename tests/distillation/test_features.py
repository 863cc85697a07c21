"""What losses compare."""

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import build

from diffusers_gas import GASScheduler
from diffusers_gas.distillation import lpips
from diffusers_gas.distillation.features import make_features
from diffusers_gas.distillation.gauss_newton import Problem, distill_gauss_newton
from diffusers_gas.distillation.lpips import LINEAR_FILE, LPIPS, VGG16_FILE
from diffusers_gas.least_squares import Loss
from diffusers_gas.pipelines.decoding import StateDecoder
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """Files with random weights, as if they had been downloaded."""
    weights = LPIPS().state_dict()
    save_file({f"{k}.weight": weights.pop(f"channel_weights.{k}") for k in range(5)}, tmp_path / "linear.safetensors")
    save_file(weights, tmp_path / "vgg16.safetensors")
    files = {
        VGG16_FILE["repo_id"]: tmp_path / "vgg16.safetensors",
        LINEAR_FILE["repo_id"]: tmp_path / "linear.safetensors",
    }
    monkeypatch.setattr(lpips, "hf_hub_download", lambda repo_id, **_: files[repo_id])


def test_states_need_no_features(digits):
    assert make_features("states", digits) is None


@pytest.mark.parametrize("family", ["stable-diffusion", "flux", "wan", "ddpm"])
def test_features_of_pipelines(family):
    tiny = build(family)
    states = tiny.to_state(torch.randn(2, *tiny.noise_shape))
    decoder = StateDecoder(tiny.pipe, **tiny.inputs(1))
    expected = {
        "pixels": decoder(states),
        "lpips": LPIPS.from_pretrained(size=16)(decoder(states)),
    }
    for name, features in expected.items():
        made = make_features(name, tiny.pipe, size=16, pipeline_inputs=tiny.inputs(1))
        torch.testing.assert_close(made(states), features)
        assert not made(states).requires_grad


def test_unknown_features(digits):
    with pytest.raises(ValueError, match=r"'ssim' is unknown; choose one of .*lpips"):
        make_features("ssim", digits)


@pytest.mark.parametrize("name", ["pixels", "lpips"])
def test_latent_pipelines_are_distilled_by_features(name, tmp_path):
    tiny = build("stable-diffusion")
    arguments = tiny.inputs(1)
    entry = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    common = {key: value for key, value in arguments.items() if key not in entry}
    inputs = SampleInputs.create(0, 4, [entry], **common)
    samples = TeacherCache(tmp_path, name, GASScheduler.from_config(tiny.pipe.scheduler.config), 6).collect(
        tiny.pipe, inputs, 4, ""
    )
    features = make_features(name, tiny.pipe, size=16, pipeline_inputs=arguments)
    start = GASScheduler.from_config(tiny.pipe.scheduler.config, t_start=0.8).theory_solver(2)
    problem = Problem(tiny.pipe, Loss(features=features), 4)
    history: list = []
    result = distill_gauss_newton(problem, start, samples, samples, max_iterations=2, on_judgement=history.append)
    assert history[-1]["training_loss"] < problem.losses(start, samples)[0]
    assert result.distance < result.initial_distance
