"""`SDMScheduler`: its plans against the mathematics, the published reference numbers and Diffusers' own solvers."""

import copy
import functools
import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from gaussian_mixture import CASES, cases, reference_model, sigmas_of, tensors
from safetensors.torch import save_file
from saved_schedulers import FLOW, PREDICTIONS, STABLE_DIFFUSION
from tiny_pipelines import (
    FAMILIES,
    FROM_IMAGES,
    FROM_NOISE,
    build,
    final_state,
    generators,
    plugged,
    random_states,
    record_steps,
)
from torch import Tensor

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMPlan, SDMScheduler, adaptive
from diffusers_gas.calibration import run_on_pipeline
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.schedulers.sdm_plan import flow_shift, times_of_levels


EDM = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
CONFIGS = PREDICTIONS | {
    "edm": EDM,
    "edm_v_prediction": EDM | {"prediction_type": "v_prediction"},
}
SOLVERS = {
    "heun": adaptive.adaptive_heun,
    "dpmsolver++": adaptive.adaptive_dpmsolver,
    "unipc": adaptive.adaptive_unipc,
}

Denoiser = Callable[[Tensor, Tensor], Tensor]
pipeline = functools.cache(build)
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
all_solvers = pytest.mark.parametrize("solver", SOLVERS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def denoiser(x: Tensor, sigma: float | Tensor) -> Tensor:
    """The exact one of Gaussian data with a standard deviation of 0.7 around 0.3, bent a little."""
    share = 0.49 / (0.49 + sigma**2)
    return 0.3 + share * (x - 0.3) + 0.1 * torch.sin(x / (1 + sigma))


def plan_of(num_steps: int, switch_index: int, solver: str = "heun", high: float = 20.0) -> SDMPlan:
    sigmas = adaptive.sigma_grid(num_steps, 0.05, high, rho=5.0)
    return SDMPlan(torch.cat([sigmas, sigmas.new_zeros(1)]), switch_index, solver)


def with_plans(*plans: SDMPlan, **config: Any) -> SDMScheduler:
    scheduler = SDMScheduler(**config)
    for plan in plans:
        scheduler.add_plan(plan)
    return scheduler


def network_of(scheduler: SDMScheduler, denoise: Denoiser = denoiser) -> Callable[[Tensor, int], Tensor]:
    """The network, by the position of an evaluation, whose data prediction is `denoise`."""

    def output(x: Tensor, k: int) -> Tensor:
        alpha, sigma = scheduler._steps.alphas[k], scheduler._steps.noise_levels[k]
        data = denoise(x / alpha, torch.tensor(sigma / alpha, dtype=torch.float64))
        if scheduler.config.sigma_data is not None:
            variance = scheduler.config.sigma_data**2
            skip, scale = variance / (sigma**2 + variance), sigma * (variance / (sigma**2 + variance)) ** 0.5
            sign = -1 if scheduler.config.prediction_type == "v_prediction" else 1
            return sign * (data - skip * x) / scale
        eps = (x - alpha * data) / sigma
        return {
            "sample": data,
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * data,
            "flow_prediction": eps - data,
        }[scheduler.config.prediction_type]

    return output


def sample(scheduler: SDMScheduler, x: Tensor, denoise: Denoiser = denoiser) -> list[Tensor]:
    """The states of the loop of every Diffusers pipeline, after `set_timesteps`, from a start index on."""
    network = network_of(scheduler, denoise)
    begin = scheduler.begin_index or 0
    states = [x]
    for k, t in enumerate(scheduler.timesteps[begin:], start=begin):
        states.append(scheduler.step(network(states[-1], k), t, states[-1], return_dict=False)[0])
    return states


def run(scheduler: SDMScheduler, num_inference_steps: int = 12, shape: tuple[int, ...] = (2, 3, 4, 4)) -> Tensor:
    scheduler.set_timesteps(num_inference_steps)
    return sample(scheduler, noise(*shape))[-1]


# Plans


@pytest.mark.parametrize("num_steps, switch_index", [(1, 0), (2, 0), (2, 1), (6, 0), (6, 3), (6, 5)])
def test_heun_plan_asks_once_up_to_the_switch_and_in_pairs_after_it(num_steps, switch_index):
    sigmas = torch.cat([torch.arange(num_steps, 0, -1).double(), torch.zeros(1, dtype=torch.float64)])
    plan = SDMPlan(sigmas, switch_index)
    expected = [s for i, s in enumerate(sigmas[:-1].tolist()) for _ in range(1 if i <= switch_index else 2)]
    assert plan.evaluation_sigmas().tolist() == expected
    assert plan.num_inference_steps == 2 * num_steps - 1 - switch_index == len(expected)
    scheduler = with_plans(plan)
    scheduler.set_timesteps(len(expected))
    assert (len(scheduler.timesteps), scheduler.order, scheduler.num_inference_steps) == (
        len(expected),
        1,
        len(expected),
    )
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*expected, 0.0]), rtol=1e-5, atol=0)


@all_solvers
def test_published_plans_fill_the_budget_exactly(solver):
    for config in (EDM, STABLE_DIFFUSION, FLOW):
        scheduler = SDMScheduler(**config, solver=solver)
        for num_inference_steps in (*range(1, 17), 29, 40):
            scheduler.set_timesteps(num_inference_steps)
            assert len(scheduler.timesteps) == num_inference_steps
            assert (scheduler.timesteps.diff() <= 0).all()


def test_published_plan_is_the_published_grid_and_switches_near_the_published_noise_level():
    """tau = 2e-4 corresponds to sigma of about 10.8 for isotropic data with a standard deviation of 0.5."""
    plan = SDMScheduler(**EDM, solver="heun").plan_for(29)
    assert torch.equal(plan.sigmas[:-1], adaptive.sigma_grid(plan.num_steps))
    between = (plan.sigmas[plan.switch_index - 1] * plan.sigmas[plan.switch_index]).sqrt()
    assert 7 < between < 14


@pytest.mark.parametrize("config", [{}, STABLE_DIFFUSION, FLOW], ids=["linear", "scaled_linear", "flow"])
@pytest.mark.parametrize("num_inference_steps", [5, 7, 20])
def test_as_it_comes_it_samples_as_dpm_solver_with_trailing_steps(config, num_inference_steps):
    """Diffusers' first flow-matching level is 1, ours .999, and its third time is rounded."""
    n, scheduler = num_inference_steps, SDMScheduler(**config)
    theirs = DPMSolverMultistepScheduler(**config, timestep_spacing="trailing")
    theirs.set_timesteps(n)
    scheduler.set_timesteps(n)
    assert scheduler.plan_for(n).solver == "dpmsolver++" and max(scheduler.plan_for(n).orders) == 2
    torch.testing.assert_close(scheduler.timesteps.double(), theirs.timesteps.double(), rtol=0, atol=1.01)


