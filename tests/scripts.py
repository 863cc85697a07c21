"""Scripts as real processes that start at once: forked from one that has imported what they import, and done nothing else."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from typing_extensions import Self


# Seconds after which a process is taken to hang, far more than any needs on a busy machine.
TIMEOUT = 900
TWO_PROCESSES = "torch.distributed.run --standalone --nproc_per_node 2"  # torchrun
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "diffusers_gas.commands.train",
        "diffusers_gas.commands.evaluate",
        "diffusers_gas.commands.calibrate",
        "diffusers_gas.commands.inspect_solver",
        "matplotlib.pyplot",
    ]
)


class Script:
    """A process that runs a script; killed at the end of a `with`.

    Args:
        target: The script, or the name of a module to run as `python -m` does.
        arguments: On its command line.
        cwd: Where it runs.
    """

    def __init__(self, target: str | Path, *arguments: object, cwd: str | Path = "."):
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        words = [str(target), *map(str, arguments)]
        self._process = SERVER.Process(
            target=_run, args=(words, os.path.abspath(cwd), self._outputs, dict(os.environ)), daemon=True
        )
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """`None` while it runs; minus the signal that ended it."""
        return self._process.exitcode

    @property
    def stdout(self) -> str:
        return self._outputs[0].read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._outputs[1].read_text(encoding="utf-8")

    def wait(self) -> Self:
        self._process.join(TIMEOUT)
        assert self.returncode is not None, f"still running after {TIMEOUT} s:\n{self.stdout}\n{self.stderr}"
        return self

    def wait_for(self, ready: Callable[[], object]) -> None:
        """Until something is true."""
        deadline = time.monotonic() + TIMEOUT
        while not ready():
            assert self.returncode is None, f"ended before that:\n{self.stdout}\n{self.stderr}"
            assert time.monotonic() < deadline, f"not so after {TIMEOUT} s:\n{self.stdout}\n{self.stderr}"
            time.sleep(0.005)

    def interrupt(self) -> Self:
        """Presses Ctrl-C, and waits for the end."""
        os.kill(self._process.pid, signal.SIGINT)
        return self.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.kill()


def run_script(target: str | Path, *arguments: object, cwd: str | Path = ".") -> Script:
    """A script that has ended."""
    with Script(target, *arguments, cwd=cwd) as script:
        return script.wait()


def launch(launcher: str, script: str | Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A script, or a module after a launcher's `-m`, that a launcher with its arguments has started and that has ended."""
    command = [sys.executable, "-m", *launcher.split(), str(script), *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)


def _run(words: list[str], cwd: str, outputs: list[Path], environment: Mapping[str, str]) -> None:
    for descriptor, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    # The server has the environment of its own start.
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = words
    if words[0].endswith(".py"):
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
