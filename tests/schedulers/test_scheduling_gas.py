"""`GASScheduler` as a Diffusers scheduler: the ideas of Diffusers' own scheduler tests, and the solver's own promises."""

import copy
import inspect
import json
import logging
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import AysSchedules, SchedulerOutput
from saved_schedulers import FLOW, PREDICTIONS, STABLE_DIFFUSION, perturbed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_gas import GASScheduler, GeneralizedSolver


Network = Callable[[Tensor, Tensor], Tensor]


def network(x: Tensor, t: Tensor) -> Tensor:
    """A smooth elementwise stand-in for a network."""
    return torch.sin(1.3 * x + t.to(x.dtype) / 500) + 0.2 * x


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained_solver(
    num_inference_steps: int, order: int | None = None, seed: int = 0, **kwargs: Any
) -> GeneralizedSolver:
    return perturbed(GeneralizedSolver(num_inference_steps, order, **kwargs), 0.05, offset_scale=0.003, seed=seed)


def trained_scheduler(*step_counts: int, **config: Any) -> GASScheduler:
    scheduler = GASScheduler(**config)
    for num_inference_steps in step_counts or (4,):
        scheduler.add_solver(trained_solver(num_inference_steps))
    return scheduler


def sample(scheduler: SchedulerMixin, x: Tensor, network: Network = network) -> Tensor:
    """The loop of every Diffusers pipeline, after `set_timesteps`."""
    for t in scheduler.timesteps[scheduler.begin_index or 0 :]:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return x


def run(scheduler: SchedulerMixin, num_inference_steps: int = 4, **kwargs: Any) -> Tensor:
    scheduler.set_timesteps(num_inference_steps, **kwargs)
    return sample(scheduler, noise(2, 3, 4, 4))


def init_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The settings that the scheduler's own class knows."""
    names = inspect.signature(type(scheduler).__init__).parameters.keys() - {"self"}
    return {name: scheduler.config[name] for name in names}


# Diffusers' interface


@pytest.mark.parametrize("config", PREDICTIONS.values(), ids=PREDICTIONS)
def test_public_interface(config):
    scheduler = GASScheduler(**config)
    assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 1000)
    assert (scheduler.step_index, scheduler.begin_index, scheduler.num_inference_steps) == (None, None, None)
    scheduler.set_timesteps(5)
    assert scheduler.num_inference_steps == 5
    assert scheduler.timesteps.shape == (5,) and scheduler.timesteps.dtype == torch.float32
    assert scheduler.sigmas.shape == (6,) and (scheduler.sigmas.diff() < 0).all()
    x = noise(2, 3, 4, 4)
    assert torch.equal(scheduler.scale_model_input(x, scheduler.timesteps[0]), x)
    with pytest.raises(AttributeError, match="does_not_exist"):
        scheduler.does_not_exist  # noqa: B018
    parameters = inspect.signature(scheduler.step).parameters
    assert list(parameters)[:3] == ["model_output", "timestep", "sample"]
    assert {"generator", "return_dict"} <= set(parameters)
    assert {"num_inference_steps", "device", "timesteps", "sigmas", "mu"} <= set(
        inspect.signature(scheduler.set_timesteps).parameters
    )


def test_first_network_time_is_the_last_trained_one():
    scheduler = GASScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 999
    scheduler = GASScheduler(**FLOW)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0].item() == pytest.approx(1000, rel=2e-4)


@pytest.mark.parametrize("shape", [(2, 7), (2, 5, 6), (1, 3, 4, 4), (2, 4, 3, 4, 4)])
def test_step_shape(shape):
    scheduler = trained_scheduler()
    scheduler.set_timesteps(4)
    x = noise(*shape)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
        assert x.shape == shape


@pytest.mark.parametrize("config", PREDICTIONS.values(), ids=PREDICTIONS)
def test_tuple_and_dict_outputs_are_the_same(config):
    scheduler, other = GASScheduler(**config), GASScheduler(**config)
    scheduler.set_timesteps(4)
    other.set_timesteps(4)
    x = noise(2, 3, 4, 4)
    for t in scheduler.timesteps:
        output = scheduler.step(network(x, t), t, x)
        as_tuple = other.step(network(x, t), t, x, return_dict=False)
        assert isinstance(output, SchedulerOutput)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
        assert torch.equal(output.prev_sample, as_tuple[0]) and torch.equal(output[0], as_tuple[0])
        x = output.prev_sample


@pytest.mark.parametrize("config", PREDICTIONS.values(), ids=PREDICTIONS)
def test_save_and_load_round_trip(tmp_path, config):
    scheduler = trained_scheduler(4, 6, **config)
    scheduler.save_pretrained(tmp_path)
    loaded = GASScheduler.from_pretrained(tmp_path)
    assert init_config(loaded) == init_config(scheduler)
    assert sorted(loaded.solvers) == [4, 6]
    for num_inference_steps in (4, 6):
        assert torch.equal(run(scheduler, num_inference_steps), run(loaded, num_inference_steps))
        assert torch.equal(scheduler.timesteps, loaded.timesteps)


