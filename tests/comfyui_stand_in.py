"""What the nodes in comfyui/ use of ComfyUI, and a MODEL for tests.

With a checkout of ComfyUI in the environment variable COMFYUI_PATH these are ComfyUI's own objects, otherwise stand-ins with the
same interface.
"""

import importlib.util
import math
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from conftest import ROOT
from torch import Tensor


COMFYUI_PATH = os.environ.get("COMFYUI_PATH")
STABLE_DIFFUSION_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


class StandInSampling:
    """ComfyUI's `model_sampling`: noise levels, times, and what happens around the network.

    Args:
        kind: "eps", "v" or "flow".
        sigmas: The noise levels of the network's times; for flow matching they follow from the shift.
    """

    def __init__(self, kind: str, sigmas: Tensor | None = None, shift: float = 1.0):
        self.kind, self.shift = kind, shift
        self.sigmas = self.sigma(torch.arange(1, 1001.0)) if sigmas is None else sigmas.float()
        self.sigma_max = self.sigmas[-1]

    def sigma(self, timestep: Tensor) -> Tensor:
        if self.kind != "flow":
            return self.sigmas[timestep.round().long()]
        t = timestep / 1000
        return self.shift * t / (1 + (self.shift - 1) * t)

    def percent_to_sigma(self, percent: float) -> float:
        if self.kind == "flow":
            return float(self.sigma(torch.tensor(1000 * (1 - percent))))
        return float(self.sigmas[round(999 * (1 - percent))])

    def timestep(self, sigma: Tensor) -> Tensor:
        if self.kind == "flow":
            return 1000 * sigma
        return (sigma.log()[:, None] - self.sigmas.log()).abs().argmin(dim=1)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        if self.kind == "flow":
            return sigma * noise + (1 - sigma) * latent_image
        return noise * ((1 + sigma**2) ** 0.5 if max_denoise else sigma) + latent_image

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent / (1 - sigma) if self.kind == "flow" else latent

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x if self.kind == "flow" else x / (1 + _for(x, sigma) ** 2) ** 0.5

    def calculate_denoised(self, sigma: Tensor, output: Tensor, x: Tensor) -> Tensor:
        sigma = _for(x, sigma)
        if self.kind == "v":
            return x / (1 + sigma**2) - output * sigma / (1 + sigma**2) ** 0.5
        return x - sigma * output


class StandInInpaint:
    """The model as a sampler function sees it: outside of a mask it is given the noisy image, and returns the image."""

    def __init__(self, guider: Any, sigmas: Tensor):
        self.inner_model, self.sigmas = guider, sigmas

    def __call__(self, x: Tensor, sigma: Tensor, denoise_mask: Tensor | None, **others: Any) -> Tensor:
        if denoise_mask is None:
            return self.inner_model(x, sigma, **others)
        function = others["model_options"].get("denoise_mask_function")
        if function is not None:
            options = {"model": self.inner_model, "sigmas": self.sigmas}
            denoise_mask = function(sigma, denoise_mask, extra_options=options)
        noisy = self.inner_model.inner_model.scale_latent_inpaint(
            x=x, sigma=sigma, noise=self.noise, latent_image=self.latent_image
        )
        denoised = self.inner_model(torch.lerp(noisy, x, denoise_mask), sigma, **others)
        return torch.lerp(self.latent_image, denoised, denoise_mask)


class StandInKSampler:
    """A SAMPLER: scales the noise, and calls a sampler function."""

    def __init__(self, sampler_function: Any):
        self.sampler_function = sampler_function

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        extra_args["denoise_mask"] = denoise_mask
        model = StandInInpaint(guider, sigmas)
        model.latent_image, model.noise = latent_image, noise
        sampling = guider.inner_model.model_sampling
        whole = math.isclose(sigmas[0], sampling.sigma_max, rel_tol=1e-5) or bool(sigmas[0] > sampling.sigma_max)
        x = sampling.noise_scaling(sigmas[0], noise, latent_image, whole)
        told = None if callback is None else lambda at: callback(at["i"], at["denoised"], at["x"], len(sigmas) - 1)
        x = self.sampler_function(model, x, sigmas, extra_args=extra_args, callback=told, disable=disable_pbar)
        return sampling.inverse_noise_scaling(sigmas[-1], x)


