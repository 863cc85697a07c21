"""The configs of Diffusers' schedulers in the settings of this package."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..utils.diffusers_hooks import DEFAULT_VALUES
from ..utils.tensors import FLOAT64
from .configs import PIPELINE_SETTINGS, SOLVER_SETTINGS, is_edm, without_earlier_limits


_DISTILLED = "consistency models and other distilled networks predict the end of a trajectory, not its direction"
_DISCRETE = "it is for networks of discrete tokens"
_OTHER = "its networks are sampled in a way of their own"

# Schedulers whose networks do not follow the probability-flow ODE of a noise schedule, and a setting that only they have: the
# config of a new scheduler does not name its class, and one that was made from the config of another keeps that one's settings.
REFUSED_CLASSES: dict[str, tuple[str, str | None]] = {
    "CMStochasticIterativeScheduler": (_DISTILLED, "clip_denoised"),
    "FlowMapEulerDiscreteScheduler": (_DISTILLED, None),
    "FlowMatchLCMScheduler": (_DISTILLED, "scale_factors"),
    "LCMScheduler": (_DISTILLED, "original_inference_steps"),
    "SCMScheduler": (_DISTILLED, None),
    "TCDScheduler": (_DISTILLED, "original_inference_steps"),
    "AmusedScheduler": (_DISCRETE, "masking_schedule"),
    "BlockRefinementScheduler": (_DISCRETE, "editing_threshold"),
    "DiscreteDDIMScheduler": (_DISCRETE, "corrector_selection"),
    "EntropyBoundScheduler": (_DISCRETE, "entropy_bound"),
    "VQDiffusionScheduler": (_DISCRETE, "num_vec_classes"),
    "HeliosDMDScheduler": (_OTHER, "stage_range"),
    "HeliosScheduler": (_OTHER, "stage_range"),
    "KarrasVeScheduler": (_OTHER, "s_churn"),
    "LTXEulerAncestralRFScheduler": (_OTHER, None),
    "MiniMaxH3Scheduler": (_OTHER, None),
    "PiflowScheduler": (_OTHER, "num_policy_substeps"),
    "RFD4ProteinaScheduler": (_OTHER, "noise_mode"),
    "RePaintScheduler": (_OTHER, None),
    "ScoreSdeVeScheduler": (_OTHER, "sampling_eps"),
    "UnCLIPScheduler": (_OTHER, None),
}


def translate_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of any Diffusers scheduler with the setting names of this package, which are DPM-Solver++'s and UniPC's.

    Raises:
        ValueError: If this package cannot follow the class, or no setting describes the noise.
    """
    config = _with_defaults_of_class(without_earlier_limits(config))
    class_name = str(config.get("_class_name", ""))
    whose = f"The config of {class_name}" if class_name else "The config"
    for name, (reason, own_setting) in REFUSED_CLASSES.items():
        if name == class_name or own_setting in config:
            what = f"has `{own_setting}`" if own_setting in config else "cannot be replaced"
            raise ValueError(f"{whose} {what}: {reason}.")
    if {"s", "scaler"} <= config.keys():
        # Stable Cascade's cosine schedule in continuous time.
        betas = wuerstchen_betas(config["s"], config["scaler"])
        config |= {"beta_schedule": "linear", "trained_betas": betas.tolist()}
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        config["sigma_data"] = 1.0  # Stable Video Diffusion: EDM's preconditioning, and the times log(sigma) / 4
    # A class's defaults are what its networks were trained with.
    passed_on = {*SOLVER_SETTINGS, *(PIPELINE_SETTINGS if "shift" in config else ())}
    # The config of a scheduler that was constructed, not loaded, does not name its class.
    looks_like_flow = not class_name and "shift" in config and "prediction_type" not in config
    if class_name.startswith("FlowMatch") or looks_like_flow:
        limits = [config.get("sigma_min"), config.get("sigma_max")]
        if None in limits:
            # `sigma_data` is a key of pipelines.
            config |= {"sigma_data": None, "use_flow_sigmas": True, "flow_shift": config.get("shift", 1.0)}
            config["prediction_type"] = "flow_prediction"
        else:
            # Cosmos' pipelines (Predict 2) put their noise levels into the config. Their states are data + sigma noise.
            config["exploding_sigmas"] = limits
    if config.get("exploding_sigmas") is not None:
        config |= {"use_flow_sigmas": False, "prediction_type": "epsilon"}
    if is_edm(config):
        passed_on |= {"sigma_min", "sigma_max", "sigma_data", "rho"}
        looks_like_cosine = "solver_order" in config and not config.keys() & {"algorithm_type", "edm_timestep"}
        if class_name.startswith("CosineDPM") or (looks_like_cosine and not class_name):
            config["edm_timestep"] = "atan"
    # `from_config` takes the new class's defaults for settings that were defaults of the old class. These must stay.
    config[DEFAULT_VALUES] = [name for name in config.get(DEFAULT_VALUES, ()) if name not in passed_on]
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
    return {**left_out, **config, DEFAULT_VALUES: [*config.get(DEFAULT_VALUES, ()), *left_out]}


def wuerstchen_betas(s: float, scaler: float, num_train_timesteps: int = 1000) -> Tensor:
    """Betas of Stable Cascade's schedule (arXiv 2306.00637), sampled at `num_train_timesteps` times in (0, 1].

    alpha^2 is cos^2 of (t + s) / (1 + s) quarter turns, divided by its value at t = 0, and within [0.0001, 0.9999]; t is
    t^scaler or, with a scaler above 1, 1 - (1 - t)^scaler.
    """
    times = torch.arange(1, num_train_timesteps + 1, **FLOAT64) / num_train_timesteps
    times = 1 - (1 - times) ** scaler if scaler > 1 else times**scaler
    quarter_turn = math.pi / 2
    alphas_cumprod = ((times + s) / (1 + s) * quarter_turn).cos() ** 2 / math.cos(s / (1 + s) * quarter_turn) ** 2
    # A schedule must descend, also where it is clamped.
    alphas_cumprod = alphas_cumprod.clamp(1e-4, 0.9999) * (1 - 1e-6 * times)
    return 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