@pytest.mark.parametrize("solver", ["heun", "dpmsolver++", "dpmsolver++3m", "unipc"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_other_counts_follow_the_nearest_plan(config, solver):
    """Its kind of solver, its switch, and its time grid. Equal steps of time stay equal ones, other grids keep their shape."""
    scheduler, usual = SDMScheduler(**config, solver=solver), SDMScheduler(**config, solver=solver)
    noise_schedule, blend = scheduler.noise_schedule(), "linear" if solver == "unipc" else "step"
    for m in (5, 16):
        scheduler.add_plan(replace(usual.plan_for(m), blend=blend))
        assert scheduler.plan_for(m) is scheduler.plans[m]
    for n in (*range(1, 24), 39):
        plan = scheduler.plans[5 if n < 9 else 16].for_evaluations(n, noise_schedule)
        assert (plan.num_inference_steps, plan.solver, plan.blend) == (n, solver, blend)
        times = times_of_levels(usual.usual_sigmas(plan.num_steps, noise_schedule)[:-1], noise_schedule)
        if solver != "heun" and "sigma_data" not in config and not config.get("use_flow_sigmas"):
            torch.testing.assert_close(plan.times(noise_schedule), times, rtol=1e-6, atol=1e-9)
        near = 4 <= n <= 6 or 12 <= n <= 21
        assert (scheduler.plan_for(n) == plan) if near else (scheduler.plan_for(n) == usual.plan_for(n))
    first_order = SDMPlan(plan_of(8, 1).sigmas, 7, "unipc")
    assert max(first_order.for_evaluations(13, noise_schedule).orders) == 1
    late = SDMPlan(plan_of(11, 1).sigmas, 4, "unipc")
    assert late.for_evaluations(21, noise_schedule).switch_index == 7  # 1 + 3 / 9 of 19 steps


def test_an_interpolated_plan_is_said_once_and_changes_with_the_plans(caplog):
    scheduler = with_plans(plan_of(6, 0))
    with caplog.at_level(logging.WARNING):
        before = run(scheduler, 9)
        run(scheduler, 9)
    assert caplog.text.count("No plan for 9 evaluations") == 1 and "[11]. The nearest" in caplog.text
    scheduler.add_plan(plan_of(8, 1, "unipc"))
    assert not torch.equal(run(scheduler, 9), before)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(scheduler, 20), run(SDMScheduler(), 20))
    assert "The uncalibrated plan is used" in caplog.text


BAD_PLANS = {
    "ascending": ([1.0, 2.0, 0.0], 0, "heun", "descend"),
    "below 0": ([2.0, -1.0], 0, "heun", "descend"),
    "infinite": ([float("inf"), 1.0, 0.0], 0, "heun", "descend"),
    "late switch": ([2.0, 1.0, 0.0], 2, "heun", "switch_index"),
    "negative switch": ([2.0, 1.0, 0.0], -1, "heun", "switch_index"),
    "no history": ([2.0, 1.0, 0.0], 0, "dpmsolver++", "switch_index"),
    "no history of two": ([2.0, 1.0, 0.0], 0, "unipc", "switch_index"),
    "solver": ([2.0, 1.0, 0.0], 0, "rk4", "solver"),
}


@pytest.mark.parametrize("sigmas, switch_index, solver, message", BAD_PLANS.values(), ids=BAD_PLANS)
def test_impossible_plans_are_refused(sigmas, switch_index, solver, message):
    with pytest.raises(ValueError, match=message):
        SDMPlan(torch.tensor(sigmas, dtype=torch.float64), switch_index, solver)


# The mathematics


@pytest.mark.parametrize("solver", [*SOLVERS, "dpmsolver++3m"])
def test_the_last_step_is_of_first_order_also_to_a_level_above_0(solver):
    """It is then linear in the level that it leads to."""
    levels, schedule = torch.tensor([10.0, 3.0, 1.0, 0.4]).double(), SDMScheduler(**EDM).noise_schedule()
    to_zero, half, whole = (
        SDMPlan(torch.cat([levels, levels.new_tensor([end])]), 1, solver).table(schedule).weights
        for end in (0.0, 0.1, 0.2)
    )
    torch.testing.assert_close(half, (to_zero + whole) / 2)


@all_configs
@all_solvers
def test_states_are_those_of_the_adaptive_solver(config, solver):
    for switch_index in (1, 4, 7):
        plan = plan_of(8, switch_index, solver)
        scheduler = with_plans(plan, **config)
        scheduler.set_timesteps(plan.num_inference_steps)
        x, ratio = noise(3, 2, 4), flow_shift(scheduler.noise_schedule())
        weights = adaptive.step_weights(8, switch_index)
        method = SOLVERS[solver](x / scheduler._steps.alphas[0], plan.sigmas * ratio, weights)
        expected = adaptive.run(method, denoiser).sample
        torch.testing.assert_close(sample(scheduler, x)[-1], expected, rtol=0, atol=1e-9)


@all_solvers
@pytest.mark.parametrize("blend", ["linear", "cosine"])
def test_blends_are_those_of_the_adaptive_solver(solver, blend):
    sigmas = plan_of(7, 1).sigmas
    scheduler = with_plans(SDMPlan(sigmas, 1, solver, blend=blend), **STABLE_DIFFUSION)
    scheduler.set_timesteps(*scheduler.plans)
    x = noise(3, 2, 4)
    weights = {"linear": adaptive.linear_weights, "cosine": adaptive.cosine_weights}[blend](7)
    expected = adaptive.run(SOLVERS[solver](x / scheduler._steps.alphas[0], sigmas, weights), denoiser)
    assert expected.num_evaluations == scheduler.num_inference_steps
    torch.testing.assert_close(sample(scheduler, x)[-1], expected.sample, rtol=0, atol=1e-9)


SIGMA_TIME_CASES = [
    name
    for name in cases("adaptive_solver", "adaptive_dpmsolver")
    if (params := CASES[name]["params"])["schedule"] == "linear"
    and params.get("lambda_schedule", "step") == "step"
    and params.get("alpha", 1) == 1
    and params.get("solver_type", "midpoint") == "midpoint"
    and not params.get("S_churn")
    and params.get("metric") != "uhat"
    and params.get("guidance", 1) == 1
]


@pytest.mark.parametrize("name", SIGMA_TIME_CASES)
def test_plans_reproduce_the_reference_numbers(name):
    """The published code's states on a network with EDM preconditioning, from its switch and noise levels."""
    case, data = CASES[name], tensors(name)
    solver = "heun" if case["kind"] == "adaptive_solver" else "dpmsolver++"
    sigmas = sigmas_of(case["params"], data)
    switch_index = case["expected"]["switch_index"]
    switch_index = len(sigmas) - 2 if switch_index is None else min(switch_index, len(sigmas) - 2)
    scheduler = with_plans(SDMPlan(sigmas, switch_index, solver), **EDM)
    scheduler.set_timesteps(case["expected"]["model_calls"])
    states = sample(scheduler, data["states"][0], reference_model())
    # The published `iddpm` grid is partly evaluated in float32.
    limit = (1e-5 if case["params"]["discretization"] == "iddpm" else 1e-9) * data["states"].abs().max().item()
    torch.testing.assert_close(states[-1], data["states"][-1], rtol=0, atol=limit)


ONLINE_CASES = [
    name
    for name in SIGMA_TIME_CASES
    if (params := CASES[name]["params"])["discretization"] == "edm"
    and params["use_relative_metrics"]
    and params["tau_k"] > 0
    and "input_sigmas" not in CASES[name]["tensors"]
]


@pytest.mark.parametrize("name", ONLINE_CASES)
def test_online_mode_reproduces_the_reference_numbers(name):
    """The published switch, decided on the published batch during sampling, and its number of evaluations."""
    case, data = CASES[name], tensors(name)
    params, expected = case["params"], case["expected"]
    solver = "heun" if case["kind"] == "adaptive_solver" else "dpmsolver++"
    config = EDM | {"sigma_min": params["sigma_min"], "sigma_max": params["sigma_max"], "rho": params["rho"]}
    scheduler = SDMScheduler(**config, solver=solver, tau=params["tau_k"], online=True)
    scheduler.set_timesteps(2 * params["num_steps"] - 2 if solver == "heun" else params["num_steps"])
    x = data["states"][0]
    final = sample(scheduler, x, reference_model())[-1]
    assert scheduler.num_inference_steps == expected["model_calls"] == scheduler.step_index
    limit = 1e-9 * data["states"].abs().max().item()
    torch.testing.assert_close(final, data["states"][-1], rtol=0, atol=limit)


def test_there_are_reference_cases_to_compare_with():
    assert len(SIGMA_TIME_CASES) >= 20 and len(ONLINE_CASES) >= 10


# Diffusers' own solvers on the same noise levels


def through_diffusers(scheduler: SchedulerMixin, num_inference_steps: int, x: Tensor) -> Tensor:
    """Its loop with `denoiser`, which sees the exact noise level of each evaluation; x at unit noise."""
    scheduler.set_timesteps(num_inference_steps)
    is_vp = isinstance(scheduler, DPMSolverMultistepScheduler)
    scale = (scheduler.sigmas[0] ** 2 + 1).rsqrt() if is_vp else 1.0
    state = x * scheduler.sigmas[0] * scale
    for k, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[k].double()
        alpha = (sigma**2 + 1).rsqrt() if is_vp else 1.0
        eps = (state / alpha - denoiser(state / alpha, sigma)) / sigma
        state = scheduler.step(eps, t, state, return_dict=False)[0]
    return state


DIFFUSERS = {
    "euler": (EulerDiscreteScheduler, 10, 10, lambda n: (n - 1, "heun")),
    "heun": (HeunDiscreteScheduler, 10, 19, lambda n: (0, "heun")),
    "dpmsolver": (DPMSolverMultistepScheduler, 10, 10, lambda n: (1, "dpmsolver++")),
    "third order": (
        functools.partial(DPMSolverMultistepScheduler, solver_order=3),
        10,
        10,
        lambda n: (1, "dpmsolver++3m"),
    ),
}


@pytest.mark.parametrize("other, steps, evaluations, settings", DIFFUSERS.values(), ids=DIFFUSERS)
def test_fixed_orders_are_diffusers_solvers(other, steps, evaluations, settings):
    base = SDMScheduler(**STABLE_DIFFUSION, solver="heun")  # Karras' noise levels
    grid = base.usual_sigmas(steps, base.noise_schedule())
    scheduler = with_plans(SDMPlan(grid, *settings(steps)), **STABLE_DIFFUSION)
    scheduler.set_timesteps(evaluations)
    x = noise(2, 3, 4, 4)
    theirs = through_diffusers(other(**STABLE_DIFFUSION, use_karras_sigmas=True), steps, x)
    ours = sample(scheduler, x * scheduler._steps.noise_levels[0])[-1]
    torch.testing.assert_close(ours, theirs.double(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", FROM_NOISE)
@all_solvers
def test_a_pipeline_with_a_plan_equals_the_driven_solver(name, solver):
    """The scheduler in an unmodified pipeline against `adaptive/` with the pipeline as its network."""
    tiny = pipeline(name)
    plan = plan_of(5, 2, solver, high=10.0)
    scheduler = SDMScheduler.from_config(tiny.pipe.scheduler.config)
    scheduler.add_plan(plan)
    n = plan.num_inference_steps
    steps = record_steps(tiny, scheduler, num_inference_steps=n)
    assert len(steps) == n
    weights = adaptive.step_weights(5, 2)
    driven = run_on_pipeline(
        tiny.pipe,
        plan.sigmas,
        lambda x, sigmas: SOLVERS[solver](x, sigmas, weights),
        **tiny.inputs(2),
        generator=generators(2),
        num_inference_steps=n,
    )
    assert driven.num_evaluations == n
    limit = 1e-3 * driven.sample.abs().max().item()
    torch.testing.assert_close(steps[-1].prev_sample, driven.sample, rtol=0, atol=limit)


@pytest.mark.parametrize("name", FROM_IMAGES)
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.7, 1.0])
def test_image_to_image_pipelines(name, strength):
    tiny = pipeline(name)
    scheduler = SDMScheduler.from_config(tiny.pipe.scheduler.config)
    final = final_state(tiny, scheduler, num_inference_steps=10, strength=strength)
    assert final.isfinite().all()
    assert torch.equal(final, final_state(tiny, scheduler, num_inference_steps=10, strength=strength))


@pytest.mark.parametrize("name", FROM_IMAGES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_online_mode_from_an_image(name, solver):
    """It needs the whole way from noise. What begins in the middle is refused before the network is asked."""
    tiny = pipeline(name)
    scheduler = SDMScheduler.from_config(tiny.pipe.scheduler.config, solver=solver, tau=1e-6, online=True)
    assert final_state(tiny, scheduler, num_inference_steps=10, strength=1.0).isfinite().all()
    network = getattr(tiny.pipe, "unet", None) or tiny.pipe.transformer
    calls: list[Any] = []
    hook = network.register_forward_hook(lambda *call: calls.append(call))
    with pytest.raises(ValueError, match="online=False"):
        final_state(tiny, scheduler, num_inference_steps=10, strength=0.5)
    hook.remove()
    assert not calls


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tau", [1e-6, 0.05, 1e6])
def test_online_mode_in_a_pipeline_is_the_published_switch(digits, solver, tau):
    """Through the shipped teacher's own call; the network is called as often as is reported."""
    scheduler = SDMScheduler.from_config(digits.scheduler.config, solver=solver, tau=tau, online=True)
    num_steps = 7
    sigmas = scheduler.usual_sigmas(num_steps, scheduler.noise_schedule())
    rule = adaptive.CurvatureSwitch(tau)
    inputs = {"batch_size": 3, "generator": torch.Generator().manual_seed(1)}
    driven = run_on_pipeline(digits, sigmas, lambda x, levels: SOLVERS[solver](x, levels, rule), **inputs)

    calls, states = [], []
    hook = digits.unet.register_forward_hook(lambda *_: calls.append(1))
    own_step = scheduler.step
    scheduler.step = lambda *args, **kwargs: states.append(own_step(*args, **kwargs)) or states[-1]
    inputs["generator"].manual_seed(1)
    with plugged(digits, scheduler):
        digits(**inputs, num_inference_steps=12 if solver == "heun" else num_steps, output_type="np")
    hook.remove()
    assert len(calls) == scheduler.num_inference_steps == driven.num_evaluations
    torch.testing.assert_close(states[-1].prev_sample, driven.sample, rtol=0, atol=1e-3)


def test_online_mode_spends_fewer_evaluations_the_later_it_switches():
    spent = []
    for tau in (1e-9, 1e-3, 1e-1, 1e9):
        scheduler = SDMScheduler(**EDM, solver="heun", tau=tau, online=True)
        run(scheduler, 20)
        assert len(scheduler.timesteps) == scheduler.num_inference_steps <= 20
        spent.append(scheduler.num_inference_steps)
    assert spent == sorted(spent, reverse=True) and spent[0] == 20 and spent[-1] == 11


def test_online_mode_with_a_plan_keeps_its_budget():
    scheduler = with_plans(plan_of(8, 4), online=True, tau=1e-9)
    run(scheduler, 11)
    assert scheduler.num_inference_steps == 11


def test_online_mode_refuses_to_start_in_the_middle():
    scheduler = SDMScheduler(online=True)
    scheduler.set_timesteps(12)
    with pytest.raises(ValueError, match="online"):
        scheduler.set_begin_index(4)
    with pytest.raises(ValueError, match="online"):  # of a pipeline that takes a part of the times
        scheduler.step(noise(1, 2), scheduler.timesteps[2], noise(1, 2))


def test_online_schedulers_can_be_sampled_again_and_copied():
    scheduler = SDMScheduler(**EDM, solver="heun", tau=1e-2, online=True)
    expected = run(scheduler, 20)
    assert torch.equal(run(scheduler, 20), expected)
    scheduler.set_timesteps(20)
    network, x = network_of(scheduler), noise(2, 3, 4, 4)
    for k in range(3):
        x = scheduler.step(network(x, k), scheduler.timesteps[k], x).prev_sample
    other = copy.deepcopy(scheduler)
    for current in (scheduler, other):
        state, network = x, network_of(current)
        for k, t in enumerate(current.timesteps[3:], start=3):
            state = current.step(network(state, k), t, state).prev_sample
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-12)


# EDM networks


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "other, settings", [(EDMEulerScheduler, (9, "heun")), (EDMDPMSolverMultistepScheduler, (1, "dpmsolver++"))]
)
def test_edm_pipelines_as_with_diffusers_edm_schedulers(other, settings, prediction_type):
    """Stable Diffusion XL's pipeline with an EDM scheduler, as Playground v2.5 has it."""
    tiny = pipeline("stable-diffusion-xl")
    theirs = other(sigma_max=14.0, sigma_data=1.0, prediction_type=prediction_type)
    base = SDMScheduler.from_config(theirs.config)
    ours = with_plans(SDMPlan(base.usual_sigmas(10, base.noise_schedule()), *settings), **init_config(base))
    expected = final_state(tiny, theirs, num_inference_steps=10)
    result = final_state(tiny, ours, num_inference_steps=10)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-3 * expected.abs().max().item())


