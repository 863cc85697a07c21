"""Networks with the preconditioning of VP, VE or iDDPM in the place of EDM's network F (arXiv 2206.00364, table 1)."""

from typing import Literal

import torch
from torch import Tensor

from ...noise_schedules import VPLinearSchedule, iddpm_noise_levels


PRECONDITIONINGS = ("edm", "vp", "ve", "iddpm")

# Number of timesteps that VP's and iDDPM's networks were trained with.
NUM_TIMESTEPS = 1000


class Preconditioning:
    """Makes EDM's network F of a network G that was trained with another preconditioning.

    G denoises by `D(x; sigma) = x + c_out G(c_in x, c_noise)`, and F is defined by `D = c_skip x + c_out F` with EDM's c_skip
    and c_out. EDM's own networks are F.

    Args:
        kind (`"edm"`, `"vp"`, `"ve"` or `"iddpm"`): The preconditioning that G was trained with.
        sigma_data (`float`): The `sigma_data` in EDM's c_skip and c_out.
    """

    def __init__(self, kind: Literal["edm", "vp", "ve", "iddpm"], sigma_data: float):
        if kind not in PRECONDITIONINGS:
            raise ValueError(f"`preconditioning` must be one of {PRECONDITIONINGS}, got '{kind}'.")
        self.kind, self.sigma_data = kind, sigma_data

    def network_inputs(self, sample: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        """The input of G and its noise label `(batch_size,)`, for the input of F and `c_noise` = log(sigma) / 4."""
        if self.kind == "edm":
            return sample, c_noise
        sigma = (4 * c_noise).exp()
        c_in = torch.ones_like(sigma) if self.kind == "ve" else (sigma**2 + 1).rsqrt()
        edm_state_scale = (sigma**2 + self.sigma_data**2).sqrt()
        return (edm_state_scale * c_in)[:, None, None, None] * sample, self._label(sigma)

    def edm_output(self, sample: Tensor, output: Tensor, c_noise: Tensor) -> Tensor:
        """The output of F, for the input of F, the output of G and `c_noise` = log(sigma) / 4."""
        if self.kind == "edm":
            return output
        sigma = (4 * c_noise).exp()[:, None, None, None]
        c_out = sigma if self.kind == "ve" else -sigma
        edm_c_out = sigma * self.sigma_data * (sigma**2 + self.sigma_data**2).rsqrt()
        return sigma / self.sigma_data * sample + c_out / edm_c_out * output

    def _label(self, sigma: Tensor) -> Tensor:
        if self.kind == "ve":
            return (0.5 * sigma).log()
        if self.kind == "vp":
            return (NUM_TIMESTEPS - 1) * VPLinearSchedule().inverse_lambda(-sigma.log())
        levels = iddpm_noise_levels().to(sigma)
        return NUM_TIMESTEPS - 1 - (sigma[:, None] - levels).abs().argmin(dim=1).to(sigma.dtype)
