"""Comparison of schedulers: distances to a teacher's samples, and a table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

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
from diffusers.utils import is_scipy_available, logging
from torch import Tensor
from tqdm.auto import tqdm

from .pipelines.driving import networks_of, scheduler_config
from .pipelines.inputs import BatchSize, whole_numbers
from .pipelines.teacher import TeacherSamples, evaluations_per_sample, make_scheduler
from .pipelines.teacher import errors_to_teacher as errors_to_teacher
from .schedulers.configs import is_edm, translate_config


logger = logging.get_logger(__name__)

# Settings by which Diffusers' schedulers choose a solver and its spacing.
SOLVER_OPTIONS = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "algorithm_type"),
    *("solver_type", "solver_order", "timestep_spacing", "final_sigmas_type", "stochastic_sampling"),
)

# The schedulers that a fit is compared with, of networks for which there are more, and how many they are with the pipeline's own.
RIVALS = (
    *(f"{family}, {spacing}" for family in ("DPM-Solver++ 2M", "UniPC") for spacing in ("leading", "trailing")),
    *("DPM-Solver++ 2M, karras sigmas", "DDIM, trailing"),
)
MOST_RIVALS, EXAMPLE_STEPS = 9, 10

# The closest schedulers of Diffusers that a table shows for a number of steps.
NUM_OTHERS = 4

# The columns of tables: entries of rows, their headings and the formats of their numbers.
COLUMNS = {
    "frechet_distance": ("Frechet distance", ".3f"),
    "distance": ("distance to teacher", ".5f"),
    "relative": ("relative to best", ".2f"),
    "absolute": ("absolute error", ".4f"),
    "detail": ("detail", ".2f"),
}

# Pixels along the edge of the squares in which the power of detail is compared.
DETAIL_SQUARE = 4


# Options of a scheduler by the name of its spacing.
_Spacings: TypeAlias = dict[str, dict[str, Any]]

# Name, class, settings and spacings of several schedulers.
_Family: TypeAlias = tuple[str, type[SchedulerMixin], dict[str, Any], _Spacings]


@dataclass
class Row:
    """A row of a comparison: a scheduler, and the errors of its samples. What was not measured is `None`.

    Attributes:
        distance, absolute: Mean squared distance and mean absolute difference to the teacher's final states.
        detail: [`relative_detail`] of its images to the teacher's.
        frechet_distance: Of its images to others, in the features of a network.
        num_diverged: How many samples diverged.
    """

    num_inference_steps: int
    scheduler: str
    distance: float | None = None
    absolute: float | None = None
    detail: float | None = None
    frechet_distance: float | None = None
    num_diverged: int = 0


def training_free_schedulers(config: Mapping[str, Any]) -> dict[str, SchedulerMixin]:
    """Diffusers' few-step schedulers by names and spacings, e.g. `"DPM-Solver++ 2M, karras sigmas"`.

    Args:
        config: The config of the pipeline's own scheduler.
    """
    translated = translate_config(config)
    if translated.get("exploding_sigmas") is not None:
        return {"Euler": make_scheduler(FlowMatchEulerDiscreteScheduler, config)}
    own_settings = without_solver_options(config)
    # As arguments: Diffusers drops entries of a config that are among its recorded defaults.
    return {
        f"{family}, {spacing}".removesuffix(", "): make_scheduler(kind, own_settings, **settings, **options)
        for family, kind, settings, spacings in _families(translated)
        for spacing, options in spacings.items()
    }


def without_solver_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the options of solver and spacing, so that schedulers made from it use their own."""
    return {name: value for name, value in config.items() if name not in SOLVER_OPTIONS}


def _families(config: Mapping[str, Any]) -> list[_Family]:
    """The schedulers for a config in this package's names."""
    if config.get("edm_timestep") == "atan":
        return []  # Diffusers has no deterministic scheduler that tells a network these times
    any_spacing: _Spacings = {"": {}}
    sigmas: _Spacings = {f"{name} sigmas": {f"use_{name}_sigmas": True} for name in ("karras", "exponential")}
    if is_scipy_available():
        sigmas["beta sigmas"] = {"use_beta_sigmas": True}
    if is_edm(config):
        schedules: _Spacings = {name: {"sigma_schedule": name} for name in ("karras", "exponential")}
        return [
            ("Euler", EDMEulerScheduler, {}, schedules),
            ("DPM-Solver++ 2M", EDMDPMSolverMultistepScheduler, {"solver_order": 2}, schedules),
            ("DPM-Solver++ 3M", EDMDPMSolverMultistepScheduler, {"solver_order": 3}, schedules),
        ]
    if config.get("use_flow_sigmas"):
        euler: _Family = ("Euler", FlowMatchEulerDiscreteScheduler, {}, any_spacing | sigmas)
        is_linear = config.get("use_dynamic_shifting") and config.get("time_shift_type") == "linear"
        if is_linear or config.get("invert_sigmas") or config.get("num_train_timesteps") == 1:
            return [euler]  # the others know none of these
        return [
            euler,
            ("DPM-Solver++ 2M", DPMSolverMultistepScheduler, {"solver_order": 2}, any_spacing),
            ("DPM-Solver++ 3M", DPMSolverMultistepScheduler, {"solver_order": 3}, any_spacing),
            ("UniPC", UniPCMultistepScheduler, {}, any_spacing),
            ("DEIS", DEISMultistepScheduler, {}, any_spacing),
        ]
    timesteps: _Spacings = {name: {"timestep_spacing": name} for name in ("linspace", "leading", "trailing")}
    all_spacings = timesteps | sigmas
    of_dpm = all_spacings | {"lu lambdas": {"use_lu_lambdas": True}}
    return [
        ("DPM-Solver++ 2M", DPMSolverMultistepScheduler, {"solver_order": 2}, of_dpm),
        ("DPM-Solver++ 3M", DPMSolverMultistepScheduler, {"solver_order": 3}, of_dpm),
        ("UniPC", UniPCMultistepScheduler, {}, all_spacings),
        ("DEIS", DEISMultistepScheduler, {}, all_spacings),
        # DDIM clips by default. That is for pixels only, and configs of other classes do not turn it off.
        ("DDIM", DDIMScheduler, {"clip_sample": False}, timesteps),
    ]


