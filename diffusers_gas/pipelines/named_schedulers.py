"""Schedulers by short descriptions: a class with settings, a folder, or a Hub repository."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin

from ..schedulers.configs import translate_config
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_sdm import SDMScheduler
from .driving import scheduler_config


OURS = {scheduler_class.__name__: scheduler_class for scheduler_class in (GASScheduler, SDMScheduler)}


def load_scheduler(entry: str, pipe: DiffusionPipeline) -> SchedulerMixin:
    """A scheduler for a pipeline.

    Args:
        entry: The name of a class of Diffusers or of this package, made from the config of the pipeline's own scheduler
            (that of a flow-matching pipeline translated), with settings of its own after a colon, e.g.
            `DPMSolverMultistepScheduler:timestep_spacing=trailing,solver_order=3`; or a folder or Hub repository that a
            scheduler was saved to.
        pipe: The pipeline.

    Raises:
        ValueError: If there is no such class, or it has no such setting.
        OSError: If there is no such folder or repository.
    """
    name, _, settings = entry.partition(":")
    scheduler_class = _scheduler_class(name)
    if scheduler_class is None:
        if "/" not in entry and not Path(entry).is_dir():
            raise ValueError(f"{entry} is neither a scheduler class of Diffusers or of this package nor a folder.")
        return load_saved_scheduler(entry)
    config = scheduler_config(pipe)
    # Diffusers' multistep schedulers have other names for the settings of its flow-matching ones.
    if not name.startswith("FlowMatch") and translate_config(config).get("use_flow_sigmas"):
        config = translate_config(config)
    return scheduler_class.from_config(config, **_settings(entry, settings, scheduler_class))


def load_saved_scheduler(path: str) -> SchedulerMixin:
    """The scheduler that was saved to a folder or Hub repository, of the class that its config names.

    Raises:
        ValueError: If that is no scheduler of Diffusers or of this package.
        OSError: If there is no such folder or repository.
    """
    saved = GASScheduler.load_config(path).get("_class_name")
    scheduler_class = _scheduler_class(str(saved))
    if scheduler_class is None:
        raise ValueError(f"{path} holds a {saved}, which is no scheduler of Diffusers or of this package.")
    return scheduler_class.from_pretrained(path)


def check_step_counts(name: str, scheduler: SchedulerMixin, step_counts: list[int]) -> None:
    """Raises a `ValueError` if a learned scheduler lacks one of the step counts."""
    missing = sorted(set(step_counts) - scheduler.solvers.keys()) if isinstance(scheduler, GASScheduler) else []
    if missing and scheduler.solvers:
        raise ValueError(f"{name} has solvers for {sorted(scheduler.solvers)} steps, not for {missing}.")


def _scheduler_class(name: str) -> type[SchedulerMixin] | None:
    candidate = OURS.get(name) or getattr(diffusers, name, None)
    return candidate if isinstance(candidate, type) and issubclass(candidate, SchedulerMixin) else None


def _settings(entry: str, text: str, scheduler_class: type[SchedulerMixin]) -> dict[str, Any]:
    known = inspect.signature(scheduler_class.__init__).parameters.keys() - {"self"}
    settings = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in known:
            raise ValueError(f"{entry}: {part!r} is not a setting of it, name=value with a name of {sorted(known)}.")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings
