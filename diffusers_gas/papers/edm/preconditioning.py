"""How networks that were trained otherwise are made to look like EDM's (arXiv 2206.00364, table 1)."""

import math
from typing import Literal

import torch
from torch import Tensor


PRECONDITIONINGS = ("edm", "vp", "ve", "iddpm")

# Table 1: the betas of VP, its and iDDPM's number of timesteps, iDDPM's constants C_1 and C_2.
VP_BETA_MIN, VP_BETA_DIFFERENCE = 0.1, 19.9
NUM_TIMESTEPS = 1000
IDDPM_C1, IDDPM_C2 = 0.001, 0.008


class Preconditioning:
    """A network G with `D(x; sigma) = x + c_out G(c_in x, c_noise)` in the place of EDM's F.

    `F = (D - c_skip x) / c_out`, with EDM's c_skip and c_out. EDM's own networks are F already.

    Args:
        kind (`"edm"`, `"vp"`, `"ve"` or `"iddpm"`): What G was trained with.
        sigma_data (`float`): EDM's.
    """

    def __init__(self, kind: Literal["edm", "vp", "ve", "iddpm"], sigma_data: float):
        if kind not in PRECONDITIONINGS:
            raise ValueError(f"`preconditioning` must be one of {PRECONDITIONINGS}, got '{kind}'.")
        self.kind, self.sigma_data = kind, sigma_data

    def network_inputs(self, sample: Tensor, c_noise: Tensor) -> tuple[Tensor, Tensor]:
        """G's input and noise label `(batch_size,)` for F's, the latter log(sigma) / 4."""
        if self.kind == "edm":
            return sample, c_noise
        sigma = (4 * c_noise).exp()
        c_in = torch.ones_like(sigma) if self.kind == "ve" else (sigma**2 + 1).rsqrt()
        edm_state_scale = (sigma**2 + self.sigma_data**2).sqrt()
        return _column(edm_state_scale * c_in, sample) * sample, self._label(sigma)

    def edm_output(self, sample: Tensor, output: Tensor, c_noise: Tensor) -> Tensor:
        """F for F's input and G's output."""
        if self.kind == "edm":
            return output
        sigma = (4 * c_noise).exp()
        c_out = sigma if self.kind == "ve" else -sigma
        edm_c_out = sigma * self.sigma_data * (sigma**2 + self.sigma_data**2).rsqrt()
        return _column(sigma / self.sigma_data, sample) * sample + _column(c_out / edm_c_out, output) * output

    def _label(self, sigma: Tensor) -> Tensor:
        if self.kind == "ve":
            return (0.5 * sigma).log()
        if self.kind == "vp":
            squared = VP_BETA_MIN**2 + 2 * VP_BETA_DIFFERENCE * torch.log1p(sigma**2)
            return (NUM_TIMESTEPS - 1) * (squared.sqrt() - VP_BETA_MIN) / VP_BETA_DIFFERENCE
        levels = iddpm_noise_levels().to(sigma)
        return NUM_TIMESTEPS - 1 - (sigma[:, None] - levels).abs().argmin(dim=1).to(sigma.dtype)


def iddpm_noise_levels() -> Tensor:
    """iDDPM's noise levels u_0 > ... > u_M = 0 (table 1), float64 of shape `(M + 1,)`."""
    positions = torch.arange(NUM_TIMESTEPS + 1, dtype=torch.float64)
    alphas_cumprod = (0.5 * math.pi * positions / NUM_TIMESTEPS / (IDDPM_C2 + 1)).sin() ** 2
    growth = (alphas_cumprod[:-1] / alphas_cumprod[1:]).clamp(min=IDDPM_C1)
    levels = [0.0]
    for factor in growth.flip(0).tolist():
        levels.append(math.sqrt((levels[-1] ** 2 + 1) / factor - 1))
    return torch.tensor(levels[::-1], dtype=torch.float64)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (like.ndim - 1))
