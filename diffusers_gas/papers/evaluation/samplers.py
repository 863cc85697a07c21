"""Names and descriptions of the samplers that an evaluation compares."""

import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME

from ...schedulers.solver_files import list_solver_files
from ...utils.files import checksum, load_safetensors


@dataclass(frozen=True)
class Sampler:
    """A scheduler with a number of steps, and its name in tables."""

    name: str
    scheduler: SchedulerMixin
    num_inference_steps: int

    @property
    def label(self) -> str:
        return f"{self.name}, {self.num_inference_steps} steps"

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What the samples depend on, in JSON's types: config, number of steps, and a hash of the learned parameters."""
        with tempfile.TemporaryDirectory() as folder:
            self.scheduler.save_pretrained(folder)
            config = json.loads((Path(folder) / SCHEDULER_CONFIG_NAME).read_text(encoding="utf-8"))
            learned = list_solver_files(folder).get(self.num_inference_steps)
            digest = None if learned is None else checksum(*load_safetensors(learned))
        return {"config": config, "num_inference_steps": self.num_inference_steps, "learned": digest}
