"""The time grid of a scheduler: sigmas, times and log-SNR of its states and of its network evaluations."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pipelines.named_schedulers import EXAMPLE_MU
from ..schedulers.scheduling_utils import ODEScheduler
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
    def of(cls, scheduler: ODEScheduler, num_inference_steps: int) -> "TimeGrid":
        """The grid of a scheduler, which is not changed."""
        scheduler, noise_schedule = deepcopy(scheduler), scheduler.noise_schedule(EXAMPLE_MU)
        scheduler.set_timesteps(num_inference_steps, mu=EXAMPLE_MU if scheduler.config.use_dynamic_shifting else None)
        sigmas = torch.tensor(scheduler.step_numbers().sigmas, **FLOAT64)
        # `list` leaves out the timesteps that an online scheduler has not decided on yet.
        timesteps = torch.stack(list(scheduler.timesteps)).cpu().double()
        times = noise_schedule.inverse_diffusers_sigma(sigmas).where(sigmas > 0, torch.nan)
        evaluation_times = noise_schedule.inverse_timestep(timesteps)
        log_snr = 2 * noise_schedule.lambda_(times).where(sigmas > 0, torch.inf)
        evaluation_log_snr = 2 * noise_schedule.lambda_(evaluation_times)
        return cls(sigmas, times, log_snr, timesteps, evaluation_times, evaluation_log_snr)