# Diffusers' interface


def init_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    names = inspect.signature(type(scheduler).__init__).parameters.keys() - {"self"}
    return {name: scheduler.config[name] for name in names}


@all_configs
def test_public_interface(config):
    scheduler = SDMScheduler(**config)
    assert (scheduler.order, len(scheduler)) == (1, 1000)
    assert scheduler.init_noise_sigma == pytest.approx((80**2 + 1) ** 0.5 if "sigma_data" in config else 1.0)
    assert (scheduler.step_index, scheduler.begin_index, scheduler.num_inference_steps) == (None, None, None)
    scheduler.set_timesteps(9)
    assert scheduler.timesteps.shape == (9,) and scheduler.timesteps.dtype == torch.float32
    assert scheduler.sigmas.shape == (10,) and (scheduler.sigmas.diff() <= 0).all() and scheduler.sigmas[-1] == 0
    assert list(inspect.signature(scheduler.step).parameters)[:3] == ["model_output", "timestep", "sample"]
    assert {"num_inference_steps", "device", "sigmas", "mu"} <= set(
        inspect.signature(scheduler.set_timesteps).parameters
    )


@all_configs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_result_has_the_dtype_of_the_sample_and_is_computed_in_float32(dtype, config):
    plan = plan_of(6, 3)
    scheduler, exact = with_plans(plan, **config), with_plans(plan, **config)
    scheduler.set_timesteps(plan.num_inference_steps)
    exact.set_timesteps(plan.num_inference_steps)
    x = noise(2, 3, 4, 4).to(dtype)
    for k, t in enumerate(scheduler.timesteps):
        output = noise(2, 3, 4, 4, seed=k).to(dtype)
        expected = exact.step(output.double(), t, x.double()).prev_sample
        result = scheduler.step(output, t, x)
        assert isinstance(result, SchedulerOutput) and result.prev_sample.dtype == dtype
        scale = max(expected.abs().max().item(), 1.0)
        rounding = torch.finfo(dtype).eps / 2 + 1e-4 * (dtype == torch.float32) + 1e-3 * (dtype != torch.float32)
        torch.testing.assert_close(result.prev_sample.double(), expected, rtol=0, atol=rounding * scale)
        x = result.prev_sample


