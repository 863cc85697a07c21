"""Configs of Diffusers' schedulers: every setting is translated, refused or known to be harmless, and idioms take effect."""

import copy
import inspect
import json
import logging
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from saved_schedulers import trained_scheduler

from diffusers_gas import GASScheduler, SDMScheduler
from diffusers_gas.comparison import training_free_schedulers
from diffusers_gas.schedulers.configs import REFUSED_CLASSES, translate_config


both = pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])


def all_schedulers() -> list[type[SchedulerMixin]]:
    classes = (getattr(diffusers, name) for name in dir(diffusers) if "Scheduler" in name)
    return [c for c in classes if isinstance(c, type) and issubclass(c, SchedulerMixin) and c is not SchedulerMixin]


# Settings that have the same name and meaning here, or that `translate_config` translates.
TRANSLATED = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "snr_shift_scale", "use_flow_sigmas", "flow_shift", "shift", "use_dynamic_shifting"),
    *("invert_sigmas", "time_shift_type", "shift_terminal", "sigma_data", "sigma_min", "sigma_max", "rho"),
    *("variance_type", "solver_order", "lower_order_final", "use_karras_sigmas", "use_lu_lambdas", "timestep_type"),
    *("lambda_min_clipped", "s", "scaler", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
}
# Settings that do not describe what the network was trained on: another solver's choices, the spacing of its steps, noise that
# it adds, and what pipelines read themselves. (Diffusers' own ODE solvers ignore `clip_sample`, too.)
HARMLESS = {
    *("algorithm_type", "solver_type", "solver_p", "predict_x0", "disable_corrector", "corrector_order", "tau_func"),
    *(
        "predictor_order",
        "euler_at_final",
        "final_sigmas_type",
        "sigma_schedule",
        "interpolation_type",
        "eta",
        "kwargs",
    ),
    *("skip_prk_steps", "timestep_spacing", "steps_offset", "set_alpha_to_one", "use_beta_sigmas", "clip_sample"),
    *("use_exponential_sigmas", "stochastic_sampling", "s_noise", "clip_sample_range", "num_inference_steps"),
    *("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift"),
}
# Settings of this package's schedulers that no scheduler of Diffusers has.
OWN_SETTINGS = {
    *("edm_timestep", "exploding_sigmas", "round_timesteps", "use_theory_for_untrained_steps"),
    *("t_start", "t_end", "solver", "tau", "online"),
}


@pytest.mark.parametrize("scheduler_class", all_schedulers(), ids=lambda c: c.__name__)
def test_every_class_and_setting_of_diffusers_is_classified(scheduler_class):
    """A new one must be looked at before it can change images silently."""
    settings = set(inspect.signature(scheduler_class).parameters)
    assert not TRANSLATED & HARMLESS
    if scheduler_class.__name__ not in REFUSED_CLASSES:
        assert settings <= TRANSLATED | HARMLESS
        return
    _, own_setting = REFUSED_CLASSES[scheduler_class.__name__]
    assert own_setting is None or own_setting in settings - TRANSLATED - HARMLESS
    # Then its config tells, whatever class the config names.
    for name in (scheduler_class.__name__, "DPMSolverMultistepScheduler", None):
        if own_setting is not None or name == scheduler_class.__name__:
            config = dict.fromkeys(settings) | ({} if name is None else {"_class_name": name})
            with pytest.raises(ValueError, match=r"networks"):
                translate_config(config)


@both
def test_every_own_setting_has_a_name_that_means_the_same_in_diffusers_or_nothing(scheduler_class):
    for name in inspect.signature(scheduler_class).parameters:
        assert (name in TRANSLATED) != (name in OWN_SETTINGS), name


STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
VP_CLASSES = (
    *(
        DDIMScheduler,
        DDPMScheduler,
        PNDMScheduler,
        LMSDiscreteScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
    ),
    *(EulerAncestralDiscreteScheduler, DEISMultistepScheduler, UniPCMultistepScheduler),
    *(DPMSolverSinglestepScheduler, DPMSolverMultistepScheduler),
)
FLOW_CLASSES = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
FLOW_SOLVERS = (UniPCMultistepScheduler, DPMSolverMultistepScheduler, DEISMultistepScheduler)
COSMOS = FlowMatchEulerDiscreteScheduler()
COSMOS.register_to_config(sigma_max=200.0, sigma_min=0.01, sigma_data=1.0, final_sigmas_type="sigma_min")
# Schedulers of pipelines, with the classes that can replace them.
OWN = {
    "ddim": (DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, steps_offset=1), VP_CLASSES),
    "pndm, v": (PNDMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction"), VP_CLASSES),
    "dpm": (DPMSolverMultistepScheduler(solver_order=3, timestep_spacing="trailing"), VP_CLASSES),
    "euler": (EulerDiscreteScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True), VP_CLASSES),
    "unipc, limits": (UniPCMultistepScheduler(sigma_min=0.05, sigma_max=9.0), VP_CLASSES),
    "cogvideox": (CogVideoXDDIMScheduler(), (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)),
    "wuerstchen": (DDPMWuerstchenScheduler(scaler=2.0, s=0.01), (DDPMWuerstchenScheduler,)),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), FLOW_CLASSES),
    "dynamic": (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02), FLOW_CLASSES[:1]),
    "unipc, flow": (UniPCMultistepScheduler(**FLOW, flow_shift=5.0), FLOW_SOLVERS),
    "dpm, flow": (DPMSolverMultistepScheduler(**FLOW, use_dynamic_shifting=True), FLOW_SOLVERS),
    "cosmos": (COSMOS, FLOW_CLASSES),
    "edm": (EDMEulerScheduler(sigma_max=14.0), (EDMEulerScheduler, EDMDPMSolverMultistepScheduler)),
    "edm, dpm": (EDMDPMSolverMultistepScheduler(sigma_data=1.0, solver_order=3), (EDMDPMSolverMultistepScheduler,)),
    "svd": (
        EulerDiscreteScheduler(
            timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.02, sigma_max=90.0
        ),
        (EulerDiscreteScheduler,),
    ),
    "svd, no limits": (
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        (EulerDiscreteScheduler,),
    ),
}
KARRAS = {"use_karras_sigmas": True}
SPACINGS = [KARRAS, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]


def saved(scheduler) -> dict:
    return json.loads(scheduler.to_json_string())


def settings_of(scheduler) -> dict:
    return {name: scheduler.config[name] for name in inspect.signature(type(scheduler)).parameters}


def numbers_of(scheduler) -> list:
    """Times and noise levels of six steps."""
    shift = {"mu": 0.8} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(6, **shift)
    return [values.tolist() for values in (scheduler.timesteps, getattr(scheduler, "sigmas", torch.empty(0)))]


def samples_alike(scheduler_class, config, other_config, **spacing) -> bool:
    first, second = (scheduler_class.from_config(c, **spacing) for c in (config, other_config))
    return settings_of(first) == settings_of(second) and numbers_of(first) == numbers_of(second)


@both
@pytest.mark.parametrize("own, classes", OWN.values(), ids=OWN)
def test_schedulers_of_diffusers_sample_from_our_config_as_from_the_models_own(scheduler_class, own, classes):
    ours = scheduler_class.from_config(saved(own))
    other = ({GASScheduler, SDMScheduler} - {scheduler_class}).pop()
    again = other.from_config(saved(scheduler_class.from_config(saved(ours))))
    for theirs in classes:
        expected = theirs.from_config(saved(own))
        for config in (saved(ours), ours.config, saved(again), again.config):
            assert settings_of(theirs.from_config(config)) == settings_of(expected), theirs
        assert samples_alike(theirs, saved(ours), saved(own)), theirs
        spacings = SPACINGS if theirs in classes[-1:] or theirs is FlowMatchEulerDiscreteScheduler else [KARRAS]
        for spacing in spacings:
            if spacing.keys() <= settings_of(expected).keys():
                assert samples_alike(theirs, saved(ours), saved(own), **spacing), (theirs, spacing)


@both
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_solvers_of_diffusers_follow_a_flow_matching_network_by_our_config(scheduler_class, shift):
    ours = scheduler_class.from_config(saved(FlowMatchEulerDiscreteScheduler(shift=shift)))
    for theirs in FLOW_SOLVERS:
        assert samples_alike(theirs, saved(ours), saved(theirs(**FLOW, flow_shift=shift)))
    back = scheduler_class.from_config(saved(UniPCMultistepScheduler(**FLOW, flow_shift=shift)))
    theirs = FlowMatchEulerDiscreteScheduler
    assert samples_alike(theirs, saved(back), saved(theirs(shift=shift)))


EARLIER_SDM = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "tau": 2e-4, "online": False, "solver": "heun"}