def test_save_and_load_keeps_every_setting(tmp_path):
    settings = {
        "num_train_timesteps": 500,
        "trained_betas": np.linspace(1e-4, 0.03, 500).tolist(),
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "variance_type": "learned_range",
        "t_start": 0.9,
        "t_end": 5e-3,
        "solver_order": 3,
        "lower_order_final": False,
        "use_karras_sigmas": True,
        "use_theory_for_untrained_steps": True,
    }
    scheduler = GASScheduler(**settings)
    scheduler.add_solver(trained_solver(4, t_end=5e-3))
    scheduler.save_pretrained(tmp_path)
    loaded = GASScheduler.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in settings} == settings
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "GASScheduler"
    assert torch.equal(run(scheduler, 4), run(loaded, 4))
    assert torch.equal(run(scheduler, 7), run(loaded, 7))


# Switching to and from other schedulers

# The config of a scheduler that was made in Python lacks the `_class_name` that one from a file has.
CONFIG_SOURCES = {"made": lambda scheduler: scheduler.config, "loaded": lambda s: json.loads(s.to_json_string())}
OTHER_SCHEDULERS = {
    "dpmsolver": DPMSolverMultistepScheduler(
        **STABLE_DIFFUSION,
        prediction_type="v_prediction",
        solver_order=3,
        use_karras_sigmas=True,
        lower_order_final=False,
        timestep_spacing="leading",
        steps_offset=1,
        euler_at_final=True,
    ),
    "unipc": UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, disable_corrector=[0]
    ),
    "ddim": DDIMScheduler(**STABLE_DIFFUSION, set_alpha_to_one=False, steps_offset=1, clip_sample=False),
    "ddim_zero_snr": DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    "euler": EulerDiscreteScheduler(**STABLE_DIFFUSION, interpolation_type="log_linear", steps_offset=1),
    "flow": FlowMatchEulerDiscreteScheduler(shift=3.0, max_shift=1.3),
    "flow_default": FlowMatchEulerDiscreteScheduler(),
    "edm": diffusers.EDMEulerScheduler(sigma_max=14.0, sigma_data=1.0, rho=5.0, prediction_type="v_prediction"),
    "edm_dpmsolver": diffusers.EDMDPMSolverMultistepScheduler(),
    "flow_dynamic": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
}


@pytest.mark.parametrize("config_of", CONFIG_SOURCES.values(), ids=CONFIG_SOURCES)
@pytest.mark.parametrize("other", OTHER_SCHEDULERS.values(), ids=OTHER_SCHEDULERS)
def test_switching_from_another_scheduler_and_back(other, config_of, tmp_path):
    scheduler = GASScheduler.from_config(config_of(other))
    for name, value in init_config(scheduler).items():
        if name in init_config(other) and not type(other).__name__.startswith("FlowMatch"):
            assert value == other.config[name], name
    back = type(other).from_config(config_of(scheduler))
    assert init_config(back) == init_config(other)

    scheduler.save_pretrained(tmp_path)
    loaded = GASScheduler.from_pretrained(tmp_path)
    assert init_config(loaded) == init_config(scheduler)
    assert init_config(type(other).from_config(loaded.config)) == init_config(other)


@pytest.mark.parametrize("config_of", CONFIG_SOURCES.values(), ids=CONFIG_SOURCES)
def test_flow_settings_are_translated(config_of):
    scheduler = GASScheduler.from_config(config_of(FlowMatchEulerDiscreteScheduler(shift=3.0)))
    assert scheduler.config.use_flow_sigmas and scheduler.config.flow_shift == 3.0
    assert scheduler.config.prediction_type == "flow_prediction"
    scheduler = GASScheduler.from_config(config_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)))
    assert scheduler.config.use_dynamic_shifting
    with pytest.raises(ValueError, match="mu"):
        scheduler.set_timesteps(4)


GAS_SETTINGS = {
    "vp": STABLE_DIFFUSION
    | {"t_end": 2e-3, "solver_order": 3, "t_start": 0.98, "use_theory_for_untrained_steps": True}
    | {"lower_order_final": True, "variance_type": "learned_range"},
    "zero_snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "variance_type": "learned"}
    | {"lower_order_final": False},
}
# Going by way of a flow-matching scheduler turns a variance-preserving config into flow matching, rightly so.
COMPATIBLES = sorted({other.__name__ for other in GASScheduler().compatibles} - {"FlowMatchEulerDiscreteScheduler"})


@pytest.mark.parametrize("config_of", CONFIG_SOURCES.values(), ids=CONFIG_SOURCES)
@pytest.mark.parametrize("settings", GAS_SETTINGS.values(), ids=GAS_SETTINGS)
@pytest.mark.parametrize("compatible", COMPATIBLES)
def test_switching_to_each_compatible_scheduler_and_back(compatible, settings, config_of):
    """Diffusers' `test_compatibles`: nothing that was set is lost on the way."""
    scheduler = GASScheduler(**settings)
    other_class = getattr(diffusers, compatible)
    if other_class.__class__.__name__ == "DummyObject":
        pytest.skip(f"{compatible} needs a package that is not installed")
    back = GASScheduler.from_config(config_of(other_class.from_config(config_of(scheduler))))
    assert init_config(back) == init_config(scheduler)


@pytest.mark.parametrize("config_of", CONFIG_SOURCES.values(), ids=CONFIG_SOURCES)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_switching_a_flow_config_to_flow_matching_euler_and_back(shift, config_of):
    scheduler = GASScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, solver_order=3)
    other = FlowMatchEulerDiscreteScheduler.from_config(config_of(scheduler))
    assert other.config.shift == shift
    assert init_config(GASScheduler.from_config(config_of(other))) == init_config(scheduler)


