"""Flow matching: shifts, terminal values and pipelines' own noise levels, against Diffusers' and an exact solution."""

import functools
import inspect
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from saved_schedulers import perturbed
from tiny_pipelines import TinyPipeline, build, generators, record_steps
from torch import Tensor

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMPlan, SDMScheduler
from diffusers_gas.schedulers.sdm_plan import flow_shift


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DYNAMIC = FLOW | {"use_dynamic_shifting": True}
# Pipelines that pass `sigmas`, and all but SD3's `mu`, to a scheduler; Qwen's and LTX' configs have a `shift_terminal`.
PASSES_SIGMAS = ("qwen-image", "z-image", "ltx-video", "flux-img2img")

pipeline = functools.cache(build)
both_schedulers = pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(x: Tensor) -> Tensor:
    return torch.sin(1.3 * x) + 0.2 * x


def sample(scheduler: SchedulerMixin, x: Tensor) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(network(x), t, x, return_dict=False)[0]
    return x


# What pipelines pass


@pytest.mark.parametrize("num_inference_steps", [4, 8])
@pytest.mark.parametrize("name", PASSES_SIGMAS)
def test_an_unmodified_pipeline_with_first_order_is_its_own(name, num_inference_steps):
    """Noise levels, dynamic shift and terminal value as the pipeline asks for them, from sigma = 1 to sigma = 0."""
    tiny = pipeline(name)
    expected = record_steps(tiny, tiny.pipe.scheduler, num_inference_steps=num_inference_steps)
    scheduler = GASScheduler.from_config(tiny.pipe.scheduler.config, solver_order=1, t_end=0.0)
    steps = record_steps(tiny, scheduler, num_inference_steps=num_inference_steps)
    for step, other in zip(steps, expected, strict=True):
        assert step.timestep.item() == pytest.approx(other.timestep.item(), abs=1e-3)
        torch.testing.assert_close(step.prev_sample, other.prev_sample, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PASSES_SIGMAS)
@both_schedulers
def test_what_is_learned_or_measured_has_times_of_its_own(scheduler_class, name):
    """The pipeline's evenly spaced `sigmas` say how many steps are meant; its shift acts, its terminal value does not."""
    tiny = pipeline(name)
    scheduler = scheduler_class.from_config(tiny.pipe.scheduler.config)
    if scheduler_class is GASScheduler:
        solver = perturbed(GeneralizedSolver(6), 0.1, offset_scale=0.01)
        scheduler.add_solver(solver)
        times = (solver.times()[:-1] + solver.timestep_offsets).detach()
    else:
        levels = torch.tensor([50.0, 8.0, 3.0, 1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
        scheduler.add_plan(SDMPlan(levels, 5))
        times = levels[:-1] / (1 + levels[:-1])
    steps = record_steps(tiny, scheduler, num_inference_steps=6)
    expected = [tiny.network_time(t) for t in times.tolist()]
    if "img2img" in name:  # of strength 0.5
        expected = expected[3:]
    assert [step.timestep.item() for step in steps] == pytest.approx(expected, rel=1e-4)


@both_schedulers
def test_uneven_noise_levels_are_refused_where_they_cannot_be_followed(scheduler_class):
    scheduler = scheduler_class(**FLOW)
    if scheduler_class is GASScheduler:
        scheduler.add_solver(GeneralizedSolver(4))
    else:
        scheduler.add_plan(scheduler.plan_for(4))
    with pytest.raises(ValueError, match="sigmas"):
        scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.5, 0.1])


# Shifts


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
@pytest.mark.parametrize("mu", [0.5, 1.15, 2.05])
def test_dynamic_shift_is_diffusers(mu, time_shift_type):
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=time_shift_type)
    ours = GASScheduler.from_config(theirs.config, solver_order=1, t_end=0.0)
    sdm = SDMScheduler.from_config(theirs.config)
    sigmas = np.linspace(1, 1 / 8, 8).tolist()
    for scheduler in (theirs, ours, sdm):
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-3)
    x = noise(2, 3, 4, 4).float()
    torch.testing.assert_close(sample(ours, x), sample(theirs, x), rtol=0, atol=1e-5)
    factor = math.exp(mu) if time_shift_type == "exponential" else mu
    assert flow_shift(sdm._steps.noise_schedule) == pytest.approx(factor)


