"""The time grid of a scheduler: sigmas, times and log-SNR of its states and of its network evaluations."""

import inspect
from copy import deepcopy
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor

from ..noise_schedules import NoiseSchedule, is_edm
from ..pipelines.named_schedulers import EXAMPLE_MU
from ..utils.tensors import FLOAT64


@dataclass(frozen=True)
class TimeGrid:
    """The times of n evaluations and of the n + 1 states before and after them, in float64.

    Attributes:
        sigmas (`Tensor` of shape `(n + 1,)`): Noise levels of the states in Diffusers' convention.
        times (`Tensor` of shape `(n + 1,)`): Times of the states in the noise schedule; NaN where sigma = 0.
        log_snr (`Tensor` of shape `(n + 1,)`): log(alpha^2 / sigma^2) of the states; inf where sigma = 0.
        timesteps (`Tensor` of shape `(n,)`): Times of the evaluations as the network takes them.
        evaluation_times (`Tensor` of shape `(n,)`): Times of the evaluations in the noise schedule.
        evaluation_log_snr (`Tensor` of shape `(n,)`): log(alpha^2 / sigma^2) at the evaluations.
    """

    sigmas: Tensor
    times: Tensor
    log_snr: Tensor
    timesteps: Tensor
    evaluation_times: Tensor
    evaluation_log_snr: Tensor

    @classmethod
    def of(cls, scheduler: SchedulerMixin, num_inference_steps: int, noise_schedule: NoiseSchedule) -> "TimeGrid":
        """The grid of a scheduler of this package or of a multistep scheduler of Diffusers, which is not changed."""
        scheduler = deepcopy(scheduler)
        shift = {"mu": EXAMPLE_MU} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(num_inference_steps, **shift)
        # `list` leaves out the timesteps that an online scheduler has not decided on yet.
        ours = hasattr(scheduler, "step_numbers")
        sigmas = torch.tensor(scheduler.step_numbers().sigmas, **FLOAT64) if ours else scheduler.sigmas.double().cpu()
        timesteps = torch.stack(list(scheduler.timesteps)).double().cpu()
        times = noise_schedule.inverse_diffusers_sigma(sigmas).where(sigmas > 0, torch.nan)
        evaluation_times = noise_schedule.inverse_timestep(timesteps)
        log_snr = 2 * noise_schedule.lambda_(times).where(sigmas > 0, torch.inf)
        evaluation_log_snr = 2 * noise_schedule.lambda_(evaluation_times)
        return cls(sigmas, times, log_snr, timesteps, evaluation_times, evaluation_log_snr)


def dpm_solver(scheduler: SchedulerMixin) -> DPMSolverMultistepScheduler | EDMDPMSolverMultistepScheduler:
    """Diffusers' DPM-Solver++ 2M with trailing spacing, for the same network as a scheduler of this package."""
    config, noise_schedule = scheduler.config, scheduler.noise_schedule(EXAMPLE_MU)
    settings = {**config, "solver_order": 2, "timestep_spacing": "trailing"}
    edm = is_edm(config) or config.exploding_sigmas is not None
    if edm:
        settings["sigma_max"] = noise_schedule.diffusers_sigma(torch.tensor(1.0, **FLOAT64)).item()
    elif not config.use_flow_sigmas:
        # Diffusers' scheduler lacks some kinds of betas, so it is given their values.
        kept = scheduler.alphas_cumprod.double()
        betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
        settings |= {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    scheduler_class = EDMDPMSolverMultistepScheduler if edm else DPMSolverMultistepScheduler
    known = inspect.signature(scheduler_class).parameters.keys()
    return scheduler_class(**{name: value for name, value in settings.items() if name in known})
