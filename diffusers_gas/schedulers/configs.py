"""Scheduler configs: translation of Diffusers' settings, and types of values."""

import inspect
import math
from collections.abc import Mapping
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ..utils.diffusers_hooks import default_values, with_default_values


# Settings of Diffusers' schedulers that this package cannot follow. Ignoring them would give wrong images. (`clip_sample` is
# not among them, because Diffusers' own ODE solvers ignore it, too.)
UNSUPPORTED_SETTINGS = {
    "thresholding": (True, "dynamic thresholding is not a linear update"),
    "invert_sigmas": (True, "inverted network times are not supported"),
    "timestep_type": ("continuous", "networks that are fed log-sigma times are not supported"),
    "clip_denoised": (True, "consistency models do not follow an ODE"),
}
EDM_DEFAULTS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
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
    "t_end",
)
# Values of settings that older solver files do not record, because the settings did not exist.
LATER_SETTINGS = {"snr_shift_scale": 1.0, "edm_timestep": "log"}
# A bound on the memory that a config can ask for: a schedule holds a number for every training timestep.
MOST_TRAIN_TIMESTEPS = 10**6


def translate_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of any Diffusers scheduler with the setting names of this package, which are DPM-Solver++'s and UniPC's.

    Raises:
        ValueError: If the config has a setting that this package cannot follow, or none that describes the noise.
    """
    config = dict(config)
    class_name = str(config.get("_class_name", ""))
    whose = f"The config of {class_name}" if class_name else "The config"
    for name, (value, reason) in UNSUPPORTED_SETTINGS.items():
        if config.get(name) == value:
            raise ValueError(f"{whose} has `{name}={value!r}`: {reason}.")
    # CogVideoX' schedulers have defaults that its networks were trained with.
    passed_on = set(SOLVER_CONFIG_NAMES) if "snr_shift_scale" in config else set()
    if class_name.startswith("EDM") or config.get("sigma_data") is not None:
        config |= {name: config.get(name, default) for name, default in EDM_DEFAULTS.items()}
        passed_on |= EDM_DEFAULTS.keys()
        # The config of a scheduler that was constructed, not loaded, does not name its class.
        looks_like_cosine = "solver_order" in config and not config.keys() & {"algorithm_type", "edm_timestep"}
        if class_name.startswith("CosineDPM") or (looks_like_cosine and not class_name):
            config["edm_timestep"] = "atan"
    # `from_config` takes the new class's defaults for settings that were defaults of the old class. These must stay.
    config = with_default_values(config, [name for name in default_values(config) if name not in passed_on])
    looks_like_flow = not class_name and "shift" in config and "prediction_type" not in config
    if class_name.startswith("FlowMatch") or looks_like_flow:
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


def check_settings(scheduler_class: type, config: Any) -> None:
    """Raises a `ValueError` for a setting of a scheduler that is not of its annotated type, or out of range."""
    for name, parameter in inspect.signature(scheduler_class, eval_str=True).parameters.items():
        if name in config and not matches(config[name], parameter.annotation):
            kind = inspect.formatannotation(parameter.annotation)
            raise ValueError(f"`{name}` must be {kind}, got {config[name]!r:.100}.")
    if not 2 <= config.num_train_timesteps <= MOST_TRAIN_TIMESTEPS:
        raise ValueError(
            f"`num_train_timesteps` must be from 2 to {MOST_TRAIN_TIMESTEPS}, got {config.num_train_timesteps}."
        )
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
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, kind)
