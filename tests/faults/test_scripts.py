"""The scripts when two of them meet, when somebody presses Ctrl-C, and when the disk is full: a line that says so."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import train_gas
from conftest import ROOT, file_size_limit

from diffusers_gas import SDMScheduler
from diffusers_gas.schedulers.solver_files import load_safetensors


SMALL = ["--num_teacher_samples", "64", "--num_validation_samples", "32", "--teacher_num_inference_steps", "10"]
TIMEOUT = 240


class Script:
    """A script that runs, with its output in a file: a pipe that nobody reads would hold it up."""

    def __init__(self, name: str, output_dir: Path, *arguments: str):
        self.log = output_dir.parent / f"{time.monotonic_ns()}.log"
        command = [sys.executable, str(ROOT / "training" / name), "--output_dir", str(output_dir), *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def last_words(self) -> str:
        """The last line, once it has failed without a traceback."""
        self.process.wait(TIMEOUT)
        output = self.log.read_text()
        assert self.process.returncode == 1 and "Traceback" not in output, output
        return output.splitlines()[-1]

    def interrupt(self, ready: Callable[[], bool]) -> str:
        """Presses Ctrl-C as soon as something is there, and waits for the last line."""
        deadline = time.monotonic() + TIMEOUT
        while not ready():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        self.process.send_signal(signal.SIGINT)
        return self.last_words()


def shards(folder: Path) -> list[Path]:
    return list(folder.glob("*.safetensors"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_run_a_folder(tmp_path):
    """A second one does not start. After Ctrl-C the folder is free, and the next finds the disk full."""
    output, samples = tmp_path / "output", tmp_path / "output" / "teacher_samples"
    first = Script("train_gas.py", output, "--num_teacher_samples", "40000")
    refusals = []

    def met() -> bool:
        if samples.exists() and not refusals:
            refusals.append(Script("train_gas.py", output).last_words())
        return bool(refusals) and len(shards(samples)) > 1

    words = first.interrupt(met)
    assert words == "train_gas.py: interrupted; samples, checkpoints and solvers so far are kept."
    in_use = f"train_gas.py: `--output_dir {output}` is in use by another run: wait for its end, or choose another."
    assert refusals == [in_use]
    before = contents(output)
    assert not [path for path in before if "partial" in path.name]
    for path in shards(samples):
        load_safetensors(path)

    with (
        file_size_limit(20_000),
        pytest.raises(OSError, match=rf"{samples}/samples-\w+\.safetensors could not be written"),
    ):
        train_gas.main(["--output_dir", str(output), *SMALL])
    assert contents(output) == before


def test_ctrl_c_keeps_what_there_is(tmp_path):
    arguments = ["--num_inference_steps", *map(str, range(6, 40)), "--num_samples", "2", "--solver", "heun"]
    calibration = Script("calibrate_sdm.py", tmp_path / "sdm", *arguments)
    evaluation = Script("evaluate.py", tmp_path / "evaluation", "--num_samples", "64000")
    words = calibration.interrupt((tmp_path / "sdm" / "scheduler" / "solver" / "6_steps.safetensors").exists)
    assert words == "calibrate_sdm.py: interrupted; the plans so far are kept."
    scheduler = SDMScheduler.from_pretrained(tmp_path / "sdm" / "scheduler")
    assert 6 in scheduler.plans
    scheduler.set_timesteps(6)

    measured = tmp_path / "evaluation" / "shards"
    words = evaluation.interrupt(lambda: len(shards(measured)) > 1)
    assert words == "evaluate.py: interrupted. The same command goes on where it was."
    assert all("diverged" in load_safetensors(path)[0] for path in measured.iterdir())
