"""Score networks of galaxies that others have trained (galaxygrad, arXiv 2401.07313), as pipelines of Diffusers.

No licence of the package is stated. It is downloaded from the package index when it is first needed, and nothing of it is kept
but in the output folder's `.galaxies`.
"""

import hashlib
import io
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMPipeline, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from report import output_folder
from torch import Tensor, nn


WHEEL = "galaxygrad-0.1.9-py3-none-any.whl"
SHA256 = "3bd8cbc50926b59f0e081f95622b423f79ef8949169a79d81bf96a117198e785"

# Files of networks by the survey and the number of pixels that they draw.
NETWORKS = {
    "HSC 32": "hsc_ScoreNet32",
    "HSC 64": "hsc_ScoreNet64",
    "HSC 32, logarithmic": "hsc_LogNet32",
    "HSC 64, logarithmic": "hsc_LogNet64",
    "ZTF 32": "ZTF_ScoreNet32",
    "ZTF 64": "ZTF_ScoreNet64",
    "LSST 60": "lsst_ScoreNet60",
    "lensed quasars 72": "quasar_lens72",
}

# The forward process has beta = 1 in continuous time, which ends at 10.
TIMES, STEPS_PER_TIME = 10, 100


class Mixer(nn.Module):
    """Two residual networks of one hidden layer: one over the patches, and one over the channels."""

    def __init__(self, num_channels: int, num_patches: int, width: int):
        super().__init__()
        sizes = (num_patches, num_channels)
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, size)) for size in sizes
        )
        self.norms = nn.ModuleList(nn.LayerNorm(shape) for shape in (sizes[::-1], sizes))

    def forward(self, states: Tensor) -> Tensor:
        for network, norm in zip(self.networks, self.norms):
            states = (states + network(norm(states))).mT
        return states


class ScoreNetwork(ModelMixin, ConfigMixin):
    """A score network of patches, which predicts the noise, `-std * score`, as pipelines expect it."""

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int, patch: int, num_channels: int, width: int, num_blocks: int):
        super().__init__()
        num_patches = (sample_size // patch) ** 2
        self.conv_in = nn.Conv2d(in_channels + 1, num_channels, patch, patch)
        self.conv_out = nn.ConvTranspose2d(num_channels, in_channels, patch, patch)
        self.blocks = nn.ModuleList(Mixer(num_channels, num_patches, width) for _ in range(num_blocks))
        self.norm = nn.LayerNorm((num_channels, num_patches))

    def forward(self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True) -> UNet2DOutput | tuple:
        time = (torch.as_tensor(timestep).to(sample).expand(len(sample)) + 1).view(-1, 1, 1, 1) / STEPS_PER_TIME
        patches = self.conv_in(torch.cat([sample, (time / TIMES).expand_as(sample[:, :1])], dim=1))
        states = patches.flatten(2)
        for block in self.blocks:
            states = block(states)
        score = self.conv_out(self.norm(states).view_as(patches))
        noise = -(-torch.expm1(-time)).sqrt() * score
        return UNet2DOutput(noise) if return_dict else (noise,)


def download() -> Path:
    """The package's wheel in the output folder, with the expected hash."""
    folder = output_folder() / ".galaxies"
    wheel = folder / WHEEL
    if not wheel.exists() or hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        name, version = WHEEL.split("-")[:2]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
            requirements.write(f"{name}=={version} --hash=sha256:{SHA256}\n")
            requirements.flush()
            options = ["--no-deps", "--require-hashes", "--dest", folder, "--requirement", requirements.name]
            subprocess.run([sys.executable, "-m", "pip", "download", *map(str, options)], check=True)
    return wheel


def load_arrays(name: str) -> list[np.ndarray]:
    """The arrays of a network's file, in which they follow one another."""
    with ZipFile(download()) as wheel:
        file, arrays = io.BytesIO(wheel.read(f"galaxygrad/eqx_{NETWORKS[name]}.eqx")), []
    while file.tell() < file.getbuffer().nbytes:
        arrays.append(np.load(file, allow_pickle=False))
    return arrays


def load_network(name: str) -> ScoreNetwork:
    """A network of `NETWORKS`. Its sizes are those of its arrays."""
    arrays = [torch.from_numpy(array) for array in load_arrays(name)]
    (num_channels, in_channels, patch, _), (width, num_patches) = arrays[0].shape, arrays[4].shape
    # The last array is the time that times are relative to.
    assert arrays.pop().item() == TIMES
    network = ScoreNetwork(
        math.isqrt(num_patches) * patch, in_channels - 1, patch, num_channels, width, (len(arrays) - 6) // 12
    )
    # A transposed convolution correlates here, and convolves in PyTorch.
    arrays[2] = arrays[2].transpose(0, 1).flip(2, 3)
    network.load_state_dict(
        {key: array.reshape(old.shape) for (key, old), array in zip(network.state_dict().items(), arrays, strict=True)}
    )
    return network.requires_grad_(False).eval()


def load_pipeline(name: str = "HSC 32", **settings: Any) -> DDPMPipeline:
    """The pipeline that samples with a network of `NETWORKS`; `settings` are further ones of the scheduler."""
    beta = -math.expm1(-1 / STEPS_PER_TIME)
    scheduler = DDPMScheduler(TIMES * STEPS_PER_TIME, beta_start=beta, beta_end=beta, clip_sample=False, **settings)
    return DDPMPipeline(load_network(name), scheduler)
