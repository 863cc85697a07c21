"""Curvature on isotropic Gaussian data, where trajectories are known: x(sigma) = c sqrt(s^2 + sigma^2)."""

import copy

import pytest
import torch
from gaussian_mixture import reference_model, vp_schedule
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_gas.adaptive import (
    SIGMA_TIME,
    VE_TIME,
    CurvatureSwitch,
    ProbabilityFlow,
    adaptive_heun,
    relative_curvature,
    run,
    second_derivative,
    sigma_grid,
)
from diffusers_gas.adaptive.solvers import absolute_curvature
from diffusers_gas.noise_schedules import EDMSchedule, FlowMatchSchedule, VPDiscreteSchedule


STD = 0.5


def gaussian_denoiser(x, sigma, std=STD):
    return std**2 / (std**2 + sigma**2) * x


def on_trajectory(sigma, std=STD):
    directions = torch.linspace(-2, 3, 12, dtype=torch.float64).reshape(2, 6)
    return directions, directions * (std**2 + sigma**2) ** 0.5


@pytest.mark.parametrize("sigma", [0.01, 0.4, 3.0, 50.0])
def test_exact_second_derivative_in_sigma_time(sigma):
    c, x = on_trajectory(sigma)
    expected = c * STD**2 / (STD**2 + sigma**2) ** 1.5
    found = second_derivative(gaussian_denoiser, SIGMA_TIME, x, sigma)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    drift = SIGMA_TIME.drift(x, sigma, gaussian_denoiser(x, sigma))
    torch.testing.assert_close(drift, c * sigma / (STD**2 + sigma**2) ** 0.5, rtol=1e-12, atol=0)


def test_exact_second_derivative_in_ve_time():
    t = 2.0
    c, x = on_trajectory(t**0.5)
    found = second_derivative(gaussian_denoiser, VE_TIME, x, t)
    torch.testing.assert_close(found, -0.25 * c * (STD**2 + t) ** -1.5, rtol=1e-10, atol=0)


def test_unit_variance_data_stand_still_in_the_vp_frame():
    flow = ProbabilityFlow.from_noise_schedule(vp_schedule(0.01, 100.0))
    _, x = on_trajectory(flow.noise_level(0.4), std=1.0)

    def denoiser(x, sigma):
        return gaussian_denoiser(x, sigma, std=1.0)

    scale = x.abs().max()
    assert flow.drift(x, 0.4, denoiser(x, flow.noise_level(0.4))).abs().max() < 1e-10 * scale
    assert second_derivative(denoiser, flow, x, 0.4).abs().max() < 1e-9 * scale
    assert second_derivative(denoiser, flow, x, 0.4, published=True).abs().max() > 0.01 * scale


@pytest.mark.parametrize(
    "schedule",
    [
        FlowMatchSchedule(shift=3.0),
        FlowMatchSchedule(),
        EDMSchedule(),
        VPDiscreteSchedule(torch.linspace(0.999, 0.98, 1000, dtype=torch.float64).cumprod(0)),
    ],
)
def test_drift_is_the_rate_of_the_known_trajectory_under_every_noise_schedule(schedule):
    flow = ProbabilityFlow.from_noise_schedule(schedule)
    t = 0.6004

    def scaled_state(t):
        return (schedule.alpha(t) ** 2 * STD**2 + schedule.sigma(t) ** 2).sqrt()

    time = torch.tensor(t, dtype=torch.float64)
    rate = torch.func.jvp(scaled_state, (time,), (torch.ones_like(time),))[1]
    x = (scaled_state(time) / schedule.alpha(time)).reshape(1, 1)
    sigma = torch.tensor(flow.noise_level(t), dtype=torch.float64)
    drift = flow.drift(x, t, gaussian_denoiser(x, sigma))
    torch.testing.assert_close(drift.squeeze(), rate, rtol=1e-9, atol=0)
    assert flow.time(flow.noise_level(t)) == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 8.0])
def test_proxies_converge_to_the_exact_curvature(sigma):
    next_sigma = sigma * (1 - 1e-5)
    (c, x), (_, x_next) = on_trajectory(sigma), on_trajectory(next_sigma)
    drift = SIGMA_TIME.drift(x, sigma, gaussian_denoiser(x, sigma))
    drift_next = SIGMA_TIME.drift(x_next, next_sigma, gaussian_denoiser(x_next, next_sigma))
    dt = sigma - next_sigma
    exact = c * STD**2 / (STD**2 + sigma**2) ** 1.5
    kappa = torch.full((2,), STD**2 / (sigma * (sigma**2 + STD**2)), dtype=torch.float64)
    torch.testing.assert_close(relative_curvature(drift_next, drift, dt), kappa, rtol=1e-4, atol=0)
    torch.testing.assert_close(absolute_curvature(drift_next, drift, dt), exact.norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("tau", [1e-4, 2e-3, 0.5, 20.0])
@pytest.mark.parametrize("lagged", [True, False])
def test_switch_happens_where_the_known_curvature_crosses_the_threshold(tau, lagged):
    sigmas = sigma_grid(300, kind="loglinear")
    _, x = on_trajectory(sigmas[0])
    result = run(adaptive_heun(x, sigmas, CurvatureSwitch(tau, lagged=lagged)), gaussian_denoiser)
    kappa = STD**2 / (sigmas * (sigmas**2 + STD**2))
    assert abs(result.switch_index - int((kappa < tau).sum())) <= 2


def test_curvature_of_a_sample_does_not_depend_on_the_batch():
    sigmas, model = sigma_grid(12), reference_model()
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * sigmas[0]
    together = run(adaptive_heun(x, sigmas, [0.5] * 11), model).relative_curvature
    alone = torch.cat(
        [run(adaptive_heun(x[i : i + 1], sigmas, [0.5] * 11), model).relative_curvature for i in range(5)], 1
    )
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=0)


def test_a_sample_that_does_not_move_has_no_curvature():
    drift = torch.zeros(1, 4)
    assert relative_curvature(drift, drift, 1.0) == 0


def test_exact_curvature_of_a_diffusers_network(digits):
    """The second derivative along the trajectory is the rate of change of the drift over a short distance."""
    unet = copy.deepcopy(digits.unet).double()
    schedule = vp_schedule(0.01, 160.0)  # that of the model has kinks, at which finite differences fail

    def denoiser(x, sigma):
        t = schedule.inverse_lambda(-sigma.log())
        return x - sigma * unet(schedule.alpha(t) * x, 1000 * t).sample

    def drift(x, sigma):
        return SIGMA_TIME.drift(x, sigma, denoiser(x, torch.tensor(sigma, dtype=torch.float64)))

    generator = torch.Generator().manual_seed(0)
    for sigma in (0.5, 20.0):
        x = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=generator) * sigma
        step = 0.002 * sigma  # the network computes the embedding of the timestep in float32
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            found, here = second_derivative(denoiser, SIGMA_TIME, x, sigma), drift(x, sigma)
            ahead, behind = (drift(x + h * here, sigma + h) for h in (step, -step))
        expected = (ahead - behind) / (2 * step)
        assert (found - expected).norm() < 0.05 * expected.norm()
        assert not found.requires_grad
