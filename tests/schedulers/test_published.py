"""Published solvers by name sample as their authors' rules say, written here from the papers, and as any other solver otherwise."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from saved_schedulers import load_sampler
from tiny_pipelines import build, final_state
from torch import Tensor

from diffusers_gas import GASScheduler
from diffusers_gas.commands.list_published import main
from diffusers_gas.schedulers.published import FOLDER, published_solvers


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15, SDXL = PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1), EulerDiscreteScheduler(**SD)
SD3 = FlowMatchEulerDiscreteScheduler(shift=3.0)
FLUX = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
PIXART = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, solver_order=3)
WAN = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
SVD = EulerDiscreteScheduler(
    timestep_type="continuous", prediction_type="v_prediction", sigma_max=700, sigma_min=0.002
)

# The lists on the project page of Align Your Steps. Its rule interpolates their logarithms.
ALIGN_YOUR_STEPS = {
    "ays-sd15": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    "ays-sdxl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
}


def network(x: Tensor, timestep: float) -> Tensor:
    return torch.sin(1.3 * x + timestep / 300) + 0.2 * x.flip(-1)


def by_align_your_steps(levels: list[float], n: int, x: Tensor) -> Tensor:
    """DPM-Solver++ 2M with a first step and a last step of first order, in y = x / alpha, so that lambda = -log sigma."""
    places = np.linspace(0, 10, n + 1)
    log_levels = np.interp(places, np.arange(11), np.log(levels))
    betas = np.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000) ** 2
    log_alpha_bar = np.cumsum(np.log(1 - betas))
    log_sigma = 0.5 * np.log(np.expm1(-log_alpha_bar))
    log_levels = np.clip(log_levels, log_sigma[0], log_sigma[-1])  # the ends are those of the network, rounded
    log_levels[-1] = log_sigma[0]
    alphas = 1 / np.sqrt(1 + np.exp(2 * log_levels))
    timesteps = np.interp(-np.log(alphas), -log_alpha_bar / 2, np.arange(1000))
    y, previous = x / alphas[0], None
    for k in range(n):
        sigma, h = np.exp(log_levels[k]), log_levels[k] - log_levels[k + 1]
        data = y - sigma * network(alphas[k] * y, timesteps[k])
        used = data
        if 0 < k < n - 1:
            ratio = (log_levels[k - 1] - log_levels[k]) / h
            used = (1 + 1 / (2 * ratio)) * data - 1 / (2 * ratio) * previous
        y = np.exp(-h) * y - np.expm1(-h) * used
        previous = data
    return alphas[-1] * y


def figures(name: str, n: int) -> dict[str, Any]:
    content = json.loads((FOLDER / "neural_solver.json").read_text(encoding="utf-8"))
    return content["solvers"][name]["tables"][str(n)]


def by_neural_solver(name: str, n: int, x: Tensor) -> Tensor:
    """Equations of arXiv 2505.21114: past outputs have given weights, the newest what is left to 1."""
    table, past = figures(name, n), []
    flow = name != "neuralsolver-dit"
    time = 1.0 if flow else 0.999
    for delta, weights in zip(table["deltas"], table["coefficients"]):
        if flow:
            past.append(network(x, 1000 * time))
        else:
            (alpha, sigma), (alpha_next, sigma_next) = beta_linear(time), beta_linear(time - delta)
            past.append((x - sigma * network(x, int(1000 * time + 1e-3))) / alpha)
        mixed = sum(w * output for w, output in zip(weights, past)) + (1 - sum(weights)) * past[-1]
        if flow:
            x = x - delta * mixed
        else:
            x = sigma_next / sigma * x + sigma_next * (alpha_next / sigma_next - alpha / sigma) * mixed
        time -= delta
    return x


def beta_linear(t: float) -> tuple[float, float]:
    """alpha and sigma of the authors' variance-preserving process, beta from 0.1 to 20."""
    t = max(t, 1e-3)
    log_alpha_bar = -(0.1 * t + 0.5 * 19.9 * t * t)
    return np.exp(log_alpha_bar / 2), np.sqrt(-np.expm1(log_alpha_bar))


def noise() -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()


