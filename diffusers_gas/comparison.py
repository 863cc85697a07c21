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

from .pipelines.driving import sample_latents, scheduler_config
from .pipelines.inputs import BatchSize, whole_numbers
from .pipelines.named_schedulers import config_for_diffusers, make_scheduler
from .pipelines.teacher import TeacherSamples, evaluations_per_sample
from .schedulers.configs import is_edm
from .schedulers.translation import translate_config
from .utils.diffusers_hooks import AysSchedules
from .utils.tensors import FLOAT64, cpu_by_default


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
MOST_RIVALS, SOME_STEPS = 9, 10

# The closest schedulers of Diffusers that a table shows for a number of steps.
NUM_OTHERS = 4

# Pixels along the edge of the squares in which the power of detail is compared.
DETAIL_SQUARE = 4

# Options of a scheduler by the name of its spacing.
_Spacings: TypeAlias = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A row of a comparison: a scheduler, and the errors of its samples.

    Attributes:
        distance, absolute: Mean squared distance and mean absolute difference to the teacher's final states.
        detail: [`relative_detail`] of its images to the teacher's.
    """

    num_inference_steps: int
    scheduler: str
    distance: float
    absolute: float | None = None
    detail: float | None = None


@cpu_by_default()  # where Diffusers' schedulers read the tables that they make
def training_free_schedulers(config: Mapping[str, Any]) -> dict[str, SchedulerMixin]:
    """Diffusers' few-step schedulers by names and spacings, e.g. `"DPM-Solver++ 2M, karras sigmas"`.

    Args:
        config: The config of the pipeline's own scheduler.
    """
    translated, config = translate_config(config), config_for_diffusers(config)
    if translated.get("edm_timestep") == "atan":
        return {}  # Diffusers has no deterministic scheduler that tells a network these times
    if is_edm(translated):
        return _edm_schedulers(config)
    if translated.get("exploding_sigmas") is not None:
        return {"Euler": make_scheduler(FlowMatchEulerDiscreteScheduler, config)}
    return _flow_schedulers(config) if translated.get("use_flow_sigmas") else _variance_preserving_schedulers(config)


def few_step_rivals(pipe: DiffusionPipeline) -> dict[str, SchedulerMixin]:
    """At most `MOST_RIVALS` of [`training_free_schedulers`], and the pipeline's own, all with one evaluation for each step.

    Of the many spacings of variance-preserving networks they are those that are the best for some network.
    """
    own, schedulers = pipe.scheduler, training_free_schedulers(scheduler_config(pipe))
    if len(schedulers) >= MOST_RIVALS:
        schedulers = {name: scheduler for name, scheduler in schedulers.items() if name in RIVALS}
    if evaluations_per_sample(own, SOME_STEPS) == SOME_STEPS:
        schedulers[f"{type(own).__name__} (the pipeline's own)"] = own
    return schedulers


def _edm_schedulers(config: Mapping[str, Any]) -> dict[str, SchedulerMixin]:
    families: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
        "Euler": (EDMEulerScheduler, {}),
        "DPM-Solver++ 2M": (EDMDPMSolverMultistepScheduler, {"solver_order": 2}),
        "DPM-Solver++ 3M": (EDMDPMSolverMultistepScheduler, {"solver_order": 3}),
    }
    return {
        f"{family}, {spacing}": make_scheduler(kind, config, **settings, sigma_schedule=spacing)
        for family, (kind, settings) in families.items()
        for spacing in ("karras", "exponential")
    }


def _flow_schedulers(config: Mapping[str, Any]) -> dict[str, SchedulerMixin]:
    translated, config = translate_config(config), plain(config)
    shared = ("num_train_timesteps", "use_flow_sigmas", "prediction_type", "flow_shift", "use_dynamic_shifting")
    settings = {name: translated[name] for name in shared if name in translated}
    euler = FlowMatchEulerDiscreteScheduler
    eulers = {
        "Euler": make_scheduler(euler, config),
        **{f"Euler, {name}": make_scheduler(euler, config, **spacing) for name, spacing in _sigma_spacings().items()},
    }
    if translated.get("invert_sigmas") or translated.get("num_train_timesteps") == 1:
        return eulers  # the others know neither
    return {
        **eulers,
        "DPM-Solver++ 2M": DPMSolverMultistepScheduler(**settings),
        "DPM-Solver++ 3M": DPMSolverMultistepScheduler(**settings, solver_order=3),
        "UniPC": UniPCMultistepScheduler(**settings),
        "DEIS": DEISMultistepScheduler(**settings),
    }


def _variance_preserving_schedulers(config: Mapping[str, Any]) -> dict[str, SchedulerMixin]:
    timestep_spacings: _Spacings = {name: {"timestep_spacing": name} for name in ("linspace", "leading", "trailing")}
    spacings = timestep_spacings | _sigma_spacings()
    dpm_spacings = spacings | {"lu lambdas": {"use_lu_lambdas": True}}
    families: dict[str, tuple[type[SchedulerMixin], dict[str, Any], _Spacings]] = {
        "DPM-Solver++ 2M": (DPMSolverMultistepScheduler, {"solver_order": 2}, dpm_spacings),
        "DPM-Solver++ 3M": (DPMSolverMultistepScheduler, {"solver_order": 3}, dpm_spacings),
        "UniPC": (UniPCMultistepScheduler, {}, spacings),
        "DEIS": (DEISMultistepScheduler, {}, spacings),
        # DDIM clips by default. That is for pixels only, and configs of other classes do not turn it off.
        "DDIM": (DDIMScheduler, {"clip_sample": False}, timestep_spacings),
    }
    base = plain(config)
    # As arguments: Diffusers drops entries of a config that are among its recorded defaults.
    schedulers = {
        f"{family}, {name}": make_scheduler(kind, base, **settings, **spacing)
        for family, (kind, settings, options) in families.items()
        for name, spacing in options.items()
    }
    aligned = make_scheduler(AlignYourStepsScheduler, base, solver_order=2)
    return {**schedulers, "DPM-Solver++ 2M, align your steps": aligned}


def _sigma_spacings() -> _Spacings:
    names = ["karras", "exponential"] + ["beta"] * is_scipy_available()
    return {f"{name} sigmas": {f"use_{name}_sigmas": True} for name in names}


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the options of solver and spacing, so that schedulers made from it use their own."""
    return {name: value for name, value in config.items() if name not in SOLVER_OPTIONS}


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


