"""How close samplers come to the teacher: distances, a table, and a picture of the same noise under each of them."""

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
from diffusers.schedulers.scheduling_utils import AysSchedules
from diffusers.utils import is_scipy_available
from torch import Tensor
from tqdm.auto import tqdm

from .noise_schedules import EDMVPSchedule
from .pipelines.driving import forgiving_copy, quiet_sampling, sample_latents
from .pipelines.inputs import SampleInputs
from .pipelines.teacher import TeacherSamples
from .schedulers.configs import translate_config
from .utils.files import replacing


# Characters in a line of a picture's titles.
TITLE_WIDTH = 13

# Inches that an image takes in a picture, and pixels that it has at most.
IMAGE_WIDTH, LARGEST_IMAGE = 0.9, 384


@dataclass(frozen=True)
class Row:
    """One line of a comparison: a scheduler and its mean squared distance to the teacher on held-out samples."""

    num_inference_steps: int
    scheduler: str
    distance: float


def training_free_schedulers(config: Mapping[str, Any]) -> dict[str, SchedulerMixin]:
    """Diffusers' few-step schedulers for a pipeline with this scheduler config, with each of their spacing options."""
    translated = translate_config(config)
    if translated.get("sigma_data") is not None:
        return _edm_schedulers(config)
    return _flow_schedulers(config) if translated.get("use_flow_sigmas") else _variance_preserving_schedulers(config)


def _edm_schedulers(config: Mapping[str, Any]) -> dict[str, SchedulerMixin]:
    families = {
        "Euler": (EDMEulerScheduler, {}),
        "DPM-Solver++ 2M": (EDMDPMSolverMultistepScheduler, {"solver_order": 2}),
        "DPM-Solver++ 3M": (EDMDPMSolverMultistepScheduler, {"solver_order": 3}),
    }
    return {
        f"{family}, {spacing}": scheduler.from_config(
            config, **settings, sigma_schedule=spacing, sigma_max=EDMVPSchedule.sigma_max
        )
        for family, (scheduler, settings) in families.items()
        for spacing in ("karras", "exponential")
    }


def _variance_preserving_schedulers(config: Mapping[str, Any]) -> dict[str, SchedulerMixin]:
    spacings = [{"timestep_spacing": name} for name in ("linspace", "leading", "trailing")]
    spacings += _sigma_spacings()
    families = {
        "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, {"solver_order": 2}, [*spacings, {"use_lu_lambdas": True}]),
        "DPM-Solver++ 3M": (DPMSolverMultistepScheduler, {"solver_order": 3}, [*spacings, {"use_lu_lambdas": True}]),
        "UniPC": (UniPCMultistepScheduler, {}, spacings),
        "DEIS": (DEISMultistepScheduler, {}, spacings),
        # Its default, which configs of other classes do not overwrite, is for pixels only.
        "DDIM": (DDIMScheduler, {"clip_sample": False}, spacings[:3]),
    }
    base = plain(config)
    schedulers = {
        f"{family}, {_spacing_name(spacing)}": scheduler.from_config({**base, **settings, **spacing})
        for family, (scheduler, settings, options) in families.items()
        for spacing in options
    }
    aligned = AlignYourStepsScheduler.from_config({**base, **families["DPM-Solver++ 2M"][1]})
    return {**schedulers, "DPM-Solver++ 2M, align your steps": aligned}


class AlignYourStepsScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver++ on the noise levels that Align Your Steps (arXiv 2404.14507) gives for Stable Diffusion.

    Other numbers of steps are interpolated linearly in log(sigma), as its authors do. The first level is the network's
    noisiest, whatever its noise schedule.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        # Diffusers has 0 for the last level, where sampling ends anyway; its authors' 0.029 is what they interpolate to.
        levels = np.log([*AysSchedules["StableDiffusionSigmas"][:-1], 0.029])
        wanted = np.linspace(0, len(levels) - 1, num_inference_steps + 1)[:-1]
        log_sigmas = np.log(((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy())
        timesteps = [self._sigma_to_t(np.exp(np.interp(k, range(len(levels)), levels)), log_sigmas) for k in wanted]
        super().set_timesteps(timesteps=[self.config.num_train_timesteps - 1, *np.round(timesteps[1:])], device=device)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without choices of solver and spacing, which the schedulers to be compared make themselves."""
    choices = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "algorithm_type")
    choices += ("solver_type", "solver_order", "timestep_spacing", "final_sigmas_type", "stochastic_sampling")
    return {name: value for name, value in config.items() if name not in choices}


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


def _sigma_spacings() -> list[dict[str, bool]]:
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
    """Mean squared distance of a scheduler's final states to the teacher's.

    `reduce` sums a tensor over the processes that each hold an equally large share of the samples.
    """
    total = 0.0
    for batch in samples.batches(batch_size):
        arguments = batch.inputs.pipeline_arguments(pipe)
        _, final = sample_latents(pipe, scheduler, num_inference_steps, **arguments)
        final = final[: len(batch)]
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
    """Distances of schedulers at step counts, the closest first for each count; schedulers that diverge come last."""
    jobs = [(n, name) for n in step_counts for name in schedulers]
    rows = []
    for n, name in tqdm(jobs, desc="Comparing schedulers", unit="scheduler"):
        distance = distance_to_teacher(pipe, schedulers[name], n, samples, batch_size, reduce)
        rows.append(Row(n, name, distance if np.isfinite(distance) else float("inf")))
    return sorted(rows, key=lambda row: (row.num_inference_steps, row.distance))


def markdown_table(ours: Sequence[Row], others: Sequence[Row], num_others: int = 4) -> str:
    """A table of our rows beside the closest others at the same step counts, relative to the best of the others."""
    lines = ["| steps | scheduler | distance to teacher | relative to best |", "| --- | --- | --- | --- |"]
    for n in sorted({row.num_inference_steps for row in ours}):
        rivals = [row for row in others if row.num_inference_steps == n]
        for row in [row for row in ours if row.num_inference_steps == n] + rivals[:num_others]:
            relative = row.distance / rivals[0].distance
            lines.append(f"| {n} | {row.scheduler} | {row.distance:.5f} | {relative:.2f} |")
    return "\n".join(lines)


class NoPicture(ValueError):
    """A pipeline's output is not pictures."""


def sample_images(
    pipe: DiffusionPipeline, scheduler: SchedulerMixin, num_inference_steps: int, inputs: SampleInputs
) -> list[np.ndarray]:
    """Decoded images of a few samples (for video a middle frame of each), arrays of shape `(height, width, channels)`."""

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
    """Draws a labelled row of images for every sampler; images of a column, with its title, come from the same noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_columns = max(map(len, rows.values()))
    height = len(rows) + 0.16 * max((len(wrap(title, TITLE_WIDTH)) for title in titles), default=0)
    figure, axes = pyplot.subplots(
        len(rows), num_columns, figsize=(IMAGE_WIDTH * num_columns + 2.2, height), squeeze=False, layout="compressed"
    )
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
            image = np.squeeze(np.clip(image, 0, 1))
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    # Small images are magnified, large ones keep their pixels up to a size.
    largest = max(np.shape(image)[1] for images in rows.values() for image in images)
    dpi = max(120, min(largest, LARGEST_IMAGE) / IMAGE_WIDTH)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=dpi, bbox_inches="tight", format=path.suffix.removeprefix(".") or "png")
    pyplot.close(figure)


def count_parameters(pipe: DiffusionPipeline) -> int:
    """Number of weights in a pipeline's networks."""
    networks = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    return sum(parameter.numel() for network in networks for parameter in network.parameters())
