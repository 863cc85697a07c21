"""Shared fixtures."""

import os


# Libraries read this when they are imported. Every process, also those that tests start, gets one thread: the idle threads of one
# process would slow down the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests must not use the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline

from diffusers_gas.schedulers import scheduling_gas, scheduling_utils


# Processes in the background ignore Ctrl-C. The scripts that tests start and interrupt would inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
TEACHER = ROOT / "examples" / "teachers" / "digits"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What a `GASScheduler` warns of."""
    messages: list[str] = []
    for module in (scheduling_gas, scheduling_utils):
        monkeypatch.setattr(module.logger, "warning", messages.append)
    return messages


@pytest.fixture(scope="session")
def digits() -> DDPMPipeline:
    """The shipped digits model. Tests do not change its scheduler."""
    pipe = DDPMPipeline.from_pretrained(TEACHER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Makes writing beyond a file size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
