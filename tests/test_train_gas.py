"""The training script as a user runs it: real processes, a small job on the shipped teacher."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from diffusers_gas import GASScheduler


SCRIPT = ROOT / "training" / "train_gas.py"
SMALL = ["--num_teacher_samples", "64", "--num_validation_samples", "32", "--teacher_num_inference_steps", "10"]


def run(*arguments: str, launcher: tuple[str, ...] = (sys.executable,), **env: str) -> subprocess.CompletedProcess:
    command = [*launcher, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **env})


def test_main_job(tmp_path):
    arguments = [
        "--output_dir",
        str(tmp_path),
        "--num_inference_steps",
        "3",
        "4",
        "--max_train_iterations",
        "2",
        *SMALL,
    ]
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
    result = run(*arguments, launcher=launcher)
    assert result.returncode == 0, result.stderr
    for expected in ("DDPMPipeline", "0.65 M weights", "64 to learn from, 32 held out", "network evaluations"):
        assert expected in result.stdout
    table = (tmp_path / "comparison.md").read_text()
    assert table.strip() in result.stdout
    results = json.loads((tmp_path / "comparison.json").read_text())
    for row in results["ours"]:
        rivals = [
            other["distance"]
            for other in results["others"]
            if other["num_inference_steps"] == row["num_inference_steps"]
        ]
        assert len(rivals) > 20
        assert row["distance"] < min(rivals)
    picture = np.asarray(Image.open(tmp_path / "comparison.png"))
    assert picture.std() > 10

    scheduler = GASScheduler.from_pretrained(tmp_path / "scheduler")
    assert sorted(scheduler.solvers) == [3, 4]
    assert scheduler.solvers[4].provenance["teacher_num_inference_steps"] == 10

    # A second run adds a step count, keeps the others, and does not sample the teacher again.
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "teacher_samples").iterdir()}
    arguments[3:5] = ["5"]
    assert run(*arguments).returncode == 0
    assert sorted(GASScheduler.from_pretrained(tmp_path / "scheduler").solvers) == [3, 4, 5]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "teacher_samples").iterdir()} == cached

    # Another teacher's solvers do not go into the same folder.
    other = run(*arguments, "--teacher_num_inference_steps", "12")
    assert other.returncode != 0
    assert "3-step solver made with" in other.stderr and "--output_dir" in other.stderr


def test_interrupt_leaves_a_usable_solver(tmp_path):
    command = [sys.executable, str(SCRIPT), "--output_dir", str(tmp_path), "--num_inference_steps", "4", *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    solver = tmp_path / "scheduler" / "solver" / "4_steps.safetensors"
    deadline = time.monotonic() + 120
    while not solver.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert solver.exists()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Interrupted: keeping the best solver so far." in output
    assert "relative to best" in output
    GASScheduler.from_pretrained(tmp_path / "scheduler").set_timesteps(4)


def test_killed_while_collecting_keeps_the_samples(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--num_teacher_samples", "2048"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], stderr=subprocess.DEVNULL)
    folder, deadline = tmp_path / "teacher_samples", time.monotonic() + 120
    while len(list(folder.glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(list(folder.glob("*.safetensors"))) >= 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--pretrained_model_name_or_path", "{tmp}/nothing"], "nothing"),
        (["--teacher_scheduler", "BestScheduler"], "BestScheduler` is not a Diffusers scheduler class"),
        (["--config", "{tmp}/config.yaml"], r"unknown arguments ['learning_speed']"),
        (["--pipeline_arguments", "{"], "--pipeline_arguments"),
        (["--num_inference_steps", "0"], "at least 1"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    (tmp_path / "config.yaml").write_text("learning_speed: 3\n")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    result = run(*arguments, "--output_dir", str(tmp_path / "out"), *SMALL)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_configs_are_arguments(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("num_inference_steps: [3]\nmax_train_iterations: 1\nloss: l1\n")
    result = run("--config", str(config), "--loss", "huber", "--output_dir", str(tmp_path), *SMALL)
    assert result.returncode == 0, result.stderr
    assert "[3] steps, Gauss-Newton on the huber distance" in result.stdout


def test_two_processes_share_the_work(tmp_path):
    """Each process samples its share of the teacher; the result is one folder that the main process wrote."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    arguments = ["--output_dir", str(tmp_path), "--num_inference_steps", "3", "--max_train_iterations", "2", *SMALL]
    result = run(*arguments, launcher=launcher, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    shards = list((tmp_path / "teacher_samples").glob("*.safetensors"))
    assert len(shards) == 4  # two processes, learning and held-out samples
    assert list(GASScheduler.from_pretrained(tmp_path / "scheduler").solvers) == [3]