def test_from_config_accepts_overrides_and_foreign_keys():
    config = DDPMScheduler(**STABLE_DIFFUSION).config
    scheduler = GASScheduler.from_config(config, solver_order=3, t_end=2e-3)
    assert (scheduler.config.solver_order, scheduler.config.t_end) == (3, 2e-3)
    scheduler, unused = GASScheduler.from_config(dict(config) | {"of_the_future": 2}, return_unused_kwargs=True)
    assert unused["of_the_future"] == 2


def test_unknown_prediction_type_is_refused():
    with pytest.raises(ValueError, match="prediction_type"):
        GASScheduler(prediction_type="score")


# Precision and prediction types


@pytest.mark.parametrize("config", PREDICTIONS.values(), ids=PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_result_has_the_dtype_of_the_sample_and_is_computed_in_float32_or_more(dtype, config):
    reference_dtype = torch.float64
    x, outputs = noise(2, 3, 4, 4).to(dtype), [noise(2, 3, 4, 4, seed=k).to(dtype) for k in range(1, 5)]
    scheduler, reference = trained_scheduler(**config), trained_scheduler(**config)
    scheduler.set_timesteps(4)
    reference.set_timesteps(4)
    first = x
    for t, output in zip(scheduler.timesteps, outputs):
        expected = reference.step(output.to(reference_dtype), t, x.to(reference_dtype)).prev_sample
        x = scheduler.step(output, t, x).prev_sample
        assert x.dtype == dtype
        scale = max(expected.abs().max().item(), 1.0)
        rounding = torch.finfo(dtype).eps / 2 + 20 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        torch.testing.assert_close(x.to(reference_dtype), expected, rtol=0, atol=rounding * scale)
    assert torch.equal(first, noise(2, 3, 4, 4).to(dtype))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_sample_and_model_output_may_differ_in_dtype(dtypes):
    scheduler = trained_scheduler(**FLOW)
    scheduler.set_timesteps(4)
    sample_dtype, output_dtype = dtypes
    x = noise(2, 3, 4, 4).to(sample_dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t).to(output_dtype), t, x).prev_sample
        assert x.dtype == sample_dtype and x.isfinite().all()


def predict_as(prediction_type: str, scheduler: GASScheduler) -> Network:
    """A network whose data prediction is tanh(x), handed out as another prediction type of the current step."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        step = scheduler.timesteps.tolist().index(t.item())
        noise_schedule, times = scheduler.noise_schedule(), scheduler._sampler.times().detach()
        alpha, sigma = noise_schedule.alpha(times[step]), noise_schedule.sigma(times[step])
        data = torch.tanh(x)
        eps = (x - alpha * data) / sigma
        return {
            "sample": data,
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * data,
            "flow_prediction": eps - data,
        }[prediction_type]

    return predict


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize(
    "config", [STABLE_DIFFUSION, {"use_flow_sigmas": True, "flow_shift": 2.0}], ids=["vp", "flow"]
)
def test_prediction_types_agree(prediction_type, config):
    """v = alpha eps - sigma x0 and flow = eps - x0 are definitions, whatever the noise schedule."""
    x = noise(2, 3, 4, 4).double()
    results = []
    for kind in ("sample", prediction_type):
        # Below 1, since epsilon says nothing about the data where alpha is 0.
        scheduler = GASScheduler(**config, prediction_type=kind, t_start=0.95)
        scheduler.set_timesteps(5)
        results.append(sample(scheduler, x, predict_as(kind, scheduler)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-9)


def test_prediction_types_agree_where_alpha_is_zero():
    x = noise(2, 3, 4, 4).double()
    results = []
    for kind in ("sample", "flow_prediction", "v_prediction"):
        scheduler = GASScheduler(use_flow_sigmas=True, prediction_type=kind, solver_order=3)
        scheduler.set_timesteps(5)
        results.append(sample(scheduler, x, predict_as(kind, scheduler)))
        assert results[-1].isfinite().all()
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=1e-9)


def test_epsilon_prediction_is_refused_where_alpha_is_zero():
    """eps = x there says nothing about the data: better an error than an image of NaN."""
    with pytest.raises(ValueError, match="epsilon"):
        GASScheduler(use_flow_sigmas=True, prediction_type="epsilon").set_timesteps(sigmas=[1.0, 0.8, 0.3])


def test_convert_model_output_is_the_data_prediction():
    scheduler = GASScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(4)
    x, data = noise(2, 3, 4, 4).double(), noise(2, 3, 4, 4, seed=1).double()
    for k, t in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler._steps.alphas[k], scheduler._steps.noise_levels[k]
        output = (x - alpha * data) / sigma
        after = scheduler.step(output, t, x).prev_sample
        if k + 1 < 4:
            alpha, sigma = scheduler._steps.alphas[k + 1], scheduler._steps.noise_levels[k + 1]
            converted = scheduler.convert_model_output((after - alpha * data) / sigma, after)
            torch.testing.assert_close(converted, data, rtol=0, atol=1e-9)
        x = after


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variance_channels_are_dropped(variance_type):
    scheduler, plain = GASScheduler(variance_type=variance_type), GASScheduler()
    plain.set_timesteps(4)
    scheduler.set_timesteps(4)
    x = noise(2, 3, 4, 4)
    expected = sample(plain, x)
    result = sample(scheduler, x, lambda x, t: torch.cat([network(x, t), torch.full_like(x, 7.0)], dim=1))
    assert torch.equal(result, expected)


# Noising


def test_add_noise_equals_diffusers_at_trained_timesteps():
    scheduler, other = GASScheduler(**STABLE_DIFFUSION), DDPMScheduler(**STABLE_DIFFUSION)
    x, eps, timesteps = noise(5, 3, 4, 4), noise(5, 3, 4, 4, seed=1), torch.tensor([0, 13, 500, 998, 999])
    expected = other.add_noise(x, eps, timesteps)
    torch.testing.assert_close(scheduler.add_noise(x, eps, timesteps), expected, rtol=0, atol=1e-5)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.add_noise(x, eps, timesteps), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scheduler.scale_noise(x, timesteps, eps), expected, rtol=0, atol=1e-5)


def test_scale_noise_equals_flow_matching_euler():
    other = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = GASScheduler.from_config(other.config)
    other.set_timesteps(6)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6).tolist())
    x, eps = noise(6, 3, 4, 4), noise(6, 3, 4, 4, seed=1)
    result = scheduler.scale_noise(x, other.timesteps, eps)
    torch.testing.assert_close(result, other.scale_noise(x, other.timesteps, eps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, FLOW], ids=["vp", "flow"])
def test_add_noise_reaches_the_state_that_a_step_starts_from(config):
    """The time of a step's state, not the time with its learned offset that the network is told."""
    scheduler = trained_scheduler(4, **config)
    scheduler.set_timesteps(4)
    noise_schedule, times = scheduler.noise_schedule(), scheduler.solvers[4].times().detach()
    x, eps = noise(4, 3, 2, 2).double(), noise(4, 3, 2, 2, seed=1).double()
    alpha, sigma = (f(times[:-1]).view(4, 1, 1, 1) for f in (noise_schedule.alpha, noise_schedule.sigma))
    expected = alpha * x + sigma * eps
    torch.testing.assert_close(scheduler.add_noise(x, eps, scheduler.timesteps), expected, rtol=0, atol=1e-12)
    for k in range(4):
        scheduler.set_begin_index(k)
        result = scheduler.add_noise(x[k:][:1], eps[k:][:1], scheduler.timesteps[k:][:1].repeat(1))
        torch.testing.assert_close(result, expected[k:][:1], rtol=0, atol=1e-12)


