"""What a training writes to its trackers (`--report_to`) and its folder while it runs."""

import signal
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..generalized_solver import GeneralizedSolver
from ..schedulers.scheduling_gas import GASScheduler


def log_solver(accelerator: Accelerator, scheduler: GASScheduler, solver: GeneralizedSolver, step: int) -> None:
    """The time grid and the weights of a solver's table."""
    with torch.no_grad():
        table = solver.table(scheduler.noise_schedule(mu=1.0))
    values: dict[str, float] = {}
    for name, times in (("times", table.times), ("evaluation_times", table.evaluation_times)):
        values |= {f"{name}/{k}": t for k, t in enumerate(times.tolist())}
    for name, weights in (("state_weights", table.state_weights), ("data_weights", table.data_weights)):
        values |= {f"{name}/{k}_{j}": weights[k, j].item() for k in range(len(weights)) for j in range(k + 1)}
    log(accelerator, solver.num_inference_steps, values, step)


def log(accelerator: Accelerator, num_inference_steps: int, values: Mapping[str, Any], step: int) -> None:
    """Numbers of the training of one solver."""
    accelerator.log({f"{num_inference_steps}_steps/{name}": value for name, value in values.items()}, step=step)


def log_images(
    accelerator: Accelerator, num_inference_steps: int, images: Mapping[str, Sequence[np.ndarray]], step: int
) -> None:
    """Rows of images, `(height, width, channels)` in [0, 1], to every tracker that takes images."""
    batches = {f"{num_inference_steps}_steps/{label}": np.stack(row) for label, row in images.items()}
    # Grey ones get three channels, which trackers ask for.
    batches = {
        label: (np.clip(np.broadcast_to(row, (*row.shape[:3], 3)), 0, 1) * 255).astype(np.uint8)
        for label, row in batches.items()
    }
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(batches, step=step, **layout)


class Interrupt:
    """Inside, Ctrl-C is a request that every process sees between two steps; a second one is immediate.

    Args:
        reduce: Sums a tensor over the processes.
    """

    def __init__(self, reduce: Callable[[torch.Tensor], torch.Tensor]):
        self._reduce, self._requested = reduce, False

    def __enter__(self) -> "Interrupt":
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *exception: Any) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        signal.signal(signal.SIGINT, self._previous)

    def requested(self) -> bool:
        """Whether any process was interrupted."""
        return self._reduce(torch.tensor([float(self._requested)])).item() > 0
