"""The closed-form denoiser of the reference data, and the cases of the data."""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from diffusers_gas.adaptive import SIGMA_TIME, VE_TIME, ProbabilityFlow, sigma_grid
from diffusers_gas.noise_schedules import VPLinearSchedule


REFERENCE = safe_open(Path(__file__).parent / "golden" / "sdm_reference.safetensors", "pt")
METADATA = REFERENCE.metadata()
CASES = {name: json.loads(METADATA[name]) for name in json.loads(METADATA["toplevel"])["cases"]}


class GaussianMixture:
    """D(x; sigma) of an equal-weight mixture of isotropic Gaussians; counts its calls."""

    def __init__(self, means: Tensor, std: float):
        self.means, self.std = means, std
        self.calls: list[tuple[Tensor, float]] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls.append((x, sigma))
        variance = self.std**2 + sigma**2
        offsets = x[:, None] - self.means
        weights = (-offsets.flatten(2).square().sum(2) / (2 * variance)).softmax(1)
        components = self.means + self.std**2 / variance * offsets
        return torch.einsum("bk,bk...->b...", weights, components)


def reference_model(means: str = "model.means") -> GaussianMixture:
    return GaussianMixture(REFERENCE.get_tensor(means), float(REFERENCE.get_tensor("model.s0")))


def cases(*kinds: str) -> list[str]:
    return [name for name, case in CASES.items() if case["kind"] in kinds]


def tensors(name: str) -> dict[str, Tensor]:
    return {key: REFERENCE.get_tensor(f"{name}.{key}") for key in CASES[name]["tensors"]}


def flow_of(params: dict) -> ProbabilityFlow:
    if params["schedule"] == "vp":
        return ProbabilityFlow.from_noise_schedule(vp_schedule(params["sigma_min"], params["sigma_max"]))
    return {"linear": SIGMA_TIME, "ve": VE_TIME}[params["schedule"]]


def vp_schedule(sigma_min: float, sigma_max: float, t_end: float = 1e-3) -> VPLinearSchedule:
    """The VP schedule, linear in beta, whose noise level is `sigma_max` at t = 1 and `sigma_min` at `t_end`.

    Source: EDM, arXiv 2206.00364, appendix C.1; SDM's `vp` schedule.
    """
    log_low, log_high = (math.log1p(sigma**2) for sigma in (sigma_min, sigma_max))
    beta_slope = 2 * (log_low / t_end - log_high) / (t_end - 1)
    beta_0 = log_high - beta_slope / 2
    return VPLinearSchedule(beta_0, beta_0 + beta_slope)


def iddpm_noise_levels() -> Tensor:
    """Noise levels u_0 > ... > u_1000 = 0 of iDDPM's cosine schedule (arXiv 2102.09672), float64 of shape `(1001,)`.

    In the form of EDM (arXiv 2206.00364, table 1 and appendix C.3): u_{j-1}^2 + 1 = (u_j^2 + 1) / r_j, with r_j the ratio of
    successive alpha_bar, at least C_1 = 0.001.
    """
    alpha_bar = (0.5 * math.pi * torch.arange(1001, dtype=torch.float64) / 1000 / 1.008).sin().square()
    ratios = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=0.001)
    levels = (1 / ratios.flip(0).cumprod(0).flip(0) - 1).sqrt()
    return torch.cat([levels, levels.new_zeros(1)])


def grid_of(params: dict) -> Tensor:
    """The case's base grid, without the final 0."""
    kind, num_steps, low, high = (params[name] for name in ("discretization", "num_steps", "sigma_min", "sigma_max"))
    u = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    if kind == "iddpm":  # entries of the cosine schedule within the range
        levels = iddpm_noise_levels()
        levels = levels[(levels >= low) & (levels <= high)]
        return levels[(u * (len(levels) - 1)).round().long()]
    if kind == "vp":  # equal steps of time
        schedule, t = vp_schedule(low, high), 1 - 0.999 * u
        return schedule.sigma(t) / schedule.alpha(t)
    return sigma_grid(num_steps, low, high, {"ve": "loglinear"}.get(kind, kind), params["rho"])


def sigmas_of(params: dict, data: dict[str, Tensor]) -> Tensor:
    """The case's noise levels, ending with 0."""
    if "input_sigmas" in data:
        # The reference repairs a list that is not in order.
        levels = data["input_sigmas"]
        levels = levels[levels != 0].double().clamp(params["sigma_min"], params["sigma_max"]).unique().flip(0)
        return torch.cat([levels, levels.new_zeros(1)])
    return torch.cat([grid_of(params), torch.zeros(1, dtype=torch.float64)])


def assert_near(actual, expected: Tensor, tolerance: float) -> None:
    """Checks the largest deviation relative to the largest entry, as in the description of the reference data."""
    actual = torch.as_tensor(actual, dtype=torch.float64)
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape}"
    deviation = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-300)).item()
    assert deviation <= tolerance
