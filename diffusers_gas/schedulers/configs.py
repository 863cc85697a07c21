"""Scheduler configs: translation of Diffusers' settings, and types of values."""

import inspect
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import diffusers
from diffusers import SchedulerMixin

from ..noise_schedules import is_edm, wuerstchen_betas
from ..utils.diffusers_hooks import default_values, with_default_values
from .solver_files import STEP_COUNTS


# How every setting of every scheduler in Diffusers is treated. A test goes through all of them.
# Settings of schedulers whose networks do not follow the probability-flow ODE of a noise schedule.
_CONSISTENCY = "consistency models and other distilled networks predict the end of a trajectory, not its direction"
_DISCRETE = "it is for networks of discrete tokens"
_OTHER = "its networks are sampled in a way of their own"
REFUSED_SETTINGS = {
    **dict.fromkeys(("clip_denoised", "original_inference_steps", "timestep_scaling"), _CONSISTENCY),
    **dict.fromkeys(("scale_factors", "upscale_mode"), _CONSISTENCY),
    **dict.fromkeys(
        ("alpha_cum_end", "alpha_cum_start", "gamma_cum_end", "gamma_cum_start", "num_vec_classes"), _DISCRETE
    ),
    **dict.fromkeys(
        ("mask_token_id", "masking_schedule", "block_length", "editing_threshold", "minimal_topk"), _DISCRETE
    ),
    **dict.fromkeys(("threshold", "entropy_bound", "t_max", "t_min"), _DISCRETE),
    **dict.fromkeys(("corrector_k", "corrector_selection", "corrector_selection_tau", "corrector_steps"), _DISCRETE),
    **dict.fromkeys(("gamma", "scheduler_type", "stage_range", "stages"), _OTHER),
    **dict.fromkeys(("eps", "final_step_size_scale", "n_grid", "num_policy_substeps"), _OTHER),
    **dict.fromkeys(("noise_mode", "schedule_mode", "t_lim_ode", "t_lim_ode_below", "tail_step_multiplier"), _OTHER),
    **dict.fromkeys(("tail_steps", "tsr_k", "tsr_sigma", "s_churn", "s_max", "s_min"), _OTHER),
    **dict.fromkeys(("correct_steps", "sampling_eps", "snr"), _OTHER),
}
# Schedulers of such networks whose settings do not tell.
REFUSED_CLASSES = {
    "FlowMapEulerDiscreteScheduler": _CONSISTENCY,
    "FlowMatchLCMScheduler": _CONSISTENCY,
    "SCMScheduler": _CONSISTENCY,
    "UnCLIPScheduler": _OTHER,
    "RePaintScheduler": _OTHER,
    "LTXEulerAncestralRFScheduler": _OTHER,
}
# Pipelines that use their schedulers in a way of their own.
_COSMOS_1 = "it lets its scheduler precondition the network, and steps it twice for every evaluation"
REFUSED_PIPELINES = {
    "CosmosTextToWorldPipeline": _COSMOS_1,
    "CosmosVideoToWorldPipeline": _COSMOS_1,
    **dict.fromkeys(("AnyFlowPipeline", "AnyFlowFARPipeline"), f"its network is a flow map; {_CONSISTENCY}"),
    "StableDiffusionLatentUpscalePipeline": "it preconditions its network itself, for the states of Euler's method",
    "LTXI2VLongMultiPromptPipeline": "it leaves out a scheduler's last step",
    **dict.fromkeys(("WuerstchenDecoderPipeline", "WuerstchenPriorPipeline"), "it leaves out a scheduler's last step"),
    "RePaintPipeline": "it goes back and forth between noise levels",
    "KandinskyImg2ImgPipeline": "it adds noise by itself, at whole timesteps only",
}
# Arguments of pipelines' calls with which they do so.
REFUSED_ARGUMENTS = {
    ("ChronoEditPipeline", "enable_temporal_reasoning"): "it cuts frames out of its scheduler's history",
}
# Settings that have the same name and meaning here, or that `translate_config` translates.
TRANSLATED_SETTINGS = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    *("prediction_type", "snr_shift_scale", "use_flow_sigmas", "flow_shift", "shift", "use_dynamic_shifting"),
    *(
        "invert_sigmas",
        "time_shift_type",
        "shift_terminal",
        "sigma_data",
        "sigma_min",
        "sigma_max",
        "rho",
        "variance_type",
    ),
    *(
        "solver_order",
        "lower_order_final",
        "use_karras_sigmas",
        "use_lu_lambdas",
        "lambda_min_clipped",
        "timestep_type",
    ),
    *("s", "scaler", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
}
# Settings that do not describe what the network was trained on: another solver's choices, the spacing of its steps, noise that
# it adds, and what pipelines read themselves. (Diffusers' own ODE solvers ignore `clip_sample`, too.)
PIPELINE_SETTINGS = {"base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift"}
HARMLESS_SETTINGS = {
    *PIPELINE_SETTINGS,
    *(
        "algorithm_type",
        "solver_type",
        "solver_p",
        "predict_x0",
        "disable_corrector",
        "corrector_order",
        "predictor_order",
    ),
    *("euler_at_final", "final_sigmas_type", "sigma_schedule", "interpolation_type", "skip_prk_steps", "tau_func"),
    *("timestep_spacing", "steps_offset", "set_alpha_to_one", "use_beta_sigmas", "use_exponential_sigmas"),
    *("stochastic_sampling", "eta", "s_noise", "clip_sample", "clip_sample_range"),
    *("num_inference_steps", "kwargs"),
}
# Settings of this package's schedulers that no scheduler of Diffusers has.
OWN_SETTINGS = {
    *("edm_timestep", "exploding_sigmas", "round_timesteps", "use_theory_for_untrained_steps"),
    *("t_start", "t_end", "solver", "tau", "online"),
}
LARGEST_FLOAT = sys.float_info.max
EDM_SETTINGS = ("sigma_min", "sigma_max", "sigma_data", "rho")
# Earlier versions of `SDMScheduler` saved these for every network. They are those of EDM networks.
EARLIER_SDM_LIMITS = {"sigma_min": 0.002, "sigma_max": 80.0}
# Settings that a learned solver depends on. With another value its coefficients are not valid.
SOLVER_CONFIG_NAMES = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
    "use_flow_sigmas",
    "sigma_data",
    "edm_timestep",
    "invert_sigmas",
    "exploding_sigmas",
    "t_end",
)
# Values of settings that older solver files do not record, because the settings did not exist.
LATER_SETTINGS = {"snr_shift_scale": 1.0, "edm_timestep": "log", "invert_sigmas": False, "exploding_sigmas": None}
# A bound on the memory that a config can ask for: a schedule holds a number for every training timestep.
MOST_TRAIN_TIMESTEPS = 10**6


