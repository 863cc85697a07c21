"""Where a schedule's states lie and where its network is asked, in all the terms that people think in."""

import inspect
from copy import deepcopy
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor

from ..noise_schedules import NoiseSchedule


# Of pipelines whose shift depends on the resolution.
SOME_SHIFT = 1.0


@dataclass(frozen=True)
class TimeGrid:
    """The times of n evaluations and of the n + 1 states around them, float64.

    Attributes:
        sigmas (`Tensor` of shape `(n + 1,)`): Noise levels of the states as Diffusers has them.
        times (`Tensor` of shape `(n + 1,)`): Times of the states; NaN where sigma = 0, for which most schedules have none.
        log_snr (`Tensor` of shape `(n + 1,)`): log(alpha^2 / sigma^2) of the states.
        timesteps (`Tensor` of shape `(n,)`): Times that the network is told, as it sees them.
        evaluation_times (`Tensor` of shape `(n,)`): The same as times of the noise schedule.
        evaluation_log_snr (`Tensor` of shape `(n,)`): The log-SNR at these.
    """

    sigmas: Tensor
    times: Tensor
    log_snr: Tensor
    timesteps: Tensor
    evaluation_times: Tensor
    evaluation_log_snr: Tensor

    @classmethod
    def of(cls, scheduler: SchedulerMixin, num_inference_steps: int, noise_schedule: NoiseSchedule) -> "TimeGrid":
        """The grid of a scheduler of this package or a multistep one of Diffusers, which is left as it is."""
        scheduler = deepcopy(scheduler)
        shift = {"mu": SOME_SHIFT} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(num_inference_steps, **shift)
        # Of an online scheduler only those that it has decided on.
        sigmas, timesteps = scheduler.sigmas.double().cpu(), torch.stack(list(scheduler.timesteps)).double().cpu()
        times = noise_schedule.inverse_diffusers_sigma(sigmas).where(sigmas > 0, torch.nan)
        evaluation_times = noise_schedule.inverse_timestep(timesteps)
        return cls(
            sigmas,
            times,
            2 * noise_schedule.lambda_(times).where(sigmas > 0, torch.inf),
            timesteps,
            evaluation_times,
            2 * noise_schedule.lambda_(evaluation_times),
        )


def dpm_solver(scheduler: SchedulerMixin) -> DPMSolverMultistepScheduler | EDMDPMSolverMultistepScheduler:
    """Diffusers' DPM-Solver++ 2M for the network of a scheduler of this package, with steps that start from pure noise."""
    config, noise_schedule = scheduler.config, scheduler.noise_schedule(SOME_SHIFT)
    settings = {**config, "solver_order": 2, "timestep_spacing": "trailing"}
    if config.sigma_data is not None:
        settings["sigma_max"] = noise_schedule.diffusers_sigma(torch.tensor(1.0, dtype=torch.float64)).item()
    elif not config.use_flow_sigmas:
        # It does not know all kinds of betas by name.
        kept = scheduler.alphas_cumprod.double()
        betas = 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])
        settings |= {"trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    scheduler_class = DPMSolverMultistepScheduler if config.sigma_data is None else EDMDPMSolverMultistepScheduler
    known = inspect.signature(scheduler_class).parameters.keys()
    return scheduler_class(**{name: value for name, value in settings.items() if name in known})
