"""Shared fixtures."""

import os


# Read when libraries are imported, below. One thread for each process, those that tests start included: idle threads of one
# would keep another's from working.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests must pass without a network: nothing may ask the real Hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline


# Where tests run in the background they ignore Ctrl-C, and so would the scripts that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "training"))  # scripts, not a package
TEACHER = ROOT / "examples" / "teachers" / "digits"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> DDPMPipeline:
    """The shipped teacher. Tests leave its scheduler as it was."""
    pipe = DDPMPipeline.from_pretrained(TEACHER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Inside, the system refuses bytes of a file past a size, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