@pytest.mark.parametrize("begin_index", [None, 0, 2, 7])
@all_configs
def test_step_reads_nothing_from_the_device(config, begin_index):
    """On the meta device there is nothing to read: any synchronisation raises."""
    scheduler = with_plans(plan_of(6, 2), **config)
    scheduler.set_timesteps(9, device="meta")
    if begin_index is not None:
        scheduler.set_begin_index(begin_index)
    x = torch.empty(2, 3, 4, 4, device="meta", dtype=torch.float16)
    for t in scheduler.timesteps[begin_index or 0 :]:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.empty_like(x), t, x).prev_sample
    assert x.device.type == "meta" and x.dtype == torch.float16


@all_configs
def test_result_does_not_depend_on_the_rest_of_the_batch(config):
    scheduler = with_plans(plan_of(6, 2), **config)
    x = noise(5, 3, 7, 5)

    def final(part: slice) -> Tensor:
        scheduler.set_timesteps(9)
        return sample(scheduler, x[part].clone())[-1]

    whole = final(slice(None))
    for i in range(5):
        assert torch.equal(final(slice(i, i + 1))[0], whole[i])


@all_solvers
def test_sampling_twice_interleaving_and_copying(solver):
    scheduler, other = with_plans(plan_of(6, 2, solver)), SDMScheduler(**FLOW)
    (n,) = scheduler.plans
    expected, others = run(scheduler, n), run(other, n)
    scheduler.set_timesteps(n)
    other.set_timesteps(n)
    states = {scheduler: noise(2, 3, 4, 4), other: noise(2, 3, 4, 4)}
    for k in range(n):
        for current, x in states.items():
            states[current] = current.step(network_of(current)(x, k), current.timesteps[k], x).prev_sample
        if k == 3:
            twin = copy.deepcopy(scheduler)
            x = states[scheduler]
            for i in range(k + 1, n):
                x = twin.step(network_of(twin)(x, i), twin.timesteps[i], x).prev_sample
            assert torch.equal(x, expected)
    assert torch.equal(states[scheduler], expected) and torch.equal(states[other], others)
    assert scheduler._history is None


