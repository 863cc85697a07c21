"""Noise schedules: inverses, Diffusers' own numbers, derivatives, and the ends where a logarithm is infinite."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from gaussian_mixture import vp_schedule
from torch import Tensor

from diffusers_gas import GASScheduler, GeneralizedSolver
from diffusers_gas.noise_schedules import (
    EDMSchedule,
    EDMVPSchedule,
    FlowMatchSchedule,
    NoiseSchedule,
    VPDiscreteSchedule,
    VPLinearSchedule,
    VPSchedule,
)
from diffusers_gas.schedulers.configs import alphas_cumprod_from_config, noise_schedule_from_config


BETAS: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "trained": {"trained_betas": np.linspace(1e-4, 0.05, 300).tolist(), "num_train_timesteps": 300},
    "zero_snr": {"rescale_betas_zero_snr": True},
    "zero_snr_scaled_linear": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    "short": {"num_train_timesteps": 20, "beta_end": 0.5},
}
SCHEDULES: dict[str, NoiseSchedule] = {
    **{
        f"vp_discrete_{name}": noise_schedule_from_config(GASScheduler(**config).config)
        for name, config in BETAS.items()
    },
    "vp_linear": VPLinearSchedule(),
    "vp_linear_edm": vp_schedule(0.010084, 80.0),
    "edm": EDMSchedule(),
    "edm_vp": EDMVPSchedule(),
    "edm_other": EDMSchedule(0.01, 50.0, rho=3.0),
    "flow": FlowMatchSchedule(),
    "flow_shifted": FlowMatchSchedule(shift=3.0),
    "flow_shifted_down": FlowMatchSchedule(shift=0.4, num_train_timesteps=500),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def random_times(schedule: NoiseSchedule, count: int = 500) -> Tensor:
    """Times over the whole range, dense towards both ends, where most goes wrong."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    t = torch.cat([uniform, 10 ** (-3 * uniform), 1 - 10 ** (-1 - 4 * uniform)])
    return t[(t >= schedule.t_min) & (t < 1)]


# Inverses