def translate_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of any Diffusers scheduler with the setting names of this package, which are DPM-Solver++'s and UniPC's.

    Raises:
        ValueError: If the config has a setting that this package cannot follow, or none that describes the noise.
    """
    config = _with_defaults_of_class(config)
    config.pop(STEP_COUNTS, None)
    class_name = str(config.get("_class_name", ""))
    whose = f"The config of {class_name}" if class_name else "The config"
    if class_name in REFUSED_CLASSES:
        raise ValueError(f"{whose} cannot be replaced: {REFUSED_CLASSES[class_name]}.")
    for name, reason in REFUSED_SETTINGS.items():
        if name in config:
            raise ValueError(f"{whose} has `{name}`: {reason}.")
    if config.get("prediction_type") == "trigflow":
        raise ValueError(f"{whose} has `prediction_type='trigflow'`: {_CONSISTENCY}.")
    if {"clip_sample_range", "variance_type"} <= config.keys() and "beta_start" not in config:
        raise ValueError(f"{whose} is that of an UnCLIPScheduler: {_OTHER}.")
    if {"s", "scaler"} <= config.keys():
        # Stable Cascade's cosine schedule in continuous time.
        betas = wuerstchen_betas(config["s"], config["scaler"])
        config |= {"beta_schedule": "linear", "trained_betas": betas.tolist()}
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        config["sigma_data"] = 1.0  # Stable Video Diffusion: EDM's preconditioning, and the times log(sigma) / 4
    # A class's defaults are what its networks were trained with.
    passed_on = set(SOLVER_CONFIG_NAMES)
    looks_like_flow = not class_name and "shift" in config and "prediction_type" not in config
    if "shift" in config:
        passed_on |= PIPELINE_SETTINGS
    is_flow = class_name.startswith("FlowMatch") or looks_like_flow
    of_earlier_sdm = "tau" in config and not is_edm(config) and config.get("exploding_sigmas") is None
    if of_earlier_sdm and config.items() >= EARLIER_SDM_LIMITS.items():
        config = {name: value for name, value in config.items() if name not in EARLIER_SDM_LIMITS}
    limits = [config.get("sigma_min"), config.get("sigma_max")]
    if is_flow and None not in limits:
        # Cosmos' pipelines (Predict 2) put their noise levels into the config. Their states are data + sigma noise.
        config["exploding_sigmas"] = limits
    elif is_flow:
        config["sigma_data"] = None  # a key of pipelines
    if is_edm(config):
        passed_on |= set(EDM_SETTINGS)
        # The config of a scheduler that was constructed, not loaded, does not name its class.
        looks_like_cosine = "solver_order" in config and not config.keys() & {"algorithm_type", "edm_timestep"}
        if class_name.startswith("CosineDPM") or (looks_like_cosine and not class_name):
            config["edm_timestep"] = "atan"
    # `from_config` takes the new class's defaults for settings that were defaults of the old class. These must stay.
    config = with_default_values(config, [name for name in default_values(config) if name not in passed_on])
    if config.get("exploding_sigmas") is not None:
        config |= {"use_flow_sigmas": False, "prediction_type": "epsilon"}
    elif is_flow:
        config |= {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "flow_shift": config.get("shift", 1.0),
        }
    if not config.keys() & {"beta_schedule", "use_flow_sigmas", "sigma_data"}:
        raise ValueError(
            f"{whose} has none of `beta_schedule`, `use_flow_sigmas` and `sigma_data`. It does not describe the noise that "
            "the network was trained on, so that its scheduler cannot be replaced."
        )
    return config


def _with_defaults_of_class(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what it leaves out to the defaults of the class of Diffusers that it names."""
    scheduler_class = getattr(diffusers, str(config.get("_class_name", "")), None)
    parameters = inspect.signature(scheduler_class).parameters.values() if isinstance(scheduler_class, type) else ()
    left_out = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in config}
    return with_default_values({**left_out, **config}, [*default_values(config), *left_out])


