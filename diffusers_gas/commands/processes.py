"""The processes of a command: how many there are, how they agree, what they keep others out of, and Ctrl-C."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers.utils import logging

from ..utils.files import locked, remove_leftovers
from ..utils.tensors import FLOAT32


logger = logging.get_logger(__name__)

# How long processes wait for one of them, which may sample a teacher for hours. PyTorch's ten minutes on GPUs would end them all, in every
# run anew. Launchers notice a process that has died.
LONGEST_WAIT = timedelta(days=1)


def process_state() -> PartialState:
    """The processes that a launcher has started; one without a launcher."""
    # Without `cpu` the processes of a CPU would not find each other.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)


def start_accelerator(**options: Any) -> Accelerator:
    """The [`process_state`] with what helps to train. `options` are those of `Accelerator`.

    Raises:
        ValueError: If the launcher asks for parts of a network in each process.
    """
    for name in ("DEEPSPEED", "FSDP"):
        # Under these Transformers may load a part of a text encoder, or nothing, in a process.
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"The launcher asks for {name}, which splits networks up, but each process needs them whole. Use "
                "`accelerate launch --multi_gpu`."
            )
    process_state()  # which an `Accelerator` would give less time
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
def exclusive_folder(output_dir: str) -> Iterator[None]:
    """Keeps other runs out of an output folder while this run, with all its processes, works there.

    Raises:
        ValueError: If another run works there.
        OSError: If nothing can be written there.
    """
    lock_file = Path(output_dir) / ".lock"
    with ExitStack() as stack:
        in_use = [False]
        if process_state().is_main_process:
            lock_file.parent.mkdir(parents=True, exist_ok=True)
            lock_file.touch()
            try:
                stack.enter_context(locked(lock_file, wait=False))
            except BlockingIOError:
                in_use = [True]
        if broadcast_object_list(in_use)[0]:
            raise ValueError(f"`--output_dir {output_dir}` is in use by another run: wait for it, or choose another.")
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