def test_caller_may_change_the_sample_between_steps():
    """A change made after the predictor of a Heun step stays: the corrector adds to the sample that it is given."""
    scheduler = with_plans(plan_of(4, 0), prediction_type="sample")
    scheduler.set_timesteps(7)
    change, network = noise(1, 2, seed=5), noise(1, 2, seed=6)
    x = noise(1, 2)
    predicted = scheduler.step(network, scheduler.timesteps[0], x).prev_sample
    corrected = scheduler.step(network, scheduler.timesteps[1], predicted + change).prev_sample
    torch.testing.assert_close(corrected, predicted + change, rtol=0, atol=1e-12)


def test_learned_variance_channels_are_dropped():
    plain, scheduler = SDMScheduler(), SDMScheduler(variance_type="learned_range")
    x = noise(2, 3, 4, 4)
    for current in (plain, scheduler):
        current.set_timesteps(8)
    output = noise(2, 3, 4, 4, seed=1)
    doubled = torch.cat([output, torch.full_like(output, 7.0)], dim=1)
    a, b = plain.step(output, plain.timesteps[0], x)[0], scheduler.step(doubled, scheduler.timesteps[0], x)[0]
    assert torch.equal(a, b)


# Starting in the middle


@all_solvers
@all_configs
def test_starts_land_on_a_whole_step(config, solver):
    """From an entry that is the second half of a Heun step the next whole step is taken, from the very state."""
    plan = plan_of(6, 1, solver) if solver == "heun" else plan_of(10, 1, solver)
    scheduler = with_plans(plan, **config)
    for begin in range(1, 10):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(begin)
        x = noise(2, 3)
        final = sample(scheduler, x)[-1]
        step = plan.sigmas.tolist().index(plan.evaluation_sigmas()[begin])
        first = 0 if solver == "heun" else 1
        rest = SDMPlan(plan.sigmas[step:], min(first, plan.num_steps - 1 - step), solver)
        from_there = with_plans(rest, **config)
        from_there.set_timesteps(rest.num_inference_steps)
        torch.testing.assert_close(final, sample(from_there, x)[-1], rtol=0, atol=1e-9)


