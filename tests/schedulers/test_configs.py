"""Configs of Diffusers' schedulers: every setting is translated, refused or known to be harmless, and idioms take effect."""

import copy
import inspect
import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)
from saved_schedulers import trained_scheduler

from diffusers_gas import GASScheduler, SDMScheduler
from diffusers_gas.schedulers.configs import (
    HARMLESS_SETTINGS,
    REFUSED_SETTINGS,
    TRANSLATED_SETTINGS,
    translate_config,
)


both = pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])


def all_schedulers() -> list[type[SchedulerMixin]]:
    classes = (getattr(diffusers, name) for name in dir(diffusers) if "Scheduler" in name)
    return [c for c in classes if isinstance(c, type) and issubclass(c, SchedulerMixin) and c is not SchedulerMixin]


@pytest.mark.parametrize("scheduler_class", all_schedulers(), ids=lambda c: c.__name__)
def test_every_setting_of_diffusers_is_classified(scheduler_class):
    """A new setting of Diffusers must be looked at before it can change images silently."""
    groups = (TRANSLATED_SETTINGS, REFUSED_SETTINGS, HARMLESS_SETTINGS)
    for name in list(inspect.signature(scheduler_class.__init__).parameters)[1:]:
        assert sum(name in group for group in groups) == 1, name


def timesteps(scheduler, **arguments) -> torch.Tensor:
    scheduler.set_timesteps(6, **arguments)
    return scheduler.timesteps


@both
def test_every_way_to_set_the_shift_has_the_same_effect(scheduler_class):
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0).config
    expected = timesteps(scheduler_class.from_config(FlowMatchEulerDiscreteScheduler(shift=9.0).config))
    assert not torch.equal(timesteps(scheduler_class.from_config(theirs)), expected)
    for scheduler in (
        scheduler_class.from_config(theirs, shift=9.0),
        scheduler_class.from_config(theirs, flow_shift=9.0),
        scheduler_class(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=9.0),
    ):
        assert torch.equal(timesteps(scheduler), expected)
    scheduler = scheduler_class.from_config(theirs)
    scheduler.set_shift(9.0)
    assert torch.equal(timesteps(scheduler), expected) and scheduler.config.shift == 9.0
    scheduler = scheduler_class.from_config(theirs)
    scheduler.config.flow_shift = 9.0  # no API of Diffusers', but what many do
    assert torch.equal(timesteps(scheduler), expected)


@pytest.fixture
def warnings(caplog):
    root = logging.getLogger("diffusers_gas")
    root.addHandler(caplog.handler)
    yield caplog
    root.removeHandler(caplog.handler)


def test_a_config_does_not_lose_solvers_silently(warnings):
    trained = trained_scheduler(4, 6)
    GASScheduler.from_config(trained.config)
    assert "without the solvers for [4, 6] steps" in warnings.text
    warnings.clear()
    assert sorted(copy.deepcopy(trained).solvers) == [4, 6]
    GASScheduler.from_config(DDPMScheduler().config)
    GASScheduler.from_config(dict(trained.config))  # settings, not a scheduler's config
    assert not warnings.text


@both
def test_clipped_log_snr_is_where_sampling_starts(scheduler_class):
    """As in DPM-Solver: with the cosine schedule networks say nothing useful at the noisiest times."""
    theirs = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1, timestep_spacing="trailing"
    )
    theirs.set_timesteps(8)
    ours = scheduler_class.from_config(theirs.config)
    ours.set_timesteps(8)
    assert ours.timesteps[0].item() == pytest.approx(theirs.timesteps[0].item(), abs=1.5)
    unclipped = scheduler_class.from_config({**theirs.config, "lambda_min_clipped": -float("inf")})
    unclipped.set_timesteps(8)
    assert unclipped.timesteps[0] > ours.timesteps[0] + 3


@both
@pytest.mark.parametrize("other", [LCMScheduler(), TCDScheduler()], ids=["lcm", "tcd"])
def test_networks_of_another_kind_are_refused(scheduler_class, other):
    with pytest.raises(ValueError, match=r"original_inference_steps.*consistency models"):
        scheduler_class.from_config(other.config)


def test_classes_whose_settings_do_not_tell_are_refused_by_name():
    with pytest.raises(ValueError, match="FlowMapEulerDiscreteScheduler cannot be replaced"):
        translate_config({"_class_name": "FlowMapEulerDiscreteScheduler", "shift": 1.0})


@both
def test_sigma_data_of_a_flow_config_is_not_edm(scheduler_class):
    """Cosmos' pipelines precondition their networks themselves."""
    scheduler = scheduler_class.from_config({**FlowMatchEulerDiscreteScheduler(shift=2.0).config, "sigma_data": 1.0})
    assert scheduler.config.sigma_data is None and scheduler.config.use_flow_sigmas


@both
def test_networks_of_stable_video_diffusion_have_edm_preconditioning(scheduler_class):
    theirs = EulerDiscreteScheduler(
        timestep_type="continuous",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=100.0,
    )
    theirs.set_timesteps(8)
    ours = scheduler_class.from_config(theirs.config)
    ours.set_timesteps(8)
    assert ours.config.sigma_data == 1.0
    x, output = (torch.randn(2, 3, 4, 4, generator=torch.manual_seed(seed)).double() for seed in (0, 1))
    for k in (0, 3):
        # The same noise level for both: their state is x0 + sigma noise, ours may be scaled.
        sigma = ours._steps.noise_levels[k] / ours._steps.alphas[k]
        scale = 1 / ours._steps.alphas[k]
        assert ours.timesteps[k].item() == pytest.approx(0.25 * np.log(sigma), rel=1e-5)
        ours._step_index = k
        their_input = x * scale / (sigma**2 + 1) ** 0.5
        torch.testing.assert_close(ours.scale_model_input(x, ours.timesteps[k]), their_input)
        their_data = output * (-sigma / (sigma**2 + 1) ** 0.5) + x * scale / (sigma**2 + 1)
        torch.testing.assert_close(ours.convert_model_output(output, x), their_data)


@both
def test_settings_that_pipelines_read_survive(scheduler_class):
    config = scheduler_class.from_config(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config).config
    for name in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"):
        assert config.get(name) == FlowMatchEulerDiscreteScheduler().config[name]
