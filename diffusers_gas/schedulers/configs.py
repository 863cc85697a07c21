"""Scheduler configs: those of Diffusers in the terms of this package, and whether values are what they should be."""

import inspect
import sys
from collections.abc import Mapping
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


# Settings of Diffusers' schedulers with which images would silently be wrong. (`clip_sample` is not among them: Diffusers'
# own ODE solvers ignore it, too.)
UNSUPPORTED_SETTINGS = {
    "thresholding": (True, "dynamic thresholding is not a linear update"),
    "invert_sigmas": (True, "inverted network times are not supported"),
    "timestep_type": ("continuous", "networks that are fed log-sigma times are not supported"),
    "clip_denoised": (True, "consistency models do not follow an ODE"),
}
EDM_DEFAULTS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
# What a learned solver belongs to: with another value of one of these its coefficients are another solver's.
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
# What files made before these settings existed do not record.
LATER_SETTINGS = {"snr_shift_scale": 1.0, "edm_timestep": "log"}
# Tables of network times are made for all of them.
MOST_TRAIN_TIMESTEPS = 10**6


def translate_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of any Diffusers scheduler in the terms of this package's, which are those of DPM-Solver++ and UniPC."""
    config = dict(config)
    class_name = str(config.get("_class_name", ""))
    for name, (value, reason) in UNSUPPORTED_SETTINGS.items():
        if config.get(name) == value:
            raise ValueError(f"The config of {class_name} has `{name}={value!r}`: {reason}.")
    # The defaults of CogVideoX' schedulers are those of its networks.
    passed_on = set(SOLVER_CONFIG_NAMES) if "snr_shift_scale" in config else set()
    if class_name.startswith("EDM") or config.get("sigma_data") is not None:
        config |= {name: config.get(name, default) for name, default in EDM_DEFAULTS.items()}
        passed_on |= EDM_DEFAULTS.keys()
        # The config of a scheduler that was constructed, not loaded, does not name its class.
        looks_like_cosine = "solver_order" in config and not config.keys() & {"algorithm_type", "edm_timestep"}
        if class_name.startswith("CosineDPM") or (looks_like_cosine and not class_name):
            config["edm_timestep"] = "atan"
    # Diffusers would not pass on what is a default of the other class.
    defaults = config.get("_use_default_values", ())
    config["_use_default_values"] = [name for name in defaults if name not in passed_on]
    looks_like_flow = not class_name and "shift" in config and "prediction_type" not in config
    if class_name.startswith("FlowMatch") or looks_like_flow:
        config |= {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "flow_shift": config.get("shift", 1.0),
        }
    if not config.keys() & {"beta_schedule", "use_flow_sigmas", "sigma_data"}:
        raise ValueError(
            f"The config {f'of {class_name} ' * bool(class_name)}has none of `beta_schedule`, `use_flow_sigmas` and "
            "`sigma_data`, so that it says nothing about the noise that the network was trained on: such schedulers cannot "
            "be replaced."
        )
    return config


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says; whole numbers are numbers, and NaN and infinity are none."""
    origin = get_origin(kind)
    if kind is inspect.Parameter.empty:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in get_args(kind))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if origin is list:
        return isinstance(value, list | tuple) and all(fits(entry, *get_args(kind)) for entry in value)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, kind)