@each_schedule
def test_inverses(schedule):
    t = random_times(schedule)
    torch.testing.assert_close(schedule.inverse_lambda(schedule.lambda_(t)), t, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(schedule.inverse_timestep(schedule.timestep(t)), t, rtol=1e-9, atol=1e-12)
    sigmas = schedule.diffusers_sigma(t)
    torch.testing.assert_close(schedule.inverse_diffusers_sigma(sigmas), t, rtol=1e-8, atol=1e-10)


@each_schedule
def test_inverses_the_other_way_round(schedule):
    ends = torch.tensor([1 - 1e-6, max(schedule.t_min, 1e-4)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(500, generator=generator, dtype=torch.float64)
    for function, inverse in (
        (schedule.lambda_, schedule.inverse_lambda),
        (schedule.timestep, schedule.inverse_timestep),
        (schedule.diffusers_sigma, schedule.inverse_diffusers_sigma),
    ):
        low, high = function(ends)
        values = torch.lerp(low, high, weights)
        torch.testing.assert_close(function(inverse(values)), values, rtol=1e-8, atol=1e-9)


@each_schedule
def test_definitions(schedule):
    t = random_times(schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert (alpha > 0).all() and (sigma > 0).all()
    torch.testing.assert_close(schedule.lambda_(t), (alpha / sigma).log(), rtol=1e-9, atol=1e-9)
    if isinstance(schedule, VPSchedule):
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-14, atol=0)
        torch.testing.assert_close(schedule.diffusers_sigma(t), sigma / alpha, rtol=1e-12, atol=0)
    elif isinstance(schedule, FlowMatchSchedule):
        torch.testing.assert_close(alpha + sigma, torch.ones_like(t), rtol=1e-14, atol=0)
        torch.testing.assert_close(schedule.diffusers_sigma(t), sigma, rtol=0, atol=0)
    else:
        assert (alpha == 1).all()


@each_schedule
def test_noise_grows_with_t(schedule):
    t = random_times(schedule).unique()
    assert (schedule.lambda_(t).diff() < 0).all()
    assert (schedule.timestep(t).diff() > 0).all()
    assert (schedule.alpha(t).diff() <= 0).all() and (schedule.sigma(t).diff() >= 0).all()


@each_schedule
def test_shapes_and_precision(schedule):
    t = torch.full((2, 3), 0.5, dtype=torch.float64)
    functions = (schedule.alpha, schedule.sigma, schedule.lambda_, schedule.timestep, schedule.diffusers_sigma)
    for function in functions:
        assert function(t).shape == (2, 3) and function(t).dtype == torch.float64
        assert function(t[0, 0]).shape == () and function(t[:0]).shape == (0, 3)
        torch.testing.assert_close(function(t[0, 0]), function(t)[0, 0], rtol=0, atol=0)


@each_schedule
def test_derivatives_equal_finite_differences(schedule):
    t = random_times(schedule, 50)
    t = t[t < 0.999]
    if isinstance(schedule, VPDiscreteSchedule):  # log alpha has a kink at every knot
        t = t[((t * schedule.num_train_timesteps) % 1 - 0.5).abs() < 0.4]
    h = 1e-5 * torch.minimum(t, 1 - t)
    for function in (schedule.alpha, schedule.sigma, schedule.lambda_, schedule.timestep, schedule.diffusers_sigma):
        variable = t.clone().requires_grad_()
        value = function(variable)
        if not value.requires_grad:  # EDM's alpha = 1
            assert (value == 1).all()
            continue
        (gradient,) = torch.autograd.grad(value.sum(), variable)
        difference = (function(t + h) - function(t - h)) / (2 * h)
        scale = gradient.abs() + function(t).abs() / t
        assert ((gradient - difference).abs() / scale).max() < 1e-6
    values = schedule.lambda_(t).requires_grad_()
    (gradient,) = torch.autograd.grad(schedule.inverse_lambda(values).sum(), values)
    variable = t.clone().requires_grad_()
    (slope,) = torch.autograd.grad(schedule.lambda_(variable).sum(), variable)
    torch.testing.assert_close(gradient * slope, torch.ones_like(t), rtol=1e-6, atol=0)


# Variance preserving, discrete


@pytest.mark.parametrize("config", BETAS.values(), ids=BETAS)
def test_vp_discrete_equals_diffusers_at_the_knots(config):
    scheduler = GASScheduler(**config)
    schedule = scheduler.noise_schedule()
    other_class = DDIMScheduler if "sigmoid" not in config.values() else DDPMScheduler
    expected = other_class(**config).alphas_cumprod.double()
    n = len(expected)
    timesteps = torch.arange(n, dtype=torch.float64)
    t = schedule.inverse_timestep(timesteps)
    torch.testing.assert_close(t, (timesteps + 1) / n, rtol=0, atol=1e-15)
    torch.testing.assert_close(schedule.timestep(t), timesteps, rtol=0, atol=1e-9)
    assert schedule.t_min == 1 / n
    last = n - 1 if config.get("rescale_betas_zero_snr") else n
    # Diffusers' product is of float32, ours of float64.
    torch.testing.assert_close(schedule.alpha(t)[:last] ** 2, expected[:last], rtol=2e-4, atol=1e-9)
    torch.testing.assert_close(scheduler.alphas_cumprod.double()[:last], expected[:last], rtol=2e-4, atol=1e-9)
    if last < n:
        assert expected[-1] < 1e-9 and 0 < schedule.alpha(t)[-1] < 2.0**-12 + 1e-12


def test_vp_discrete_is_log_linear_between_knots_and_goes_on_beyond():
    alphas_cumprod = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    schedule = VPDiscreteSchedule(alphas_cumprod)
    logs = 0.5 * alphas_cumprod.log()

    def log_alpha(t: float) -> float:
        return schedule.log_alpha(torch.tensor(t, dtype=torch.float64)).item()

    assert log_alpha(0.5) == pytest.approx((logs[0] + logs[1]).item() / 2)
    assert log_alpha(2 / 3 + 0.1) == pytest.approx((logs[1] + 0.3 * (logs[2] - logs[1])).item())
    assert log_alpha(1 / 3 - 0.1) == pytest.approx((0.7 * logs[0]).item())
    assert (schedule.alpha(torch.zeros(1)), schedule.sigma(torch.zeros(1))) == (1, 0)
    assert log_alpha(1.1) == pytest.approx((logs[2] + 0.3 * (logs[2] - logs[1])).item())


def test_betas_do_not_lose_digits():
    """In float32 lambda near t = 0 would be off by 1e-4."""
    config = GASScheduler(**BETAS["scaled_linear"]).config
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    expected = torch.from_numpy(np.cumprod(1 - betas))
    torch.testing.assert_close(alphas_cumprod_from_config(config), expected, rtol=1e-13, atol=0)


# Variance preserving, linear


@pytest.mark.parametrize("t_end, beta_0, beta_1", [(1e-3, 0.101287, 17.427132), (1e-4, 0.100129, 17.428290)])
def test_vp_linear_for_edm(t_end, beta_0, beta_1):
    """Numbers of tests/golden/README.md."""
    low = max(0.002, math.sqrt(math.expm1(19.9 * t_end**2 / 2 + 0.1 * t_end)))
    schedule = vp_schedule(low, 80.0, t_end)
    assert schedule.beta_0 == pytest.approx(beta_0, abs=1e-6)
    assert schedule.beta_1 == pytest.approx(beta_1, abs=1e-6)
    ends = torch.tensor([1.0, t_end], dtype=torch.float64)
    noise_levels = schedule.sigma(ends) / schedule.alpha(ends)
    assert noise_levels[0].item() == pytest.approx(80.0, rel=1e-9)
    assert noise_levels[1].item() == pytest.approx(low, rel=1e-9)


def test_vp_linear_formula():
    schedule, t = VPLinearSchedule(0.1, 20.0), torch.tensor([0.25, 1.0], dtype=torch.float64)
    torch.testing.assert_close(schedule.log_alpha(t), -4.975 * t**2 - 0.05 * t, rtol=1e-14, atol=0)
    assert torch.equal(schedule.timestep(t), t)


# EDM


@pytest.mark.parametrize("num_inference_steps", [2, 5, 18])
def test_edm_uniform_t_is_the_karras_schedule(num_inference_steps):
    other = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    other.set_timesteps(num_inference_steps)
    schedule = EDMSchedule(0.002, 80.0, 7.0)
    t = torch.linspace(1, 0, num_inference_steps, dtype=torch.float64)
    torch.testing.assert_close(schedule.sigma(t).float(), other.sigmas[:-1], rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.timestep(t).float(), other.timesteps, rtol=1e-5, atol=1e-6)


# Flow matching


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.0])
def test_flow_shift_equals_diffusers(shift):
    other = FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = np.linspace(1, 1 / 7, 7)
    other.set_timesteps(sigmas=sigmas.tolist())
    schedule = FlowMatchSchedule(shift)
    result = schedule.sigma(torch.from_numpy(sigmas))
    torch.testing.assert_close(result.float(), other.sigmas[:-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.timestep(torch.from_numpy(sigmas)).float(), other.timesteps, rtol=1e-6, atol=0)


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_dynamic_flow_shift_equals_diffusers(mu, time_shift_type):
    other = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=time_shift_type)
    sigmas = np.linspace(1, 1 / 7, 7)
    other.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    config = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "time_shift_type": time_shift_type}
    config = GASScheduler(**config, prediction_type="flow_prediction").config
    result = noise_schedule_from_config(config, mu).sigma(torch.from_numpy(sigmas))
    torch.testing.assert_close(result.float(), other.sigmas[:-1], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="mu"):
        noise_schedule_from_config(config)