def distance_to_teacher(*arguments: Any, **named_arguments: Any) -> float:
    """The first of [`errors_to_teacher`], which has the same arguments."""
    return errors_to_teacher(*arguments, **named_arguments)[0]


def errors_to_teacher(
    pipe: DiffusionPipeline,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    samples: TeacherSamples,
    batch_size: int | BatchSize,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> tuple[float, float]:
    """Mean squared distance and mean absolute difference of a scheduler's final states to the teacher's, from the same noise.

    Args:
        samples: The teacher's samples, or this process's share of them.
        batch_size: The most samples per call of the pipeline.
        reduce: Sums a tensor over all processes.

    Raises:
        RuntimeError: If sampling fails in another process. An error in this process is raised as it is. Both are raised after
            `reduce`, so that no process waits for another.
    """
    totals, error = [0.0, 0.0], None
    try:
        totals = _sums_of_errors(pipe, scheduler, num_inference_steps, samples, batch_size)
    except Exception as sampling_error:
        error = sampling_error
    sums = torch.tensor([*totals, len(samples), error is not None], **FLOAT64)
    squared, absolute, count, num_failed = reduce(sums).tolist()
    if error is not None:
        raise error
    if num_failed:
        raise RuntimeError("Sampling failed in another process.")
    return squared / count, absolute / count


def _sums_of_errors(
    pipe: DiffusionPipeline, scheduler: SchedulerMixin, n: int, samples: TeacherSamples, batch_size: int | BatchSize
) -> list[float]:
    def errors(batch: TeacherSamples) -> tuple[float, float]:
        _, final = sample_latents(pipe, scheduler, n, **batch.inputs.pipeline_arguments(pipe))
        final = final[: len(batch)]  # some pipelines double the batch for guidance
        error = final.float() - batch.final.to(final.device).float()
        return error.square().mean().item() * len(batch), error.abs().mean().item() * len(batch)

    return [sum(values) for values in zip(*samples.map_calls(batch_size, errors))]


def relative_detail(images: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """The power of the finest detail of images relative to that of reference images: more than 1 is grain, less is blur.

    Detail is what a pixel differs by from the mean of its four neighbours. The ratio of its power is the geometric mean over squares
    of `DETAIL_SQUARE` pixels, so that grain on an even ground counts as much as an edge. Each power is raised by that of rounding
    to 256 levels.

    Args:
        images: Arrays of shape `(height, width, channels)` in [0, 1].
        reference: As many, of the same shapes.
    """
    logarithms = [
        (_power_of_detail(image) / _power_of_detail(other)).log().mean()
        for image, other in zip(images, reference, strict=True)
    ]
    return torch.stack(logarithms).mean().exp().item()


def _power_of_detail(image: np.ndarray) -> Tensor:
    x = torch.from_numpy(image).double().movedim(-1, 0)
    neighbours = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:]
    detail = x[:, 1:-1, 1:-1] - neighbours / 4
    squares = torch.nn.functional.avg_pool2d(detail.square(), DETAIL_SQUARE, ceil_mode=True)
    return squares + 1 / (12 * 255**2)


def compare(
    pipe: DiffusionPipeline,
    schedulers: Mapping[str, SchedulerMixin],
    step_counts: Iterable[int],
    samples: TeacherSamples,
    batch_size: int | BatchSize,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[Row]:
    """The rows of named schedulers, sorted by number of steps, then by distance (see [`distance_to_teacher`]).

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
            rows.append(Row(n, name, *(error if np.isfinite(error) else float("inf") for error in errors)))
    return sorted(rows, key=lambda row: (row.num_inference_steps, row.distance))


def markdown_table(ours: Sequence[Row], others: Sequence[Row], num_others: int = NUM_OTHERS) -> str:
    """A Markdown table of our rows and the closest `num_others` others for each number of steps.

    It has the distances relative to the best of the others, too, and what else the rows have.
    """
    names = ("steps", "scheduler", "distance to teacher", "relative to best", "absolute error", "detail")
    lines = [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names))]
    for n in sorted({row.num_inference_steps for row in ours}):
        rivals = [row for row in others if row.num_inference_steps == n]
        for row in [row for row in ours if row.num_inference_steps == n] + rivals[:num_others]:
            relative = f"{row.distance / rivals[0].distance:.2f}" if rivals and rivals[0].distance else "-"
            absolute, detail = (
                "-" if x is None else f"{x:.{digits}f}" for x, digits in ((row.absolute, 4), (row.detail, 2))
            )
            lines.append(f"| {n} | {row.scheduler} | {row.distance:.5f} | {relative} | {absolute} | {detail} |")
    return "\n".join(lines)


def count_parameters(pipe: DiffusionPipeline) -> int:
    """The number of parameters of all networks of a pipeline."""
    networks = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    return sum(parameter.numel() for network in networks for parameter in network.parameters())
