"""What a training writes to its trackers (`--report_to`) while it runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..generalized_solver import GeneralizedSolver
from ..schedulers.scheduling_gas import GASScheduler


class TrainingLog:
    """The trackers of a training that fits solvers one after the other.

    Some trackers take rising steps only. Therefore the steps of a fit are counted on from those of the fits before it.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._offset = self._last = 0

    def start_fit(self) -> None:
        """Steps that are logged from now on come after all that were logged."""
        self._offset = self._last

    def log(self, num_inference_steps: int, values: Mapping[str, Any], step: int) -> None:
        """Numbers of the solver for `num_inference_steps` at a step of its fit."""
        values = {f"{num_inference_steps}_steps/{name}": value for name, value in values.items()}
        self.accelerator.log(values, step=self._position(step))

    def log_solver(self, scheduler: GASScheduler, solver: GeneralizedSolver, step: int) -> None:
        """A solver's times and weights, x[k+1] = a[k] x[k] + u[k] x[0] + sum_j U[k,j] D[j]."""
        with torch.no_grad():
            table = solver.table(scheduler.noise_schedule(mu=1.0))
        values: dict[str, float] = {}
        for name, times in (("times", table.times), ("evaluation_times", table.evaluation_times)):
            values |= {f"{name}/{k}": t for k, t in enumerate(times.tolist())}
        for k, (newest, first, *predictions) in enumerate(table.weights.tolist()):
            values |= {f"a/{k}": newest, f"u/{k}": first}
            values |= {f"U/{k}_{j}": weight for j, weight in enumerate(predictions[: k + 1])}
        self.log(solver.num_inference_steps, values, step)

    def log_images(self, num_inference_steps: int, images: Mapping[str, Sequence[np.ndarray]], step: int) -> None:
        """Rows of images, `(height, width, channels)` in [0, 1], for every tracker that takes images."""
        batches = {}
        for label, row in images.items():
            batch = np.stack(row)
            # Trackers ask for three channels.
            batch = np.clip(np.broadcast_to(batch, (*batch.shape[:3], 3)), 0, 1) * 255
            batches[f"{num_inference_steps}_steps/{label}"] = batch.astype(np.uint8)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(batches, step=self._position(step), **layout)

    def _position(self, step: int) -> int:
        self._last = self._offset + step
        return self._last
