"""Networks that others have trained: score networks of galaxies (galaxygrad, arXiv 2401.07313), as pipelines of Diffusers.

    python examples/benchmarks/galaxies.py
    python examples/benchmarks/galaxies.py --networks "HSC 32" "ZTF 64"

Each network draws galaxies or lensed quasars in the style of a survey. A solver is distilled for each number of evaluations, and a
plan of SDM calibrated to the same teacher. Every deterministic scheduler of Diffusers samples the first `NUM_SCREENED` noises with
each of its spacing options. The best of them and ours are measured on `NUM_JUDGED` noises that no fit has used: the mean squared
and the mean absolute distance to the teacher's samples of 50 steps, and the power of the finest detail relative to the teacher's,
where more than 1 is grain and less is blur. Solvers, plans and the measurements of a network are kept, so that an interrupted run
goes on. The results are galaxies.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT.

No licence of the package is stated. It is downloaded from the package index when it is first needed, and nothing of it is kept
but in the output folder's `.galaxies`.
"""

import argparse
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
from of_others import FIRST_SEED, Row, Subject, row_labels, table
from report import figure, measure_each, output_folder, write
from torch import Tensor, nn

from diffusers_gas import SampleInputs
from diffusers_gas.comparison import relative_detail


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

# The numbers of evaluations: of the smallest network several, of the others two.
STEPS = {name: (3, 4, 6, 8) if name == "HSC 32" else (4, 6) for name in NETWORKS}
NUM_SCREENED, NUM_JUDGED, BATCH_SIZE = 32, 256, 64

# Networks of the picture, the most galaxies in it, and the number of evaluations there.
PICTURED, NUM_PICTURED, PICTURED_STEPS = ("HSC 32", "ZTF 32", "lensed quasars 72"), 12, 4

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


def subject(name: str) -> Subject:
    """What is measured of a network of `NETWORKS`."""
    judged = SampleInputs.create(FIRST_SEED, NUM_JUDGED)
    folder = output_folder() / ".galaxies" / name
    return Subject(name, load_pipeline(name), folder, STEPS[name], judged, NUM_SCREENED, BATCH_SIZE)


def fine_detail(states: Tensor, teacher: Tensor) -> dict[str, float]:
    """The power of fine detail relative to the teacher's, where its states have the range from 0 to 1."""
    low, high = teacher.min(), teacher.max()
    images = [((x - low) / (high - low)).movedim(1, -1).numpy() for x in (states, teacher)]
    return {"detail": relative_detail(*images) if states.isfinite().all() else math.inf}


def measure(name: str) -> list[Row]:
    return subject(name).measure(fine_detail)


def draw(results: dict[str, list[Row]]) -> Any:
    """The same noise under the teacher, the best of Diffusers, SDM and GS; a column for each galaxy."""
    names = [name for name in PICTURED if name in results]
    each = NUM_PICTURED // len(names)
    page, axes = figure(4, each * len(names), (0.85 * each * len(names) + 1.3, 4.0))
    page.set_facecolor("black")
    page.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    for i, name in enumerate(names):
        shown_network = subject(name)
        samplers = shown_network.pictured(results[name], PICTURED_STEPS)
        teacher = shown_network.teacher_samples(shown_network.judged).final
        # Those with the most light outside of the middle show the most.
        light = (teacher - teacher.flatten(1).median(1).values.view(-1, 1, 1, 1)).clamp_min(0)
        spread = light.flatten(1).sum(1) / light.flatten(1).amax(1)
        shown = spread[:BATCH_SIZE].topk(each).indices.tolist()
        rows = [teacher[shown]]
        drawn = shown_network.judged[shown]
        rows += [shown_network.samples(s, PICTURED_STEPS, drawn) for s in samplers.values()]
        for row, states in zip(axes, rows):
            for j, (state, reference) in enumerate(zip(states, rows[0])):
                axis = row[each * i + j]
                axis.imshow(stretched(state, reference), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        axes[0][each * i + each // 2].set_title(name, fontsize=9, color="white")
    for row, label in zip(axes, row_labels(samplers, PICTURED_STEPS)):
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9, color="white")
    return page


def stretched(state: Tensor, reference: Tensor) -> np.ndarray:
    """Brightness as astronomers show it: the inverse hyperbolic sine, from the sky to the brightest pixel of the reference."""
    sky, brightest = reference.median(), reference.max()
    scaled = (state[0] - sky) / (brightest - sky)
    return ((12 * scaled).asinh() / math.asinh(12)).clamp(0, 1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    found = measure_each(__file__, parser.parse_args().networks, measure)
    results = {name: found[name] for name in NETWORKS if name in found}
    columns = {"fine detail": lambda row: f"{row['detail']:.2f}"}
    write(__file__, results, table(results, columns), draw(results))


if __name__ == "__main__":
    main()