def use_comfyui() -> ModuleType:
    """Makes `comfy.samplers` importable, and returns it."""
    if COMFYUI_PATH is not None:
        sys.path.append(COMFYUI_PATH)
        from comfy.cli_args import args

        args.cpu = True
    else:
        comfy, samplers = ModuleType("comfy"), ModuleType("comfy.samplers")
        comfy.samplers, samplers.KSAMPLER = samplers, StandInKSampler
        sys.modules |= {"comfy": comfy, "comfy.samplers": samplers}
    import comfy.samplers

    return comfy.samplers


def model_sampling(kind: str, shift: float = 1.0, sigmas: Tensor | None = None) -> Any:
    """The `model_sampling` of a MODEL with Stable Diffusion's noise levels, or others, or of flow matching with a shift."""
    if kind != "flow" and sigmas is None:
        alphas_cumprod = torch.cumprod(1 - STABLE_DIFFUSION_BETAS, dim=0)
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    if COMFYUI_PATH is None:
        return StandInSampling(kind, sigmas, shift)
    import comfy.model_sampling as theirs

    base = theirs.ModelSamplingDiscreteFlow if kind == "flow" else theirs.ModelSamplingDiscrete
    parametrization = {"eps": theirs.EPS, "v": theirs.V_PREDICTION, "flow": theirs.CONST}[kind]
    sampling = type("ModelSampling", (base, parametrization), {})()
    if kind == "flow":
        sampling.set_parameters(shift=shift)
    else:
        sampling.set_sigmas(sigmas)
    return sampling


class Model:
    """A MODEL, the guider that samples with it, and its inner model, for a network `(x, timestep) -> output`.

    `calls` has the noise levels that the network is told, and the list in which other code looks them up.
    """

    def __init__(self, sampling: Any, network: Any):
        self.model_sampling, self.network = sampling, network
        self.inner_model = self
        self.calls: list[tuple[Tensor, Tensor]] = []

    def get_model_object(self, name: str) -> Any:
        return getattr(self, name)

    def scale_latent_inpaint(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, **others: Any) -> Tensor:
        return self.model_sampling.noise_scaling(_for(noise, sigma), noise, latent_image)

    def __call__(self, x: Tensor, sigma: Tensor, model_options: Any = None, seed: int | None = None) -> Tensor:
        self.calls.append((sigma, model_options["transformer_options"]["sample_sigmas"]))
        sampling = self.model_sampling
        given = sampling.calculate_input(sigma, x)
        return sampling.calculate_denoised(sigma, self.network(given, sampling.timestep(sigma)), x)

    def sample(
        self,
        sampler: Any,
        sigmas: Tensor,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        callback: Any = None,
        **model_options: Any,
    ) -> Tensor:
        """As ComfyUI's guiders do it."""
        latent_image = torch.zeros_like(noise) if latent_image is None else latent_image
        extra_args = {"model_options": {"transformer_options": {"sample_sigmas": sigmas}, **model_options}, "seed": 0}
        return sampler.sample(self, sigmas, extra_args, callback, noise, latent_image, denoise_mask, True)


def load_nodes() -> SimpleNamespace:
    """The modules of comfyui/, loaded as ComfyUI loads custom nodes."""
    use_comfyui()
    name = str(ROOT / "comfyui").replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, Path(ROOT, "comfyui", "__init__.py"))
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    modules = {part: importlib.import_module(f"{name}.{part}") for part in ("loading", "sampling", "older_nodes")}
    return SimpleNamespace(package=package, **modules)


def _for(x: Tensor, sigma: Tensor) -> Tensor:
    """Noise levels of a batch, to be multiplied by its states."""
    return sigma.reshape(-1, *(1,) * (x.ndim - 1))
