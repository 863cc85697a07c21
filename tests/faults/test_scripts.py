"""The scripts when two of them meet, when somebody presses Ctrl-C, and when the disk is full: a line that says so."""

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from tempfile import TemporaryFile
from typing import Any

from conftest import ROOT

from diffusers_gas import SDMScheduler
from diffusers_gas.schedulers.solver_files import load_safetensors


SMALL = ["--num_teacher_samples", "64", "--num_validation_samples", "32", "--teacher_num_inference_steps", "10"]


class Script:
    """A running script."""

    def __init__(self, name: str, *arguments: str, **settings: Any):
        self.output = TemporaryFile("w+")  # a pipe that nobody reads would fill up and hold it
        command = [sys.executable, str(ROOT / "training" / name), *arguments]
        self.process = subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT, **settings)

    def last_words(self) -> str:
        """The last line, when it has failed without a traceback."""
        self.process.wait(timeout=240)
        self.output.seek(0)
        output = self.output.read()
        assert self.process.returncode == 1 and "Traceback" not in output, output
        return output.splitlines()[-1]

    def interrupt(self, ready: Callable[[], bool]) -> str:
        """Presses Ctrl-C as soon as something is there, and waits for the last line."""
        deadline = time.monotonic() + 240
        while not ready():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        self.process.send_signal(signal.SIGINT)
        return self.last_words()


def test_train_gas(tmp_path):
    """A second run in its folder refuses to start; afterwards the folder is free, and then the disk is full."""
    output, samples = ["--output_dir", str(tmp_path)], tmp_path / "teacher_samples"
    first = Script("train_gas.py", *output, "--num_teacher_samples", "40000")
    refusals = []

    def met() -> bool:
        if samples.exists() and not refusals:
            refusals.append(Script("train_gas.py", *output).last_words())
        return bool(refusals) and len(list(samples.glob("*.safetensors"))) > 1

    words = first.interrupt(met)
    assert words == "train_gas.py: interrupted; samples, checkpoints and solvers so far are kept."
    assert refusals[0] == (
        f"train_gas.py: `--output_dir {tmp_path}` is in use by another run: wait for its end, or choose another."
    )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not [path for path in before if "partial" in path.name]
    for path in samples.glob("*.safetensors"):
        load_safetensors(path)

    def full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    words = Script("train_gas.py", *output, *SMALL, preexec_fn=full_disk).last_words()
    assert words.startswith(f"train_gas.py: {samples}/samples-") and ".safetensors could not be written (" in words
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_ctrl_c_in_calibrate_sdm(tmp_path):
    arguments = ["--num_inference_steps", "6", "7", "--num_samples", "2", "--solver", "heun"]
    script = Script("calibrate_sdm.py", *arguments, "--output_dir", str(tmp_path))
    words = script.interrupt((tmp_path / "scheduler" / "solver" / "6_steps.safetensors").exists)
    assert words == "calibrate_sdm.py: interrupted; the plans so far are kept."
    scheduler = SDMScheduler.from_pretrained(tmp_path / "scheduler")
    assert 6 in scheduler.plans
    scheduler.set_timesteps(6)


def test_ctrl_c_in_evaluate(tmp_path):
    shards = tmp_path / "shards"
    script = Script("evaluate.py", "--output_dir", str(tmp_path), "--num_samples", "64000")
    words = script.interrupt(lambda: len(list(shards.glob("*.safetensors"))) > 1)
    assert words == "evaluate.py: interrupted. The same command goes on where it was."
    assert all("diverged" in load_safetensors(path)[0] for path in shards.iterdir())