def sample(scheduler: Any, n: int) -> Tensor:
    scheduler.set_timesteps(n)
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize(("name", "model"), [("ays-sd15", SD15), ("ays-sdxl", SDXL)])
def test_align_your_steps(name, model):
    scheduler = GASScheduler.from_published(name, model.config, [4, 10, 17])
    for n in (4, 10, 17):
        expected = by_align_your_steps(ALIGN_YOUR_STEPS[name], n, noise())
        torch.testing.assert_close(sample(scheduler, n), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((name, model) for name in ("neuralsolver-sit", "neuralsolver-flowdcn") for model in (SD3, FLUX, WAN)),
        *(("neuralsolver-dit", model) for model in (PIXART, DDPMScheduler())),
    ],
)
def test_neural_solver(name, model):
    scheduler = GASScheduler.from_published(name, model.config)
    assert sorted(scheduler.solvers) == list(range(5, 11))
    for n in scheduler.solvers:
        table = scheduler.solvers[n].table(scheduler.noise_schedule())
        assert table.weights.abs().max() < 10  # half-precision states are rounded
        torch.testing.assert_close(sample(scheduler, n), by_neural_solver(name, n, noise()), rtol=0, atol=1e-6)


def test_figures_are_whole():
    for solver in published_solvers().values():
        assert solver.source.startswith("https://github.com/") and solver.licence in ("MIT", "Apache-2.0")
        for n, table in solver.tables.items():
            if "deltas" in table:
                assert len(table["deltas"]) == n and abs(sum(table["deltas"]) - 1) < 3e-4
                assert [len(row) for row in table["coefficients"]] == list(range(n))


@pytest.mark.parametrize(
    ("name", "model"), [("ays-sdxl", SDXL), ("neuralsolver-sit", FLUX), ("neuralsolver-dit", PIXART)]
)
def test_saved_and_exported_as_any_other(name, model, tmp_path):
    made = GASScheduler.from_published(name, model.config, num_inference_steps=np.int64(10))
    made.save_pretrained(tmp_path)
    loaded = GASScheduler.from_pretrained(tmp_path)
    assert loaded.solvers[10].provenance["published_as"] == name and loaded.solvers[10].provenance["licence"]
    loaded.export(tmp_path / "solver.json")
    exported = load_sampler().from_json(tmp_path / "solver.json")
    for scheduler in (loaded, exported):
        torch.testing.assert_close(sample(scheduler, 10), sample(made, 10), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("ays-sd15", "stable-diffusion"),
        ("ays-sdxl", "stable-diffusion-xl"),
        ("neuralsolver-sit", "stable-diffusion-3"),
        ("neuralsolver-sit", "flux"),
        ("neuralsolver-dit", "pixart"),
        ("neuralsolver-dit", "dit"),
    ],
)
def test_in_pipelines(name, family):
    tiny = build(family)
    scheduler = GASScheduler.from_published(name, tiny.pipe.scheduler.config, num_inference_steps=10)
    found = final_state(tiny, scheduler, num_inference_steps=10)
    fine = final_state(tiny, GASScheduler.from_config(tiny.pipe.scheduler.config), num_inference_steps=60)
    assert (found - fine).square().mean() < 0.1 * fine.square().mean()


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("ays-sdxl", SD3, "'ays-sdxl' is for Stable Diffusion XL, with .* the config given has .*'flow_prediction'"),
        ("ays-sd15", DDPMScheduler(), "the config given has {'beta_start': 0.0001,"),
        ("ays-sd15", SVD, "the config given has {'sigma_data': 1.0,"),
        ("ays-sd15", EulerDiscreteScheduler(**SD, prediction_type="v_prediction"), "has {'prediction_type': 'v_pred"),
        ("ays-sd15", EulerDiscreteScheduler(**SD, rescale_betas_zero_snr=True), "'rescale_betas_zero_snr': True"),
        ("neuralsolver-sit", SD15, "'use_flow_sigmas': False"),
        ("neuralsolver-sit", FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "'invert_sigmas': True"),
        ("neuralsolver-dit", SD15, "'beta_schedule': 'scaled_linear'"),
        ("ays-sd2", SD15, "There is no published solver 'ays-sd2'; choose one of ays-sd15, ays-sdxl, neural"),
    ],
)
def test_other_networks_are_refused(name, model, message):
    with pytest.raises(ValueError, match=message) as error:
        GASScheduler.from_published(name, model.config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "model", "n"), [("neuralsolver-sit", SD3, 4), ("ays-sdxl", SDXL, 0)])
def test_other_step_counts_are_refused(name, model, n):
    with pytest.raises(ValueError, match=rf"'{name}' has solvers for .* steps, not {n}"):
        GASScheduler.from_published(name, model.config, num_inference_steps=n)


def test_list_is_a_table(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "model", "steps", "source", "licence"]
    for (name, solver), line in zip(published_solvers().items(), lines[1:]):
        assert line.startswith(f"{name} ") and solver.model in line and line.endswith(solver.licence)
        assert solver.paper in line