@pytest.mark.parametrize("other_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("dynamic", [False, True])
def test_flow_sigmas_of_multistep_schedulers(dynamic, shift, other_class):
    """DPM-Solver++ 2M on flow matching, with Diffusers' noise levels; UniPC's predictor differs from the second step on."""
    settings = {"use_dynamic_shifting": True} if dynamic else {"flow_shift": shift}
    order = 2 if other_class is DPMSolverMultistepScheduler else 1
    corrector = {"disable_corrector": list(range(8))} if other_class is UniPCMultistepScheduler else {}
    theirs = other_class(**FLOW, **settings, solver_order=order, final_sigmas_type="zero", **corrector)
    mu = {"mu": math.log(shift)} if dynamic else {}
    accepts = inspect.signature(theirs.set_timesteps).parameters
    theirs.set_timesteps(8, **{name: value for name, value in mu.items() if name in accepts})
    ours = GASScheduler.from_config(theirs.config, t_end=0.0)
    levels = theirs.sigmas[:-1].double()
    # Their second-order flow steps begin at a sigma a little below 1, where lambda is finite.
    ours.set_timesteps(sigmas=(levels / (shift - (shift - 1) * levels)).tolist(), **mu)
    x = noise(2, 3, 4, 4).float()
    torch.testing.assert_close(sample(ours, x), sample(theirs, x), rtol=0, atol=2e-4)


@both_schedulers
@pytest.mark.parametrize("other_class", [DEISMultistepScheduler, DPMSolverMultistepScheduler])
def test_a_scheduler_that_has_sampled_with_a_dynamic_shift_is_replaced(other_class, scheduler_class):
    """It has written the shift to an attribute of its config."""
    theirs = other_class(**FLOW, use_dynamic_shifting=True)
    before = scheduler_class.from_config(theirs.config)
    theirs.set_timesteps(8, mu=1.1)
    assert theirs.config.flow_shift == pytest.approx(math.exp(1.1)) and theirs.config["flow_shift"] == 1
    after = scheduler_class.from_config(theirs.config)
    for scheduler in (before, after):
        scheduler.set_timesteps(8, mu=0.7)
    assert torch.equal(before.timesteps, after.timesteps)


@both_schedulers
def test_a_dynamic_shift_must_be_passed(scheduler_class):
    with pytest.raises(ValueError, match="mu"):
        scheduler_class(**DYNAMIC).set_timesteps(8)


def at_resolution(tiny: TinyPipeline, scheduler: GASScheduler, size: int) -> list:
    return record_steps(tiny, scheduler, batch_size=1, num_inference_steps=4, height=size, width=size)


def test_a_solver_serves_every_resolution():
    """Its times come before the shift: at either resolution it is Euler's method on the shifts of the same times."""
    tiny = pipeline("flux")
    times = torch.tensor([1.0, 0.83, 0.5, 0.21, 1e-3], dtype=torch.float64)
    scheduler = GASScheduler.from_config(tiny.pipe.scheduler.config)
    scheduler.add_solver(GeneralizedSolver(4, theory_order=1, times=times))
    by_size = {}
    for size in (8, 16):
        steps = at_resolution(tiny, scheduler, size)
        euler = tiny.pipe.scheduler
        expected = record_steps(
            tiny, euler, batch_size=1, sigmas=times[:-1].tolist(), num_inference_steps=4, height=size, width=size
        )
        for step, other in zip(steps, expected, strict=True):
            assert step.timestep.item() == pytest.approx(other.timestep.item(), abs=1e-3)
            torch.testing.assert_close(step.sample, other.sample, rtol=0, atol=1e-4)
        by_size[size] = [step.timestep.item() for step in steps]
    assert by_size[8][0] == by_size[16][0] == 1000  # noise is noise at every resolution
    assert all(small < large for small, large in zip(by_size[8][1:], by_size[16][1:]))


def test_a_static_shift_is_not_part_of_a_solver(tmp_path):
    """Loading under another shift is allowed: that is another resolution, not another network."""
    scheduler = GASScheduler(**FLOW, flow_shift=3.0)
    scheduler.add_solver(perturbed(GeneralizedSolver(4), 0.1, offset_scale=0.01))
    scheduler.save_pretrained(tmp_path)
    other = GASScheduler.from_pretrained(tmp_path, flow_shift=6.0)
    other.set_timesteps(4)
    scheduler.set_timesteps(4)
    sigmas, shifted = scheduler.timesteps / 1000, other.timesteps / 1000
    torch.testing.assert_close(2 * sigmas / (1 + sigmas), shifted, rtol=1e-5, atol=1e-6)


# Terminal values


@pytest.mark.parametrize("num_inference_steps", [2, 4, 8])
@pytest.mark.parametrize("terminal", [0.02, 0.1])
def test_terminal_value_is_diffusers(terminal, num_inference_steps):
    theirs = FlowMatchEulerDiscreteScheduler(shift=4.0, shift_terminal=terminal)
    ours = GASScheduler.from_config(theirs.config, solver_order=1, t_end=0.0)
    sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0, atol=1e-3)
    assert ours.timesteps[-1].item() == pytest.approx(1000 * terminal, abs=1e-3)
    x = noise(2, 3, 4, 4).float()
    torch.testing.assert_close(sample(ours, x), sample(theirs, x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mu", [0.5, 2.0])
@both_schedulers
def test_untrained_times_end_at_the_terminal_value(scheduler_class, mu):
    scheduler = scheduler_class(**DYNAMIC, shift_terminal=0.1)
    plain = scheduler_class(**DYNAMIC)
    for current in (scheduler, plain):
        current.set_timesteps(8, mu=mu)
    assert scheduler.timesteps[-1].item() == pytest.approx(100, abs=1e-2)
    assert plain.timesteps[-1] != scheduler.timesteps[-1] and (scheduler.timesteps.diff() <= 0).all()
    # Distances from pure noise are all stretched by the same factor.
    ratios = (1000 - scheduler.timesteps[1:]) / (1000 - plain.timesteps[1:])
    torch.testing.assert_close(ratios, ratios[-1].expand_as(ratios), rtol=1e-3, atol=0)


@both_schedulers
def test_a_single_step_is_not_stretched(scheduler_class, caplog):
    scheduler = scheduler_class(**FLOW, shift_terminal=0.1)
    with caplog.at_level(logging.ERROR):
        scheduler.set_timesteps(1)
    assert scheduler.timesteps.isfinite().all() and scheduler.timesteps[0] > 50


@both_schedulers
def test_terminal_value_survives_a_change_of_schedulers(scheduler_class, tmp_path):
    theirs = FlowMatchEulerDiscreteScheduler(shift=4.0, shift_terminal=0.02)
    scheduler = scheduler_class.from_config(theirs.config)
    scheduler.save_pretrained(tmp_path)
    again = FlowMatchEulerDiscreteScheduler.from_config(scheduler_class.from_pretrained(tmp_path).config)
    assert again.config.shift_terminal == 0.02


# Against the exact solution


class Gaussian:
    """Data from N(mean, std^2), whose flow is known: x(t) keeps its distance from the mean in standard deviations."""

    mean, std = 0.7, 0.6

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """E[noise - data | x], what a flow-matching network learns."""
        alpha = 1 - sigma
        data = self.mean + alpha * self.std**2 / self.variance(sigma) * (x - alpha * self.mean)
        return (x - alpha * data) / sigma - data

    def variance(self, sigma: float) -> float:
        return (1 - sigma) ** 2 * self.std**2 + sigma**2

    def solution(self, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        scale = math.sqrt(self.variance(sigma_next) / self.variance(sigma))
        return (1 - sigma_next) * self.mean + scale * (x - (1 - sigma) * self.mean)


def sdm_error(solver: str, switch_index: int, num_steps: int, shift: float) -> float:
    """Error at the last evaluation, from sigma = 0.95 to 0.01, before the first-order step to data."""
    problem = Gaussian()
    high, low = (sigma / (1 - sigma) / shift for sigma in (0.95, 0.01))
    levels = torch.linspace(math.log(high), math.log(low), num_steps, dtype=torch.float64).exp()
    scheduler = SDMScheduler(**FLOW, flow_shift=shift)
    switch_index = num_steps - 1 if switch_index < 0 else switch_index
    plan = SDMPlan(torch.cat([levels, levels.new_zeros(1)]), switch_index, solver)
    scheduler.add_plan(plan)
    scheduler.set_timesteps(plan.num_inference_steps)
    start = x = noise(4, 3)
    for k, t in enumerate(scheduler.timesteps[:-1]):
        x = scheduler.step(problem.velocity(x, scheduler._steps.noise_levels[k]), t, x).prev_sample
    return (x - problem.solution(start, 0.95, 0.01)).abs().max().item()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    "solver, switch_index, low, high", [("heun", -1, 0.9, 1.1), ("heun", 0, 1.85, 2.3), ("dpmsolver++", 1, 1.85, 2.3)]
)
def test_order_of_convergence_of_plans(solver, switch_index, low, high, shift):
    errors = [sdm_error(solver, switch_index, num_steps, shift) for num_steps in (41, 81)]
    assert low < math.log2(errors[0] / errors[1]) < high


@pytest.mark.parametrize("shift", [1.0, 3.0])
@both_schedulers
def test_pure_noise_to_data(scheduler_class, shift):
    """Both ends of the schedule, sigma = 1 where alpha = 0, and sigma = 0, in the schedulers' own untrained times."""
    problem, errors = Gaussian(), []
    end = {"t_end": 0.0} if scheduler_class is GASScheduler else {}
    for num_inference_steps in (20, 160):
        scheduler = scheduler_class(**FLOW, flow_shift=shift, **end)
        scheduler.set_timesteps(num_inference_steps)
        start = x = noise(4, 3)
        for k, t in enumerate(scheduler.timesteps):
            x = scheduler.step(problem.velocity(x, scheduler._steps.noise_levels[k]), t, x).prev_sample
        errors.append((x - problem.solution(start, 1.0, 0.0)).abs().max().item())
    # `SDMScheduler` takes the first noise to be at t = 0.999, which costs it 1e-3 at most.
    assert errors[1] < 0.25 * errors[0] and errors[1] < 4e-3


@both_schedulers
def test_generators_do_not_matter(scheduler_class):
    """Sampling is deterministic, whatever generator a pipeline passes."""
    scheduler = scheduler_class(**FLOW)
    x = noise(1, 3)
    scheduler.set_timesteps(6)
    expected = scheduler.step(network(x), scheduler.timesteps[0], x).prev_sample
    scheduler.set_timesteps(6)
    result = scheduler.step(network(x), scheduler.timesteps[0], x, generator=generators(1)).prev_sample
    assert torch.equal(result, expected)


def settings(scheduler: SchedulerMixin) -> dict[str, Any]:
    names = inspect.signature(type(scheduler).__init__).parameters.keys() - {"self"}
    return {name: scheduler.config[name] for name in names}


@pytest.mark.parametrize(
    "settings_of_flow", [{"shift": 3.0}, {"use_dynamic_shifting": True, "time_shift_type": "linear"}]
)
@both_schedulers
def test_flow_settings_survive_both_ways(scheduler_class, settings_of_flow):
    theirs = FlowMatchEulerDiscreteScheduler(**settings_of_flow, base_shift=0.4, max_image_seq_len=8192)
    ours = scheduler_class.from_config(theirs.config)
    assert settings(FlowMatchEulerDiscreteScheduler.from_config(ours.config)) == settings(theirs)
    # Pipelines read the range of the shift from the scheduler.
    assert ours.config.base_shift == 0.4 and ours.config.max_image_seq_len == 8192
