"""Diffusers' first-order schedulers, and those of this package with first order on the same times."""

import math

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
)
from tiny_pipelines import TinyPipeline, at_times
from torch import Tensor

from diffusers_gas import GASScheduler, SDMPlan, SDMScheduler
from diffusers_gas.schedulers.sdm_plan import flow_shift


def reference(tiny: TinyPipeline, num_inference_steps: int, to_data: bool) -> SchedulerMixin:
    """Diffusers' first-order scheduler for the pipeline. It ends at data or, without `to_data`, at the first trained time."""
    config = tiny.pipe.scheduler.config
    if tiny.flow_shift is not None:
        if not config.use_dynamic_shifting:
            config = {"shift": tiny.flow_shift, "invert_sigmas": tiny.inverted}
        # The times start slightly below 1, because a plan of `SDMScheduler` has finite sigma / alpha.
        sigmas = [0.999 * (1 - k / num_inference_steps) for k in range(num_inference_steps)]
        return at_times(FlowMatchEulerDiscreteScheduler.from_config(config), sigmas=sigmas)
    if config.get("sigma_data") is not None:
        return EDMEulerScheduler.from_config(config, sigma_max=100.0)
    settings = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": to_data}
    if config.get("snr_shift_scale") is not None:
        return CogVideoXDDIMScheduler.from_config(config, **settings)
    if config.get("variance_type") == "learned_range":  # which DDIM does not know
        end = "zero" if to_data else "sigma_min"
        return DPMSolverMultistepScheduler.from_config(
            config, timestep_spacing="trailing", solver_order=1, final_sigmas_type=end
        )
    return DDIMScheduler.from_config(config, **settings)


def first_order(
    scheduler_class: type[SchedulerMixin], tiny: TinyPipeline, timesteps: Tensor
) -> GASScheduler | SDMScheduler:
    """Our scheduler of first order, which evaluates at the given network times."""
    config = tiny.pipe.scheduler.config
    if scheduler_class is GASScheduler:
        end = {} if tiny.flow_shift is None else {"t_end": 0.0}
        return at_times(GASScheduler.from_config(config, solver_order=1, **end), timesteps=timesteps.tolist())
    edm = {} if config.get("sigma_data") is None else {"sigma_max": 100.0}
    scheduler = SDMScheduler.from_config(config, **edm)
    noise_schedule = scheduler.noise_schedule(mu=math.log(tiny.flow_shift or 1))
    times = noise_schedule.inverse_timestep(timesteps.double())
    levels = (-noise_schedule.lambda_(times)).exp() / flow_shift(noise_schedule)
    scheduler.add_plan(SDMPlan(torch.cat([levels, levels.new_zeros(1)]), len(levels) - 1))
    return scheduler