@all_configs
def test_add_noise_reaches_the_state_of_every_evaluation(config):
    scheduler = with_plans(plan_of(5, 1), **config)
    scheduler.set_timesteps(8)
    x, eps = noise(1, 3), noise(1, 3, seed=1)
    for k in range(8):
        scheduler.set_begin_index(k)
        alpha, sigma = scheduler._steps.alphas[k], scheduler._steps.noise_levels[k]
        expected = alpha * x + sigma * eps
        torch.testing.assert_close(scheduler.add_noise(x, eps, scheduler.timesteps[k : k + 1]), expected)


# Saving, loading, and other schedulers


def test_save_and_load_round_trip(tmp_path):
    plans = [plan_of(6, 2), SDMPlan(plan_of(7, 3).sigmas, 3, "dpmsolver++", {"q": 0.25})]
    plans += [SDMPlan(plan_of(5, 1).sigmas, 1, "unipc", blend="linear")]
    scheduler = with_plans(*plans, **STABLE_DIFFUSION, t_end=2e-3)
    scheduler.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.solver")) == [f"{n}_steps.solver" for n in (5, 7, 9)]
    loaded = SDMScheduler.from_pretrained(tmp_path)
    assert init_config(loaded) == init_config(scheduler)
    assert loaded.plans[7].provenance == {"q": 0.25} and loaded.plans[7].solver == "dpmsolver++"
    assert loaded.plans == scheduler.plans
    for n in (5, 7, 9, 12):
        assert torch.equal(run(scheduler, n), run(loaded, n))


def test_a_saved_pipeline_restores_the_scheduler(tmp_path, digits):
    pipe = DDPMPipeline(digits.unet, with_plans(plan_of(6, 2)))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers_gas", "SDMScheduler"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, SDMScheduler) and list(loaded.scheduler.plans) == [9]


OTHERS = {
    "ddpm": DDPMScheduler(**STABLE_DIFFUSION, clip_sample=False),
    "dpmsolver": DPMSolverMultistepScheduler(**STABLE_DIFFUSION, solver_order=3, use_karras_sigmas=True),
    "euler": EulerDiscreteScheduler(**STABLE_DIFFUSION, interpolation_type="log_linear"),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dynamic": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "edm": EDMEulerScheduler(sigma_data=1.0),
    "gas": GASScheduler(**STABLE_DIFFUSION),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_switching_from_another_scheduler_and_back(other, tmp_path):
    scheduler = SDMScheduler.from_config(other.config)
    scheduler.set_timesteps(8, mu=0.5)
    assert init_config(type(other).from_config(scheduler.config)) == init_config(other)
    scheduler.save_pretrained(tmp_path)
    assert init_config(SDMScheduler.from_pretrained(tmp_path)) == init_config(scheduler)


def saved(folder: Path) -> Path:
    with_plans(plan_of(6, 2)).save_pretrained(folder)
    return folder / "9_steps.solver"


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    path = saved(tmp_path)
    good = path.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            SDMScheduler.from_pretrained(tmp_path)
        assert "9_steps" in str(error.value)

    path.write_bytes(good[: len(good) // 2])
    refused("safetensors")
    save_file({"x": torch.zeros(1)}, path)
    refused("its record has no .diffusers_gas.")
    config = path.with_name("scheduler_config.json")
    path.write_bytes(good)
    path.rename(path.with_name("8_steps.solver"))
    with pytest.raises(OSError, match=r"no 9_steps\.solver"):
        SDMScheduler.from_pretrained(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_solver_steps": [8]}))
    with pytest.raises(ValueError, match=r"8_steps.*9 evaluations"):
        SDMScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"sigmas": torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)},
        {"sigmas": torch.tensor([2.0, 1.0, 0.0]), "switch_index": torch.tensor(0)},
        {"sigmas": torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), "switch_index": torch.tensor([0])},
        {"sigmas": torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), "switch_index": torch.tensor(5)},
        {"sigmas": torch.tensor([[2.0], [0.0]], dtype=torch.float64), "switch_index": torch.tensor(0)},
        {"sigmas": torch.tensor([2.0, float("nan"), 0.0], dtype=torch.float64), "switch_index": torch.tensor(0)},
    ],
    ids=["missing", "float32", "shape", "switch", "two-dimensional", "nan"],
)
def test_wrong_tensors_are_refused(tmp_path, tensors):
    path = saved(tmp_path)
    record = {"plan": {"solver": "heun"}, "scheduler": SDMScheduler()._solver_config(), "provenance": {}}
    save_file(tensors, path, {"diffusers_gas": json.dumps(record)})
    with pytest.raises(ValueError, match="9_steps"):
        SDMScheduler.from_pretrained(tmp_path)