def few_step_rivals(pipe: DiffusionPipeline) -> dict[str, SchedulerMixin]:
    """At most `MOST_RIVALS` of [`training_free_schedulers`], and the pipeline's own, all with one evaluation for each step.

    Of the many spacings of variance-preserving networks they are those that are the best for some network.
    """
    own, found = pipe.scheduler, training_free_schedulers(scheduler_config(pipe))
    schedulers = {name: found[name] for name in RIVALS if name in found} or found
    if evaluations_per_sample(own, EXAMPLE_STEPS) == EXAMPLE_STEPS:
        schedulers[f"{type(own).__name__} (the pipeline's own)"] = own
    return schedulers


def relative_detail(images: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """The power of the finest detail of images relative to that of reference images: more than 1 is grain, less is blur.

    The ratio is the geometric mean over all images (see [`log_power_of_detail`]).

    Args:
        images: Arrays of shape `(height, width, channels)` in [0, 1].
        reference: As many, of the same shapes.
    """

    def log_power(image: np.ndarray) -> Tensor:
        return log_power_of_detail(torch.from_numpy(image).movedim(-1, 0))

    ratios = [log_power(image) - log_power(other) for image, other in zip(images, reference, strict=True)]
    return torch.stack(ratios).mean().exp().item()


def log_power_of_detail(images: Tensor) -> Tensor:
    """The logarithm of the power of the finest detail of images of shape `(..., channels, height, width)`, for each of them.

    Detail is what a pixel differs by from the mean of its four neighbours. The logarithm is the mean over squares of
    `DETAIL_SQUARE` pixels, so that grain on an even ground counts as much as an edge. Each power is raised by that of rounding
    to 256 levels.
    """
    x = images.double()
    neighbours = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    detail = x[..., 1:-1, 1:-1] - neighbours / 4
    squares = torch.nn.functional.avg_pool2d(detail.square(), DETAIL_SQUARE, ceil_mode=True)
    return (squares + 1 / (12 * 255**2)).log().mean(dim=(-3, -2, -1))


def compare(
    pipe: DiffusionPipeline,
    schedulers: Mapping[str, SchedulerMixin],
    step_counts: Iterable[int],
    samples: TeacherSamples,
    batch_size: int | BatchSize,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Row]:
    """The rows of named schedulers, sorted by number of steps, then by distance (see [`errors_to_teacher`]).

    The distance is infinite if sampling diverges. Schedulers with which the pipeline cannot sample are left out with a
    warning: some pipelines need arguments or attributes that not all schedulers have.
    """
    jobs = [(n, name) for n in whole_numbers("step_counts", step_counts) for name in schedulers]
    rows = []
    for n, name in tqdm(jobs, desc="Comparing schedulers", unit="scheduler"):
        try:
            errors = errors_to_teacher(pipe, schedulers[name], n, samples, batch_size, reduce)
        except Exception as error:  # whatever a pipeline makes of a scheduler that it does not expect
            reason = f"{type(error).__name__}: {error}"
            logger.warning(f"{name} is left out: {type(pipe).__name__} cannot sample with it ({reason:.200}).")
        else:
            distance, absolute = (error if np.isfinite(error) else np.inf for error in errors)
            rows.append(Row(n, name, distance, absolute))
    return sorted(rows, key=lambda row: (row.num_inference_steps, row.distance or 0.0))


def markdown_table(ours: Sequence[Row], others: Sequence[Row] = (), num_others: int = NUM_OTHERS) -> str:
    """A Markdown table of our rows and the closest `num_others` others for each number of steps.

    It has what was measured of any row, and the distances relative to the best of the others.
    """
    shown: list[dict[str, Any]] = []
    for n in sorted({row.num_inference_steps for row in ours}):
        rivals = [row for row in others if row.num_inference_steps == n]
        best = rivals[0].distance if rivals else None
        for row in [row for row in ours if row.num_inference_steps == n] + rivals[:num_others]:
            shown.append({**vars(row), "relative": row.distance / best if best and row.distance is not None else None})
    columns = {name: column for name, column in COLUMNS.items() if any(row[name] is not None for row in shown)}
    lines = [["steps", "scheduler", *(heading for heading, _ in columns.values())], ["---"] * (2 + len(columns))]
    for entries in shown:
        values = ("-" if entries[name] is None else f"{entries[name]:{form}}" for name, (_, form) in columns.items())
        diverged = f", {entries['num_diverged']} samples diverged" if entries["num_diverged"] else ""
        lines.append([str(entries["num_inference_steps"]), entries["scheduler"] + diverged, *values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def count_parameters(pipe: DiffusionPipeline) -> int:
    """The number of parameters of all networks of a pipeline."""
    return sum(parameter.numel() for network in networks_of(pipe) for parameter in network.parameters())