# The ends


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_ends_are_exact(shift):
    schedule, ends = FlowMatchSchedule(shift), torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert schedule.alpha(ends).tolist() == [0, 1] and schedule.sigma(ends).tolist() == [1, 0]
    assert schedule.lambda_(ends).tolist() == [-math.inf, math.inf]
    assert schedule.inverse_lambda(torch.tensor([-math.inf, math.inf], dtype=torch.float64)).tolist() == [1, 0]
    assert schedule.timestep(ends).tolist() == [1000, 0]


END_CASES = {
    "flow": (FlowMatchSchedule(), 1e-3),
    "flow_to_zero": (FlowMatchSchedule(), 0.0),
    "flow_shifted_to_zero": (FlowMatchSchedule(shift=3.0), 0.0),
    "zero_snr": (SCHEDULES["vp_discrete_zero_snr"], 1e-3),
    "edm": (EDMSchedule(), 0.0),
}


@pytest.mark.parametrize("schedule, t_end", END_CASES.values(), ids=END_CASES)
@pytest.mark.parametrize("theory_order", [1, 2, 3])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("perturbed", [False, True])
def test_tables_and_gradients_are_finite_at_the_ends(perturbed, lower_order_final, theory_order, schedule, t_end):
    for n in (1, 2, 3, 4):
        solver = GeneralizedSolver(n, theory_order=theory_order, lower_order_final=lower_order_final, t_end=t_end)
        if perturbed:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in (solver.timestep_logits, solver.state_coefficients, solver.data_coefficients):
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for begin in range(n):
            table = solver.table(schedule, begin)
            forms = torch.cat([form.flatten() for form in (*solver.coefficients(schedule, begin), table.weights)])
            assert forms.isfinite().all(), (n, begin)
            solver.zero_grad()
            # A gradient of one that is not finite leaves none of the sum that is.
            (forms * torch.arange(1.0, 1 + len(forms))).sum().backward()
            for name, parameter in solver.named_parameters():
                assert parameter.grad is None or parameter.grad.isfinite().all(), (n, begin, name)


@pytest.mark.parametrize("theory_order", [2, 3])
@pytest.mark.parametrize("t_end", [1e-3, 0.0])
def test_table_at_alpha_zero_is_the_limit(theory_order, t_end):
    """Starting ever closer to pure noise, the table tends to the one that starts there."""
    schedule = FlowMatchSchedule()
    times = torch.linspace(1, t_end, 6, dtype=torch.float64)
    tables = []
    for t_start in (1.0, 1 - 1e-9, 1 - 1e-13):
        times[0] = t_start
        solver = GeneralizedSolver(
            5, theory_order=theory_order, lower_order_final=False, t_start=t_start, t_end=t_end, times=times
        )
        tables.append(solver.coefficients(schedule))
    distances = [(data - tables[0][1]).abs().max().item() for _, data in tables[1:]]
    # The weight of the first prediction goes to zero like one over the log-SNR, which is slow.
    assert distances[1] < distances[0] < 0.2
    torch.testing.assert_close(tables[2][0], tables[0][0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("theory_order", [2, 3])
def test_sampling_from_alpha_zero_to_the_data_is_finite(theory_order):
    scheduler = GASScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", t_end=0.0, solver_order=theory_order
    )
    scheduler.add_solver(scheduler.theory_solver(5))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[0] == 1000 and scheduler.sigmas[-1] == 0
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(x), t, x).prev_sample
        assert x.isfinite().all()