def split_config(scheduler_class: type, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config without other classes' settings, and these. `from_config` of Diffusers keeps them, too, but warns of them."""
    others = (TRANSLATED_SETTINGS | HARMLESS_SETTINGS | OWN_SETTINGS) - inspect.signature(
        scheduler_class
    ).parameters.keys()
    kept = {name: value for name, value in config.items() if name in others and name not in default_values(config)}
    return {name: value for name, value in config.items() if name not in kept}, kept


def check_keywords(scheduler_class: type[SchedulerMixin], names: Iterable[str]) -> None:
    """Refuses keywords that look like misspelled settings or arguments of a scheduler's `from_pretrained`.

    Others are ignored, as by Diffusers' schedulers: pipelines pass on what only their networks know, and a config may be changed
    by settings of another class.
    """
    functions = (scheduler_class, scheduler_class.from_pretrained)
    known = {name for function in functions for name in inspect.signature(function).parameters} - {"kwargs"}
    for name in set(names) - known - TRANSLATED_SETTINGS - HARMLESS_SETTINGS - REFUSED_SETTINGS.keys():
        similar = get_close_matches(name, known, n=1, cutoff=0.8)
        if similar:
            raise ValueError(f"{scheduler_class.__name__} has no setting `{name}`. Is `{similar[0]}` meant?")


def current_settings(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Settings of a scheduler's config, read as attributes: some set those (`scheduler.config.flow_shift = 9`)."""
    return {name: getattr(config, name, config[name]) for name in names if name in config}


def check_settings(scheduler_class: type, config: Any) -> None:
    """Raises a `ValueError` for a setting of a scheduler that is not of its annotated type, or out of range."""
    for name, parameter in inspect.signature(scheduler_class, eval_str=True).parameters.items():
        if name in config and not matches(config[name], parameter.annotation):
            kind = inspect.formatannotation(parameter.annotation)
            raise ValueError(f"`{name}` must be {kind}, got {config[name]!r:.100}.")
    fewest = 1 if config.use_flow_sigmas else 2  # some flow-matching networks are told times from 0 to 1
    if not fewest <= config.num_train_timesteps <= MOST_TRAIN_TIMESTEPS:
        raise ValueError(
            f"`num_train_timesteps` must be from {fewest} to {MOST_TRAIN_TIMESTEPS}, got {config.num_train_timesteps}."
        )
    levels = config.exploding_sigmas
    if levels is not None and (len(levels) != 2 or config.use_flow_sigmas):
        raise ValueError(
            f"`exploding_sigmas` must be the lowest and the highest noise level, without `use_flow_sigmas`, got {levels}."
        )
    if config.round_timesteps and (
        is_edm(config) or config.exploding_sigmas is not None or config.num_train_timesteps < 100
    ):
        raise ValueError("`round_timesteps` is for networks that are told times of hundreds of steps.")
    if config.invert_sigmas and not config.use_flow_sigmas:
        raise ValueError("`invert_sigmas` is for flow matching: set `use_flow_sigmas`, too.")
    for name in ("t_end", "shift_terminal"):
        if config[name] is not None and not 0 <= config[name] < 1:
            raise ValueError(f"`{name}` must be at least 0 and less than 1, got {config[name]}.")


def matches(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type. An integer is also a float. NaN and infinity are not accepted as floats."""
    origin = get_origin(kind)
    if kind is inspect.Parameter.empty:
        return True
    if origin in (Union, UnionType):
        return any(matches(value, part) for part in get_args(kind))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if origin is list:
        return isinstance(value, list | tuple) and all(matches(entry, *get_args(kind)) for entry in value)
    if kind is float:
        number = isinstance(value, Real) and not isinstance(value, bool)
        return number and bool(abs(value) <= LARGEST_FLOAT)  # an integer may be too large for a float
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, kind)