@both
@pytest.mark.parametrize("theirs", [None, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler])
@pytest.mark.parametrize("name", ["ddim", "flow", "cosmos", "edm"])
def test_noise_levels_of_earlier_folders_are_those_of_edm_networks_only(name, theirs, scheduler_class):
    """Earlier versions saved the levels of EDM networks for all, and schedulers of Diffusers kept and saved them."""
    own, (target, *_) = OWN[name]
    of_edm = name in ("edm", "cosmos")
    limits = {} if of_edm else EARLIER_SDM
    earlier = saved(SDMScheduler.from_config(saved(own))) | {"exploding_sigmas": None} | limits
    earlier |= {"exploding_sigmas": [0.01, 200.0]} if name == "cosmos" else {}
    if theirs is not None:
        if of_edm or (theirs is FlowMatchEulerDiscreteScheduler) != (name == "flow"):
            pytest.skip("not for this network")
        earlier = saved(theirs.from_config(earlier))
    ours = scheduler_class.from_config(earlier)
    same = {"solver": "heun"} if scheduler_class is SDMScheduler and not of_edm else {}
    assert timesteps(ours).tolist() == timesteps(scheduler_class.from_config(saved(own), **same)).tolist()
    spacing = {} if of_edm else KARRAS
    target = DPMSolverMultistepScheduler if name == "ddim" else target
    assert numbers_of(target.from_config(ours.config, **spacing)) == numbers_of(
        target.from_config(saved(own), **spacing)
    )


@pytest.mark.parametrize("name, defaults", [("HeunDiscreteScheduler", 0.00085), ("DDIMScheduler", 0.0001)])
def test_what_a_file_leaves_out_is_the_default_of_the_class_that_it_names(name, defaults):
    assert GASScheduler.from_config({"_class_name": name}).config.beta_start == defaults


@both
@pytest.mark.parametrize(
    "given",
    [
        FlowMatchEulerDiscreteScheduler(
            1000, 3.0, True, 0.5, 1.15, 256, 4096, False, 0.1, False, False, False, "linear"
        ),
        UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True, shift_terminal=0.1, time_shift_type="linear"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_settings_of_flow_matching_that_were_given_by_position_are_kept(scheduler_class, given):
    config = {**given.config, "_use_default_values": list(given.config)}
    for ours in (scheduler_class.from_config(config), scheduler_class.from_config(given.config)):
        assert ours.config.use_dynamic_shifting is True
        assert (ours.config.time_shift_type, ours.config.shift_terminal) == ("linear", 0.1)


@both
def test_settings_that_are_changed_count_as_set(scheduler_class):
    scheduler = scheduler_class(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_shift(9.0)
    for config in (scheduler.config, saved(scheduler)):
        assert scheduler_class.from_config(config).config.flow_shift == 9.0


@pytest.mark.parametrize("own, classes", OWN.values(), ids=OWN)
def test_own_schedulers_and_comparison_do_not_ask_to_verify_the_config(own, classes, caplog):
    root = logging.getLogger("diffusers")
    root.addHandler(caplog.handler)
    try:
        for config_of in (saved, lambda scheduler: scheduler.config):
            sdm = SDMScheduler.from_config(config_of(own), t_end=2e-3)
            gas = GASScheduler.from_config(config_of(sdm), t_start=0.99)
            for scheduler in (gas, SDMScheduler.from_config(config_of(gas))):
                training_free_schedulers(config_of(scheduler))
    finally:
        root.removeHandler(caplog.handler)
    assert "verify" not in caplog.text


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
    for copied in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
        del copied.solvers[4]
        copied.register_to_config(use_theory_for_untrained_steps=True)
        SDMScheduler.from_config(copied.config)
        assert "without the solvers for [6] steps" in warnings.text
        warnings.clear()


def test_threads_copy_and_make_schedulers_at_the_same_time(warnings):
    """Servers copy a scheduler for every request, while others switch schedulers."""
    trained, theirs, interval = trained_scheduler(4), DDPMScheduler().config, sys.getswitchinterval()

    def work(number: int) -> list[int]:
        if number % 2:
            return sorted(GASScheduler.from_config(theirs).solvers)
        return sorted(copy.deepcopy(trained).solvers)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(work, range(200))) == [[4], []] * 100
    finally:
        sys.setswitchinterval(interval)
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
@pytest.mark.parametrize("other", [LCMScheduler, TCDScheduler])
def test_networks_of_another_kind_are_refused(scheduler_class, other):
    """Also if the pipeline has got another scheduler in the meantime."""
    own = other()
    for config in (own.config, saved(own), saved(DPMSolverMultistepScheduler.from_config(saved(own)))):
        with pytest.raises(ValueError, match=r"original_inference_steps.*consistency models"):
            scheduler_class.from_config(config)


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