def test_add_noise_during_sampling_reaches_the_next_state():
    """Inpainting noises the known region to the state that was just computed, with any value for the time."""
    scheduler = trained_scheduler(4)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(1)
    x, eps = noise(1, 3, 2, 2).double(), noise(1, 3, 2, 2, seed=1).double()
    for k in range(1, 4):
        scheduler.step(eps, scheduler.timesteps[k], x)
        expected = scheduler._steps.alphas[k + 1] * x + scheduler._steps.noise_levels[k + 1] * eps
        result = scheduler.add_noise(x, eps, scheduler.timesteps[min(k + 1, 3)][None])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_add_noise_keeps_the_dtype(dtype):
    scheduler = GASScheduler()
    scheduler.set_timesteps(4)
    x = noise(2, 3, 4, 4).to(dtype)
    assert scheduler.add_noise(x, x, scheduler.timesteps[:2]).dtype == dtype


# Position in the schedule


def test_step_and_begin_index():
    scheduler = trained_scheduler(4)
    x = noise(1, 3, 2, 2)
    scheduler.set_timesteps(4)
    for k, t in enumerate(scheduler.timesteps):
        assert scheduler.step_index == (k or None)
        x = scheduler.step(x, t, x).prev_sample
        assert scheduler.step_index == k + 1
    scheduler.set_timesteps(4)
    assert (scheduler.step_index, scheduler.begin_index) == (None, None)
    scheduler.set_begin_index(2)
    assert (scheduler.step_index, scheduler.begin_index) == (None, 2)
    scheduler.step(x, scheduler.timesteps[2], x)
    assert (scheduler.step_index, scheduler.begin_index) == (3, 2)
    scheduler.set_timesteps(4)
    assert (scheduler.step_index, scheduler.begin_index) == (None, None)


def scheduler_with_equal_timesteps() -> GASScheduler:
    """Learned offsets may tell the network the same time at several steps: all but the first get timestep 500."""
    solver = GeneralizedSolver(4)
    with torch.no_grad():
        solver.timestep_offsets[1:] = 0.501 - solver.times()[1:-1]
    scheduler = GASScheduler()
    scheduler.add_solver(solver)
    scheduler.set_timesteps(4)
    assert (scheduler.timesteps[1:] == scheduler.timesteps[1]).all()
    return scheduler


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize(
    "view",
    [
        lambda timesteps, k: timesteps[k],
        lambda timesteps, k: timesteps[k:][0],
        lambda timesteps, k: list(timesteps)[k],
        lambda timesteps, k: timesteps.unbind()[k],
        lambda timesteps, k: timesteps[k : k + 1],
        lambda timesteps, k: timesteps[1:][k - 1] if k else timesteps[0],
    ],
    ids=["index", "slice", "iteration", "unbind", "one_element", "slice_index"],
)
def test_index_is_found_by_position_not_value(index, view):
    scheduler = scheduler_with_equal_timesteps()
    x = noise(1, 3, 2, 2)
    scheduler.step(x, view(scheduler.timesteps, index), x)
    assert scheduler.step_index == index + 1


