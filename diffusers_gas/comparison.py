"""Comparison of schedulers: distances to a teacher's samples, a table, and a picture of samples from the same noise."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.utils import is_scipy_available
from torch import Tensor
from tqdm.auto import tqdm

from .noise_schedules import EDMVPSchedule
from .pipelines.driving import forgiving_copy, quiet_sampling, sample_latents
from .pipelines.inputs import SampleInputs
from .pipelines.teacher import TeacherSamples
from .schedulers.configs import translate_config
from .utils.diffusers_hooks import AysSchedules


# Settings by which Diffusers' schedulers choose a solver and its spacing.
SOLVER_OPTIONS = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "algorithm_type"),
    *("solver_type", "solver_order", "timestep_spacing", "final_sigmas_type", "stochastic_sampling"),
)

# The most characters in a line of an image's title.
TITLE_WIDTH = 13

# The width of an image in a picture, in inches, and the most pixels of it.
IMAGE_WIDTH, LARGEST_IMAGE = 0.9, 384


@dataclass(frozen=True)
class Row:
    """A row of a comparison: a scheduler and the mean squared distance of its samples to the teacher's."""

    num_inference_steps: int
    scheduler: str
    distance: float


def training_free_schedulers(config: Mapping[str, Any]) -> dict[str, SchedulerMixin]:
    """Diffusers' few-step schedulers for a network, each with all of its spacing options.

    Args:
        config: The config of the pipeline's own scheduler.

    Returns:
        `dict[str, SchedulerMixin]`: Schedulers by their names and spacings, e.g. `"DPM-Solver++ 2M, karras sigmas"`.
    """
    translated = translate_config(config)
    if translated.get("sigma_data") is not None:
        return _edm_schedulers(config)
    return _flow_schedulers(config) if translated.get("use_flow_sigmas") else _variance_preserving_schedulers(config)


def _edm_schedulers(config: Mapping[str, Any]) -> dict[str, SchedulerMixin]:
    families: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
        "Euler": (EDMEulerScheduler, {}),
        "DPM-Solver++ 2M": (EDMDPMSolverMultistepScheduler, {"solver_order": 2}),
        "DPM-Solver++ 3M": (EDMDPMSolverMultistepScheduler, {"solver_order": 3}),
    }
    sigma_max = EDMVPSchedule.sigma_max
    return {
        f"{family}, {spacing}": kind.from_config(config, **settings, sigma_schedule=spacing, sigma_max=sigma_max)
        for family, (kind, settings) in families.items()
        for spacing in ("karras", "exponential")
    }


def _variance_preserving_schedulers(config: Mapping[str, Any]) -> dict[str, SchedulerMixin]:
    timestep_spacings: list[dict[str, Any]] = [
        {"timestep_spacing": name} for name in ("linspace", "leading", "trailing")
    ]
    spacings = timestep_spacings + _sigma_spacings()
    dpm_spacings = [*spacings, {"use_lu_lambdas": True}]
    families: dict[str, tuple[type[SchedulerMixin], dict[str, Any], list[dict[str, Any]]]] = {
        "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, {"solver_order": 2}, dpm_spacings),
        "DPM-Solver++ 3M": (DPMSolverMultistepScheduler, {"solver_order": 3}, dpm_spacings),
        "UniPC": (UniPCMultistepScheduler, {}, spacings),
        "DEIS": (DEISMultistepScheduler, {}, spacings),
        # DDIM clips by default. That is for pixels only, and configs of other classes do not turn it off.
        "DDIM": (DDIMScheduler, {"clip_sample": False}, timestep_spacings),
    }
    base = plain(config)
    schedulers = {
        f"{family}, {_spacing_name(spacing)}": scheduler.from_config({**base, **settings, **spacing})
        for family, (scheduler, settings, options) in families.items()
        for spacing in options
    }
    aligned = AlignYourStepsScheduler.from_config({**base, "solver_order": 2})
    return {**schedulers, "DPM-Solver++ 2M, align your steps": aligned}


class AlignYourStepsScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver++ on the noise levels that Align Your Steps (arXiv 2404.14507) publishes for Stable Diffusion.

    As in the paper, other numbers of steps are interpolated linearly in log(sigma). The first level is always the noisiest
    level that the network was trained on.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        # Diffusers replaces the paper's last level, 0.029, by 0. Its logarithm is needed for the interpolation.
        levels = np.log([*AysSchedules["StableDiffusionSigmas"][:-1], 0.029])
        positions = np.linspace(0, len(levels) - 1, num_inference_steps + 1)[1:-1]
        wanted = np.interp(positions, range(len(levels)), levels)
        log_sigmas = np.log(((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy())
        timesteps = np.interp(wanted, log_sigmas, range(len(log_sigmas))).round()
        super().set_timesteps(timesteps=[self.config.num_train_timesteps - 1, *timesteps], device=device)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the options of solver and spacing, so that schedulers made from it use their own."""
    return {name: value for name, value in config.items() if name not in SOLVER_OPTIONS}


def _flow_schedulers(config: Mapping[str, Any]) -> dict[str, SchedulerMixin]:
    translated, config = translate_config(config), plain(config)
    shared = ("num_train_timesteps", "use_flow_sigmas", "prediction_type", "flow_shift", "use_dynamic_shifting")
    settings = {name: translated[name] for name in shared if name in translated}
    euler = FlowMatchEulerDiscreteScheduler
    return {
        "Euler": euler.from_config(config),
        **{f"Euler, {_spacing_name(option)}": euler.from_config(config, **option) for option in _sigma_spacings()},
        "DPM-Solver++ 2M": DPMSolverMultistepScheduler(**settings),
        "DPM-Solver++ 3M": DPMSolverMultistepScheduler(**settings, solver_order=3),
        "UniPC": UniPCMultistepScheduler(**settings),
        "DEIS": DEISMultistepScheduler(**settings),
    }


def _sigma_spacings() -> list[dict[str, Any]]:
    names = ["karras_sigmas", "exponential_sigmas"] + ["beta_sigmas"] * is_scipy_available()
    return [{f"use_{name}": True} for name in names]


def _spacing_name(spacing: Mapping[str, Any]) -> str:
    ((name, value),) = spacing.items()
    return value if name == "timestep_spacing" else name.removeprefix("use_").replace("_", " ")


def distance_to_teacher(
    pipe: DiffusionPipeline,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    samples: TeacherSamples,
    batch_size: int,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> float:
    """Mean squared distance of a scheduler's final states to the teacher's, from the same noise.

    Args:
        pipe: The pipeline.
        scheduler: The scheduler.
        num_inference_steps: Number of steps.
        samples: The teacher's samples, or this process's share of them.
        batch_size: Samples per call of the pipeline.
        reduce: Sums a tensor over all processes.
    """
    total = 0.0
    for batch in samples.batches(batch_size):
        arguments = batch.inputs.pipeline_arguments(pipe)
        _, final = sample_latents(pipe, scheduler, num_inference_steps, **arguments)
        final = final[: len(batch)]  # some pipelines double the batch for guidance
        total += (final.float() - batch.final.to(final.device).float()).square().mean().item() * len(batch)
    total, count = reduce(torch.tensor([total, len(samples)], dtype=torch.float64)).tolist()
    return total / count


def compare(
    pipe: DiffusionPipeline,
    schedulers: Mapping[str, SchedulerMixin],
    step_counts: Iterable[int],
    samples: TeacherSamples,
    batch_size: int,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Row]:
    """Distances of schedulers to the teacher for numbers of steps.

    Args:
        pipe, samples, batch_size, reduce: As for [`distance_to_teacher`].
        schedulers: Schedulers by name.
        step_counts: Numbers of steps.

    Returns:
        `list[Row]`: Sorted by number of steps, then by distance. The distance is infinite if sampling diverges.
    """
    jobs = [(n, name) for n in step_counts for name in schedulers]
    rows = []
    for n, name in tqdm(jobs, desc="Comparing schedulers", unit="scheduler"):
        distance = distance_to_teacher(pipe, schedulers[name], n, samples, batch_size, reduce)
        rows.append(Row(n, name, distance if np.isfinite(distance) else float("inf")))
    return sorted(rows, key=lambda row: (row.num_inference_steps, row.distance))


def markdown_table(ours: Sequence[Row], others: Sequence[Row], num_others: int = 4) -> str:
    """A Markdown table of our rows and the closest `num_others` others for each number of steps.

    Its last column has the distances relative to the best of the others.
    """
    lines = ["| steps | scheduler | distance to teacher | relative to best |", "| --- | --- | --- | --- |"]
    for n in sorted({row.num_inference_steps for row in ours}):
        rivals = [row for row in others if row.num_inference_steps == n]
        for row in [row for row in ours if row.num_inference_steps == n] + rivals[:num_others]:
            relative = row.distance / rivals[0].distance
            lines.append(f"| {n} | {row.scheduler} | {row.distance:.5f} | {relative:.2f} |")
    return "\n".join(lines)


class NoPicture(ValueError):
    """Raised where there is nothing to draw, or nothing to draw with."""


def sample_images(
    pipe: DiffusionPipeline, scheduler: SchedulerMixin, num_inference_steps: int, inputs: SampleInputs
) -> list[np.ndarray]:
    """Samples images, each an array of shape `(height, width, channels)` in [0, 1]. A video gives its middle frame.

    Raises:
        NoPicture: If the pipeline makes neither images nor videos.
    """

    def images(arguments: dict[str, Any]) -> Iterable[np.ndarray]:
        output = pipe(**arguments, num_inference_steps=num_inference_steps, output_type="np")
        if hasattr(output, "frames"):
            return [video[len(video) // 2] for video in output.frames]
        if not hasattr(output, "images"):
            raise NoPicture(f"No picture: {type(pipe).__name__} makes {sorted(output.keys())}.")
        return output.images

    with quiet_sampling(pipe, forgiving_copy(scheduler)):
        return [np.asarray(image) for image in inputs.in_calls(pipe, len(inputs), images)]


def comparison_picture(rows: Mapping[str, Sequence[np.ndarray]], path: Path, titles: Sequence[str] = ()) -> None:
    """Draws a row of images for each sampler. It needs matplotlib, which the extra `train` installs.

    Args:
        rows: Images by the label of their row, arrays of shape `(height, width, channels)` in [0, 1].
        path: Where to write the picture.
        titles: Titles of the columns, e.g. prompts.
    """
    from matplotlib.figure import Figure  # not pyplot, which changes the user's backend

    from .schedulers.time_grid_figure import save_figure

    num_columns = max(map(len, rows.values()))
    height = len(rows) + 0.16 * max((len(wrap(title, TITLE_WIDTH)) for title in titles), default=0)
    figure = Figure(figsize=(IMAGE_WIDTH * num_columns + 2.2, height), layout="compressed")
    axes = figure.subplots(len(rows), num_columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, title in zip(axes[0], titles):
        axis.set_title("\n".join(wrap(title, TITLE_WIDTH)), fontsize=7)
    for row, (label, images) in zip(axes, rows.items()):
        row[0].axis("on")
        row[0].set_xticks([])
        row[0].set_yticks([])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for axis, image in zip(row, images):
            axis.imshow(np.squeeze(np.clip(image, 0, 1)), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    # Small images are magnified. Large ones keep their pixels up to a limit.
    largest = max(np.shape(image)[1] for images in rows.values() for image in images)
    dpi = max(120, min(largest, LARGEST_IMAGE) / IMAGE_WIDTH)
    save_figure(figure, path, dpi=dpi, bbox_inches="tight")


def count_parameters(pipe: DiffusionPipeline) -> int:
    """The number of parameters of all networks of a pipeline."""
    networks = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    return sum(parameter.numel() for network in networks for parameter in network.parameters())
