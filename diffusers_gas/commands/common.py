"""What the commands share while they run: processes, output folders, interruptions, uploads."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers import DiffusionPipeline
from diffusers.utils import is_matplotlib_available, logging

from ..comparison import count_parameters
from ..pipelines.named_schedulers import EXAMPLE_MU
from ..pipelines.sampling import NoPicture
from ..presentation.model_card import write_model_card
from ..schedulers.scheduling_gas import GASScheduler
from ..schedulers.scheduling_sdm import SDMScheduler
from ..utils.files import locked, remove_leftovers
from ..utils.tensors import FLOAT32
from .arguments import HubSettings, PipelineSettings


logger = logging.get_logger(__name__)


def start_accelerator(**options: Any) -> Accelerator:
    """The processes that a launcher has started; one without a launcher. `options` are those of `Accelerator`."""
    accelerator = Accelerator(**options)
    if accelerator.device.type != "cpu" or accelerator.num_processes > 1:
        return accelerator
    # `accelerate launch` leaves a process one thread, which suits those that drive a GPU.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        has_affinity = hasattr(os, "sched_getaffinity")
        torch.set_num_threads(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)
    # The launcher has been asked for several processes if it names the address at which they would meet.
    if parse_flag_from_env("ACCELERATE_USE_CPU") and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        logger.warning(
            "`accelerate launch --cpu` starts several processes by MPI only, and has started one. Without MPI use "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N -m diffusers_gas COMMAND`."
        )
    return accelerator


def sum_over_processes(accelerator: Accelerator) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that sums a tensor over all processes."""
    if accelerator.num_processes == 1:
        return lambda tensor: tensor
    return lambda tensor: accelerator.reduce(tensor.to(accelerator.device), "sum").to(tensor.device)


@contextmanager
def only_run(output_dir: str) -> Iterator[None]:
    """Keeps other runs out of an output folder while this run, with all its processes, works there.

    Raises:
        ValueError: If another run works there.
    """
    lock = Path(output_dir) / ".lock"
    with ExitStack() as stack:
        busy = [False]
        # Without `cpu` the processes of a CPU would not find each other; the `Accelerator` is made later.
        if PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).is_main_process:
            lock.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
            try:
                stack.enter_context(locked(lock, wait=False))
            except BlockingIOError:
                busy = [True]
        if broadcast_object_list(busy)[0]:
            raise ValueError(
                f"`--output_dir {output_dir}` is in use by another run: wait for its end, or choose another."
            )
        remove_leftovers(output_dir)
        yield


@contextmanager
def deferred_interrupt(reduce: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is a request that all processes see between two steps. A second Ctrl-C acts at once.

    Yields a function that says, in all processes alike, whether any of them was interrupted. `reduce` sums a tensor over the
    processes.
    """
    requests: list[int] = []

    def request(number: int, frame: FrameType | None) -> None:
        requests.append(number)
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield lambda: reduce(torch.tensor([float(len(requests))], **FLOAT32)).item() > 0
    finally:
        signal.signal(signal.SIGINT, previous)


def model_line(settings: PipelineSettings, pipe: DiffusionPipeline) -> str:
    """The pipeline, where it comes from, and its size."""
    weights = count_parameters(pipe) / 1e6
    return f"{type(pipe).__name__} from {settings.pretrained_model_name_or_path}, {weights:.2f} M weights"


def require_matplotlib() -> None:
    """Raises `NoPicture` where pictures cannot be drawn."""
    if not is_matplotlib_available():
        raise NoPicture("No picture without matplotlib: pip install 'diffusers-gas[train]'")


@contextmanager
def reporting(what: str) -> Iterator[None]:
    """Inside, an error is printed and forgotten: a report must not cost the result that it reports."""
    try:
        yield
    except Exception as error:
        print(f"Warning: no {what} ({type(error).__name__}: {error})", flush=True)


def draw_images(
    path: Path, make: Callable[[], dict[str, list[np.ndarray]]], titles: Sequence[str] = ()
) -> dict[str, list[np.ndarray]] | None:
    """Draws rows of images, by label, and returns them. Prints the reason where there can be no picture."""
    try:
        require_matplotlib()
        rows = make()
    except NoPicture as error:
        print(error, flush=True)
        return None
    from ..presentation.figures import comparison_picture

    comparison_picture(rows, path, titles)
    return rows


def draw(scheduler: GASScheduler | SDMScheduler, step_counts: Sequence[int], path: Path) -> None:
    """Draws a scheduler's solvers or plans."""
    require_matplotlib()
    from ..presentation.figures import draw_plans, draw_solvers

    if isinstance(scheduler, GASScheduler):
        draw_solvers(scheduler, step_counts, path)
    else:
        plans = [scheduler.plan_for(n, EXAMPLE_MU) for n in step_counts]
        draw_plans(plans, path)


def push_to_hub(
    settings: HubSettings, output_dir: Path, scheduler: GASScheduler | SDMScheduler, results: str, samples: Path | None
) -> None:
    """Pushes `{output_dir}/scheduler` with a model card of results, in Markdown, and of a picture of samples."""
    repo_id, folder = settings.hub_model_id or output_dir.resolve().name, output_dir / "scheduler"
    write_model_card(scheduler, folder, results=results, samples=samples)
    scheduler.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, token=settings.hub_token)
    print(f"Pushed to: {repo_id}", flush=True)