def test_index_of_a_timestep_that_is_no_view():
    scheduler = trained_scheduler(4)
    x = noise(1, 3, 2, 2)
    for given in (lambda t: t.clone(), lambda t: t.item(), lambda t: t[None].repeat(1)):
        scheduler.set_timesteps(4)
        scheduler.step(x, given(scheduler.timesteps[2]), x)
        assert scheduler.step_index == 3
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep"):
        scheduler.step(x, torch.tensor(123.25), x)


def test_step_before_set_timesteps():
    x = noise(1, 3, 2, 2)
    with pytest.raises(ValueError, match="set_timesteps"):
        GASScheduler().step(x, 999, x)


def test_one_step_too_many():
    scheduler = trained_scheduler(4)
    x = run(scheduler, 4)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, scheduler.timesteps[-1], x)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(4)
    with pytest.raises(ValueError, match="4 steps"):
        scheduler.step(x, scheduler.timesteps[-1], x)


# Choice of the solver


def test_untrained_step_counts_are_refused_with_the_trained_ones_listed():
    scheduler = trained_scheduler(4, 8, 6)
    with pytest.raises(ValueError, match=r"5 steps.*\[4, 6, 8\]"):
        scheduler.set_timesteps(5)


def test_use_theory_for_untrained_steps():
    scheduler = trained_scheduler(4, use_theory_for_untrained_steps=True)
    assert torch.equal(run(scheduler, 5), run(GASScheduler(), 5))
    assert not torch.allclose(run(scheduler, 4), run(GASScheduler(), 4), atol=1e-3)


def test_a_refused_step_count_leaves_the_scheduler_as_it_was():
    scheduler = trained_scheduler(4)
    expected = run(scheduler, 4)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError):
        scheduler.set_timesteps(5)
    assert torch.equal(sample(scheduler, noise(2, 3, 4, 4)), expected)


@pytest.mark.parametrize("num_inference_steps", [1, 2, 3])
def test_warns_below_three_steps(num_inference_steps, caplog):
    with caplog.at_level(logging.WARNING):
        result = run(GASScheduler(), num_inference_steps)
    assert result.isfinite().all()
    assert ("too few" in caplog.text) == (num_inference_steps < 3)


@pytest.mark.parametrize("scheduler", [GASScheduler(), GASScheduler(**FLOW), trained_scheduler(4)])
@pytest.mark.parametrize("num_inference_steps", [0, -1])
def test_step_counts_below_one_are_refused(scheduler, num_inference_steps):
    with pytest.raises(ValueError, match=r"num_inference_steps.*at least 1"):
        scheduler.set_timesteps(num_inference_steps)


def test_set_timesteps_needs_an_argument():
    with pytest.raises(ValueError, match="num_inference_steps"):
        GASScheduler().set_timesteps()


@pytest.mark.parametrize("t_end", [2e-3, 1e-4])
@pytest.mark.parametrize("config", [STABLE_DIFFUSION, FLOW], ids=["vp", "flow"])
def test_add_solver_refuses_another_end(config, t_end):
    with pytest.raises(ValueError, match="t_end"):
        GASScheduler(**config).add_solver(GeneralizedSolver(4, t_end=t_end))


def test_a_later_solver_for_the_same_count_replaces_the_first():
    scheduler = trained_scheduler(4)
    solver = trained_solver(4, seed=1)
    scheduler.add_solver(solver)
    assert scheduler.solvers == {4: solver}


# What pipelines pass to `set_timesteps`


@pytest.mark.parametrize("as_array", [list, np.array], ids=["list", "array"])
@pytest.mark.parametrize(
    "linear",
    [
        lambda n: np.linspace(1, 1 / n, n),  # SD3, Flux and most others
        lambda n: np.linspace(1, 0, n + 1)[:-1],
        lambda n: np.linspace(0.999, 0, n + 1)[:-1],
        lambda n: np.linspace(1, 1e-3, n),  # what FlowMatchEulerDiscreteScheduler takes by itself
    ],
    ids=["to_1_over_n", "to_zero", "from_0.999", "to_0.001"],
)
def test_linear_sigmas_mean_this_many_steps_for_a_trained_solver(linear, as_array):
    scheduler = trained_scheduler(4, 6, **FLOW)
    for num_inference_steps in (4, 6):
        expected = run(scheduler, num_inference_steps)
        scheduler.set_timesteps(sigmas=as_array(linear(num_inference_steps)), device="cpu")
        assert torch.equal(sample(scheduler, noise(2, 3, 4, 4)), expected)


def test_chosen_times_are_refused_for_a_trained_solver():
    scheduler = trained_scheduler(4, **FLOW)
    with pytest.raises(ValueError, match="sigmas"):
        scheduler.set_timesteps(sigmas=[1.0, 0.9, 0.5, 0.1])
    with pytest.raises(ValueError, match="timesteps"):
        scheduler.set_timesteps(timesteps=[999, 700, 400, 100])
    with pytest.raises(ValueError, match=r"5 steps.*\[4\]"):
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.2, 5).tolist())


