"""Schedulers by name: a class with settings, a folder, or a Hub repository."""

import inspect
import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin

from ..schedulers.configs import scheduler_folder
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_sdm import SDMScheduler
from ..schedulers.scheduling_utils import ODEScheduler
from .driving import scheduler_config
from .teacher import check_noise, make_scheduler


# The shift `mu` of checks, tables and figures for pipelines whose shift depends on the resolution.
EXAMPLE_MU = 1.0

OURS = {scheduler_class.__name__: scheduler_class for scheduler_class in (GASScheduler, SDMScheduler)}


def load_scheduler(entry: str, pipe: DiffusionPipeline) -> SchedulerMixin:
    """Makes or loads a scheduler for a pipeline.

    Args:
        entry: One of
            - a class of Diffusers or of this package, with settings after a colon, e.g.
              `DPMSolverMultistepScheduler:timestep_spacing=trailing,solver_order=3`. The scheduler is made from the config of
              the pipeline's own scheduler.
            - a folder or a Hub repository with a saved scheduler.
        pipe: The pipeline.

    Raises:
        ValueError: If there is no such class, it has no such setting, or the saved scheduler is for another noise schedule.
        OSError: If there is no such folder or repository.
    """
    name, _, settings = entry.partition(":")
    scheduler_class = _scheduler_class(name)
    if scheduler_class is None:
        if "/" not in entry and not Path(entry).is_dir():
            raise ValueError(
                f"{entry} is neither a scheduler class of Diffusers or of this package nor a folder. Pass the name of a "
                "class, a folder or a Hub repository."
            )
        scheduler = load_saved_scheduler(entry)
        check_noise(pipe, scheduler)
        return scheduler
    config = scheduler_config(pipe)
    if config.get("invert_sigmas") and "invert_sigmas" not in inspect.signature(scheduler_class).parameters:
        raise ValueError(f"{name} cannot sample {type(pipe).__name__}: it does not know `invert_sigmas`.")
    return make_scheduler(scheduler_class, config, **_settings(entry, settings, scheduler_class))


def load_saved_scheduler(path: str) -> SchedulerMixin:
    """Loads the scheduler from a folder or Hub repository. Its config names its class.

    Raises:
        ValueError: If the class is not a scheduler of Diffusers or of this package.
        OSError: If there is no such folder or repository.
    """
    saved = GASScheduler.load_config(path).get("_class_name")
    scheduler_class = _scheduler_class(str(saved))
    if scheduler_class is None:
        raise ValueError(f"{path} has a {saved}, which is not a scheduler of Diffusers or of this package.")
    return scheduler_class.from_pretrained(path)


def load_our_scheduler(path: str) -> GASScheduler | SDMScheduler:
    """The scheduler of this package in a folder (or in its sub-folder `scheduler`) or in a Hub repository.

    Raises:
        ValueError: If that is another scheduler or damaged.
        OSError: If there is none.
    """
    if Path(path).exists():
        path = str(scheduler_folder(path, "scheduler"))
    elif path.count("/") != 1:
        raise OSError(f"{path} is neither a folder nor a Hub repository, user/name.")
    scheduler = load_saved_scheduler(path)
    if not isinstance(scheduler, GASScheduler | SDMScheduler):
        raise ValueError(f"{path} has a {type(scheduler).__name__}: only GASScheduler and SDMScheduler have solvers.")
    return scheduler


def check_step_counts(name: str, scheduler: SchedulerMixin, step_counts: Sequence[int]) -> None:
    """Raises a `ValueError`, with `name` in front, if a scheduler of this package refuses one of the step counts."""
    if not isinstance(scheduler, ODEScheduler):
        return
    scheduler = deepcopy(scheduler)
    shift = {"mu": EXAMPLE_MU} if scheduler.config.use_dynamic_shifting else {}
    for n in step_counts:
        try:
            scheduler.set_timesteps(n, **shift)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _scheduler_class(name: str) -> type[SchedulerMixin] | None:
    candidate = OURS.get(name) or getattr(diffusers, name, None)
    return candidate if isinstance(candidate, type) and issubclass(candidate, SchedulerMixin) else None


def _settings(entry: str, text: str, scheduler_class: type[SchedulerMixin]) -> dict[str, Any]:
    names = inspect.signature(scheduler_class.__init__).parameters.keys() - {"self"}
    settings = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in names:
            raise ValueError(f"{entry}: {part!r} is not name=value with one of the settings {sorted(names)}.")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings
