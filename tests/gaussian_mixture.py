"""The closed-form denoiser of the reference data, and the cases of the data."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from diffusers_gas.adaptive import SIGMA_TIME, VE_TIME, ProbabilityFlow, sigma_grid, vp_schedule


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


def grid_of(params: dict) -> Tensor:
    """The case's base grid, without the final 0."""
    kind = {"ve": "loglinear"}.get(params["discretization"], params["discretization"])
    return sigma_grid(params["num_steps"], params["sigma_min"], params["sigma_max"], kind, params["rho"])


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