def test_untrained_flow_scheduler_follows_sigmas():
    scheduler, other = GASScheduler(**FLOW), FlowMatchEulerDiscreteScheduler(shift=3.0)
    for sigmas in ([1.0, 0.9, 0.5, 0.1], np.linspace(1, 0.2, 5).tolist()):
        scheduler.set_timesteps(sigmas=sigmas)
        other.set_timesteps(sigmas=sigmas)
        torch.testing.assert_close(scheduler.timesteps, other.timesteps, rtol=0, atol=1e-3)
        torch.testing.assert_close(scheduler.sigmas[:-1], other.sigmas[:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
@pytest.mark.parametrize("mu", [0.6, 1.15])
def test_mu_shifts_as_flow_matching_euler(mu, time_shift_type):
    other = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=time_shift_type)
    scheduler = GASScheduler.from_config(other.config)
    sigmas = np.linspace(1, 1 / 6, 6).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=mu, device="cpu")
    other.set_timesteps(sigmas=sigmas, mu=mu)
    torch.testing.assert_close(scheduler.timesteps, other.timesteps, rtol=0, atol=1e-3)
    assert scheduler.sigmas[-1] < 0.01


def test_mu_moves_the_times_of_a_trained_solver():
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    scheduler = trained_scheduler(4, **config)
    scheduler.set_timesteps(4, mu=0.0)
    unshifted = scheduler.timesteps
    scheduler.set_timesteps(4, mu=1.0)
    assert (scheduler.timesteps[1:] > unshifted[1:]).all()


def test_untrained_scheduler_follows_timesteps():
    scheduler = GASScheduler(**STABLE_DIFFUSION)
    given = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    scheduler.set_timesteps(timesteps=given)
    torch.testing.assert_close(scheduler.timesteps, torch.tensor(given).float(), rtol=0, atol=1e-3)
    assert scheduler.num_inference_steps == 10
    assert run(scheduler, None, timesteps=given).isfinite().all()


def test_untrained_scheduler_follows_sigmas_with_the_final_zero():
    """As Diffusers documents them for variance-preserving schedulers: sigma / alpha, the last one 0."""
    euler = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing")
    euler.set_timesteps(6)
    scheduler = GASScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(sigmas=euler.sigmas.tolist())
    torch.testing.assert_close(scheduler.sigmas[:-1], euler.sigmas[:-1], rtol=1e-5, atol=0)
    torch.testing.assert_close(scheduler.timesteps, euler.timesteps, rtol=0, atol=1e-2)