def test_gas_and_sdm_do_not_take_each_others_files(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"9_steps.*not hold a solver"):
        GASScheduler.from_pretrained(tmp_path)
    gas = GASScheduler()
    gas.add_solver(GeneralizedSolver(4))
    gas.save_pretrained(tmp_path / "gas")
    with pytest.raises(
        ValueError, match=r"4_steps.*not hold a solver for this SDMScheduler: its record has no 'plan'"
    ):
        SDMScheduler.from_pretrained(tmp_path / "gas")


def test_a_config_that_contradicts_the_file_is_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(path.read_text().replace('"beta_end": 0.02', '"beta_end": 0.03'))
    with pytest.raises(ValueError, match=r"9_steps.*beta_end.*0\.02.*0\.03"):
        SDMScheduler.from_pretrained(tmp_path)


# Bad input


@pytest.mark.parametrize("num_inference_steps", [0, -1])
def test_step_counts_below_one_are_refused(num_inference_steps):
    with pytest.raises(ValueError, match=r"num_inference_steps.*at least 1"):
        SDMScheduler().set_timesteps(num_inference_steps)


def test_few_evaluations_warn(caplog):
    with caplog.at_level(logging.WARNING):
        SDMScheduler().set_timesteps(4)
    assert "too few" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        with_plans(SDMScheduler().plan_for(4)).set_timesteps(4)
    assert not caplog.text


def test_set_timesteps_arguments():
    scheduler = SDMScheduler(**FLOW)
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler.set_timesteps()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 9, 9).tolist())
    assert len(scheduler.timesteps) == 9
    with pytest.raises(ValueError, match="mu"):
        SDMScheduler(use_flow_sigmas=True, use_dynamic_shifting=True).set_timesteps(8)


def test_mu_shifts_a_plan():
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    plan = plan_of(6, 2)
    shifted, plain = with_plans(plan, **config), with_plans(plan, **FLOW | {"flow_shift": 2.0})
    shifted.set_timesteps(9, mu=torch.tensor(2.0).log().item())
    plain.set_timesteps(9)
    torch.testing.assert_close(shifted.timesteps, plain.timesteps)


def test_steps_out_of_turn():
    x = noise(1, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        SDMScheduler().step(x, 999, x)
    scheduler = with_plans(plan_of(6, 2))
    run(scheduler, 9)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, scheduler.timesteps[-1], x)


@pytest.mark.parametrize(
    "setting", [{"solver": "rk4"}, {"tau": 0.0}, {"tau": float("nan")}, {"prediction_type": "score"}]
)
def test_unknown_settings_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SDMScheduler(**setting)


# A distilled solver that starts from a plan


@pytest.mark.parametrize("num_inference_steps", [4, 6, 8, 11])
@all_solvers
def test_an_initial_solver_has_the_times_of_the_plan(num_inference_steps, solver):
    scheduler = with_plans(plan_of(8, 3, solver))
    schedule, plan = scheduler.noise_schedule(), scheduler.plan_for(num_inference_steps)
    times = scheduler.initial_solver(num_inference_steps).times()
    torch.testing.assert_close(times[[0, -1]], torch.stack([plan.times(schedule)[0], torch.tensor(1e-3).double()]))
    if plan.num_steps == num_inference_steps:
        torch.testing.assert_close(times[:-1], plan.times(schedule))


def test_families_cover_noise_and_image_pipelines():
    assert len(FROM_NOISE) >= 9 and set(FROM_IMAGES) <= set(FAMILIES)
    assert random_states(pipeline("ddpm"), 2).shape == (2, 3, 8, 8)


def test_sample_latents_ends_with_an_online_scheduler(digits):
    scheduler = SDMScheduler.from_config(digits.scheduler.config, tau=0.05, online=True)
    _, final = sample_latents(digits, scheduler, 12, batch_size=2, generator=torch.Generator().manual_seed(0))
    assert final.isfinite().all()