def test_untrained_scheduler_follows_published_sigmas():
    """Align Your Steps; rounded to three decimals, the first lies just above the schedule's largest."""
    given = AysSchedules["StableDiffusionSigmas"]
    scheduler = GASScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(sigmas=given)
    torch.testing.assert_close(scheduler.sigmas[:-1], torch.tensor(given[:-1]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("as_array", [list, np.array], ids=["list", "array"])
@pytest.mark.parametrize("times", [[100, 500, 900], [999, 500, 500], [1200, 600, 5], [900, 500, -3]])
def test_times_that_do_not_descend_within_the_schedule_are_refused(times, as_array):
    with pytest.raises(ValueError, match="timesteps"):
        GASScheduler().set_timesteps(timesteps=as_array(times))
    with pytest.raises(ValueError, match="sigmas"):
        GASScheduler(**FLOW).set_timesteps(sigmas=as_array([t / 1000 for t in times]))


def test_sigmas_and_timesteps_that_differ_exclude_each_other():
    with pytest.raises(ValueError, match="sigmas"):
        GASScheduler(**FLOW).set_timesteps(sigmas=[1.0, 0.5, 0.2], timesteps=[1000, 500, 300])


def test_step_count_that_contradicts_the_times_is_refused():
    with pytest.raises(ValueError, match="num_inference_steps"):
        GASScheduler(**FLOW).set_timesteps(4, sigmas=[1.0, 0.7, 0.3])


# State


@pytest.mark.parametrize("config", PREDICTIONS.values(), ids=PREDICTIONS)
def test_sampling_twice_gives_the_same_twice(config):
    for scheduler in (GASScheduler(**config), trained_scheduler(4, **config)):
        assert torch.equal(run(scheduler, 4), run(scheduler, 4))


def test_set_timesteps_clears_an_unfinished_sampling():
    scheduler = trained_scheduler(4)
    expected = run(scheduler, 4)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps[:2]:
        scheduler.step(noise(2, 3, 4, 4, seed=5), t, noise(2, 3, 4, 4, seed=6))
    assert torch.equal(run(scheduler, 4), expected)


def test_interleaved_schedulers_do_not_meet():
    schedulers = [trained_scheduler(4), GASScheduler(**FLOW), GASScheduler(**STABLE_DIFFUSION)]
    expected = [run(scheduler) for scheduler in schedulers]
    for scheduler in schedulers:
        scheduler.set_timesteps(4)
    xs = [noise(2, 3, 4, 4) for _ in schedulers]
    for k in range(4):
        for i, scheduler in enumerate(schedulers):
            t = scheduler.timesteps[k]
            xs[i] = scheduler.step(network(xs[i], t), t, xs[i]).prev_sample
    for x, result in zip(xs, expected):
        assert torch.equal(x, result)


def test_schedulers_that_share_a_solver_do_not_meet():
    solver = trained_solver(4)
    vp, flow = GASScheduler(), GASScheduler(**FLOW)
    vp.add_solver(solver)
    flow.add_solver(solver)
    expected = run(vp, 4)
    vp.set_timesteps(4)
    flow.set_timesteps(4)
    assert torch.equal(sample(vp, noise(2, 3, 4, 4)), expected)


@pytest.mark.parametrize("steps_before", [0, 1, 2, 3])
def test_deep_copies_go_on_independently(steps_before):
    """Servers copy the scheduler for every request."""
    scheduler = trained_scheduler(4)
    expected = run(scheduler, 4)
    scheduler.set_timesteps(4)
    x = noise(2, 3, 4, 4)
    for t in scheduler.timesteps[:steps_before]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    other = copy.deepcopy(scheduler)
    results = []
    for current in (scheduler, other):
        state = x
        for t in current.timesteps[steps_before:]:
            state = current.step(network(state, t), t, state).prev_sample
        results.append(state)
    assert torch.equal(results[0], expected) and torch.equal(results[1], expected)
    assert torch.equal(run(other, 4), expected)


@pytest.mark.parametrize("config", PREDICTIONS.values(), ids=PREDICTIONS)
def test_result_does_not_depend_on_the_rest_of_the_batch(config):
    """Bitwise, given the network's outputs; odd sizes put elements at the ends of vector registers."""
    x, outputs = noise(5, 3, 7, 5), [noise(5, 3, 7, 5, seed=k) for k in range(1, 5)]
    scheduler = trained_scheduler(4, **config)

    def run_part(part: slice) -> Tensor:
        scheduler.set_timesteps(4)
        state = x[part].clone()
        for t, output in zip(scheduler.timesteps, outputs):
            state = scheduler.step(output[part].clone(), t, state).prev_sample
        return state

    whole = run_part(slice(None))
    for i in range(5):
        assert torch.equal(run_part(slice(i, i + 1))[0], whole[i])
    assert torch.equal(run_part(slice(1, 4)), whole[1:4])


# Starting in the middle


@pytest.mark.parametrize("config", PREDICTIONS.values(), ids=PREDICTIONS)
@pytest.mark.parametrize("begin", [1, 2, 4, 5])
@pytest.mark.parametrize("solver_order", [1, 2])
def test_starting_midway_equals_the_theory_solver_from_there(solver_order, begin, config):
    """Untrained: the same as a solver that never had earlier steps."""
    scheduler, from_there = (GASScheduler(**config, solver_order=solver_order) for _ in range(2))
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(begin)
    from_there.set_timesteps(timesteps=scheduler.timesteps[begin:].double().tolist())
    x = noise(2, 3, 4, 4)
    torch.testing.assert_close(sample(scheduler, x), sample(from_there, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [2, 6])
@pytest.mark.parametrize("begin", [1, 2, 4, 5])
def test_starting_midway_takes_first_order_theory_for_the_history_that_lacks(begin, order):
    """Before the first step the data prediction was the first one, and the states lie on its first-order solution."""
    solver = trained_solver(6, order, theory_order=3)
    scheduler = GASScheduler(**STABLE_DIFFUSION)
    scheduler.add_solver(solver)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(begin)
    states, predictions = (weights.tolist() for weights in solver.coefficients(scheduler.noise_schedule()))
    alphas, sigmas = scheduler._steps.alphas, scheduler._steps.noise_levels

    x = noise(2, 3, 4, 4).double()
    output = network(x, scheduler.timesteps[begin])
    data = [(x - sigmas[begin] * output) / alphas[begin]] * (begin + 1)
    noise_then = (x - alphas[begin] * data[0]) / sigmas[begin]
    xs = [alphas[j] * data[0] + sigmas[j] * noise_then for j in range(begin)] + [x]
    for k in range(begin, 6):
        if k > begin:
            output = network(xs[k], scheduler.timesteps[k])
            data.append((xs[k] - sigmas[k] * output) / alphas[k])
        weights = zip(states[k], predictions[k], xs, data)
        xs.append(sum(a * state + c * prediction for a, c, state, prediction in weights))
    torch.testing.assert_close(sample(scheduler, x), xs[-1], rtol=1e-9, atol=1e-9)


def test_begin_index_zero_changes_nothing():
    scheduler = trained_scheduler(4)
    expected = run(scheduler, 4)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    assert torch.equal(sample(scheduler, noise(2, 3, 4, 4)), expected)


def test_starting_midway_leaves_no_trace():
    scheduler = trained_scheduler(4)
    expected = run(scheduler, 4)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    sample(scheduler, noise(2, 3, 4, 4))
    assert torch.equal(run(scheduler, 4), expected)


# The newest state is the one handed in


@pytest.mark.parametrize("trained", [False, True], ids=["theory", "trained"])
def test_caller_may_change_the_sample_between_steps(trained):
    scheduler = trained_scheduler(4, prediction_type="sample") if trained else GASScheduler(prediction_type="sample")
    x, outputs = noise(2, 3, 4, 4).double(), [noise(2, 3, 4, 4, seed=k).double() for k in range(1, 5)]
    if trained:  # without offsets a sample prediction is the data prediction, whatever the state
        with torch.no_grad():
            scheduler.solvers[4].timestep_offsets.zero_()
    change = noise(2, 3, 4, 4, seed=9).double()

    def run_changed(at: int | None) -> list[Tensor]:
        scheduler.set_timesteps(4)
        states = [x]
        for k, (t, output) in enumerate(zip(scheduler.timesteps, outputs)):
            state = states[-1] + change if k == at else states[-1]
            states.append(scheduler.step(output, t, state).prev_sample)
        return states

    plain = run_changed(None)
    weights = torch.diagonal(scheduler._sampler.coefficients(scheduler.noise_schedule())[0]).detach()
    for at in range(1, 4):
        changed, expected = run_changed(at), change
        for k in range(at, 4):
            expected = weights[k] * expected
            torch.testing.assert_close(changed[k + 1] - plain[k + 1], expected, rtol=0, atol=1e-12)


def test_caller_may_change_tensors_in_place_after_a_step():
    scheduler = trained_scheduler(4)
    expected = run(scheduler, 4)
    scheduler.set_timesteps(4)
    x = noise(2, 3, 4, 4)
    for t in scheduler.timesteps:
        output = network(x, t)
        result = scheduler.step(output, t, x).prev_sample
        following = result.clone()
        for tensor in (x, output, result):
            tensor.fill_(float("nan"))
        x = following
    assert torch.equal(x, expected)


def test_step_changes_no_input():
    scheduler = trained_scheduler(4)
    scheduler.set_timesteps(4)
    x, output = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    for t in scheduler.timesteps:
        scheduler.step(output, t, x)
    assert torch.equal(x, noise(2, 3, 4, 4)) and torch.equal(output, noise(2, 3, 4, 4, seed=1))


# Cost


class StepMonitor(TorchDispatchMode):
    """Forbids what makes the host wait for the device or needs float64 on it; counts new tensors of the sample's size."""

    forbidden = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero)

    def __init__(self, size: int):
        super().__init__()
        self.size, self.allocations = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in self.forbidden, f"{func} makes the host wait for the device"
        known = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}
        result = func(*args, **(kwargs or {}))
        is_large = isinstance(result, Tensor) and result.numel() == self.size
        self.allocations += is_large and result.untyped_storage()._cdata not in known
        return result


@pytest.mark.parametrize("config", PREDICTIONS.values(), ids=PREDICTIONS)
@pytest.mark.parametrize("set_begin_index", [True, False])
def test_step_neither_waits_for_the_device_nor_allocates_more_than_it_keeps(set_begin_index, config):
    scheduler = trained_scheduler(4, **config)
    scheduler.set_timesteps(4)
    if set_begin_index:
        scheduler.set_begin_index(0)
    x, output = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    for k, t in enumerate(scheduler.timesteps):
        with StepMonitor(x.numel()) as monitor:
            x = scheduler.step(output, t, x, return_dict=False)[0]
        # The data prediction, which is kept for later steps, and the result; at first also the noise.
        assert monitor.allocations <= (3 if k == 0 else 2)


@pytest.mark.parametrize("begin_index", [None, 0, 2])
@pytest.mark.parametrize("config", PREDICTIONS.values(), ids=PREDICTIONS)
def test_step_reads_nothing_from_the_device(config, begin_index):
    """On the meta device there is nothing to read: any synchronisation raises."""
    scheduler = trained_scheduler(4, **config)
    scheduler.set_timesteps(4, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    if begin_index is not None:
        scheduler.set_begin_index(begin_index)
    x = torch.empty(2, 3, 4, 4, device="meta", dtype=torch.float16)
    for t in scheduler.timesteps[begin_index or 0 :]:
        x = scheduler.step(torch.empty_like(x), t, x).prev_sample
    assert x.device.type == "meta" and x.dtype == torch.float16


def test_nothing_is_kept_after_the_last_step():
    scheduler = trained_scheduler(4)
    run(scheduler, 4)
    assert scheduler._history is None


def test_step_needs_no_gradient_bookkeeping():
    scheduler = trained_scheduler(4)
    scheduler.set_timesteps(4)
    x = noise(1, 3, 2, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert not x.requires_grad


def test_gradients_flow_through_steps_to_the_sample():
    """Guidance by gradients differentiates through `step`."""
    scheduler = trained_scheduler(4)
    scheduler.set_timesteps(4)
    x = noise(1, 1, 2, 2).double().requires_grad_()
    (gradient,) = torch.autograd.grad(sample(scheduler, x).sum(), x)
    direction, h = noise(1, 1, 2, 2, seed=3).double(), 1e-6
    values = []
    for sign in (1, -1):
        scheduler.set_timesteps(4)
        values.append(sample(scheduler, x.detach() + sign * h * direction).sum())
    torch.testing.assert_close((gradient * direction).sum(), (values[0] - values[1]) / (2 * h), rtol=1e-5, atol=1e-6)


# Whole times


@pytest.mark.parametrize("config", PREDICTIONS.values(), ids=PREDICTIONS)
def test_whole_times_for_programs_that_cut_off_fractions(config):
    """What such a program makes of the times changes nothing, and the solver knows what the network is told."""
    exact, whole = trained_scheduler(6, **config), trained_scheduler(6, round_timesteps=True, **config)
    for scheduler in (exact, whole):
        scheduler.set_timesteps(6)
    last = 1000 if config is PREDICTIONS["flow"] else 999
    assert torch.equal(whole.timesteps, exact.timesteps.round().clamp(0, last))
    assert not torch.equal(whole.timesteps, exact.timesteps)
    expected = run(whole, 6)
    whole.set_timesteps(6)
    assert torch.equal(sample(whole, noise(2, 3, 4, 4), lambda x, t: network(x, t.long())), expected)
    numbers = whole.step_numbers()
    told = numbers.noise_schedule.timestep(numbers.evaluation_times)
    torch.testing.assert_close(told, whole.timesteps.double(), rtol=0, atol=1e-9)


def test_whole_times_are_for_times_of_hundreds_of_steps():
    for config in ({"sigma_data": 0.5}, {"exploding_sigmas": [0.01, 80.0]}, FLOW | {"num_train_timesteps": 1}):
        with pytest.raises(ValueError, match="`round_timesteps` is for networks"):
            GASScheduler(round_timesteps=True, **config)
