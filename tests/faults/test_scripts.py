"""The scripts when two of them meet, when somebody presses Ctrl-C, and when the disk is full: a line that says so."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from conftest import ROOT, TEACHER, file_size_limit
from scripts import Script, run_script

from diffusers_gas import SDMScheduler
from diffusers_gas.commands import processes
from diffusers_gas.commands import train as train_gas
from diffusers_gas.commands.processes import exclusive_folder, start_accelerator
from diffusers_gas.commands.resuming import load_checkpoint
from diffusers_gas.utils.files import load_safetensors, save_state


SMALL = ["--num_teacher_samples", "64", "--num_validation_samples", "32", "--teacher_num_inference_steps", "10"]
TRAIN, CALIBRATE = (ROOT / "training" / name for name in ("train_gas.py", "calibrate_sdm.py"))


def last_words(script: Script) -> str:
    """The last line of one that has failed without a traceback."""
    assert script.returncode == 1 and "Traceback" not in script.stderr, script.stderr
    return script.stderr.splitlines()[-1]


def shards(folder: Path) -> list[Path]:
    return list(folder.glob("*.safetensors"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_run_a_folder(tmp_path):
    """A second one does not start. After Ctrl-C the folder is free, and the next finds the disk full."""
    output, samples = tmp_path / "output", tmp_path / "output" / "teacher_samples"
    with Script(
        TRAIN, "--output_dir", output, "--num_validation_samples", "40000", "--max_train_iterations", "1"
    ) as first:
        first.wait_for(samples.exists)
        refusal = last_words(run_script(TRAIN, "--output_dir", output))
        first.wait_for(lambda: len(shards(samples)) > 1)
        words = last_words(first.interrupt())
    assert words == "train_gas.py: interrupted; samples, checkpoints and solvers so far are kept."
    in_use = f"train_gas.py: `--output_dir {output}` is in use by another run: wait for it, or choose another."
    assert refusal == in_use
    before = contents(output)
    assert not [path for path in before if "partial" in path.name]
    for path in shards(samples):
        load_safetensors(path)

    with (
        file_size_limit(5_000),
        pytest.raises(OSError, match=rf"{samples}/samples-\w+\.safetensors could not be written"),
    ):
        train_gas.main(["--pretrained_model_name_or_path", str(TEACHER), "--output_dir", str(output), *SMALL])
    assert contents(output) == before


def test_an_output_folder_that_cannot_be_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/output"), exclusive_folder(str(tmp_path / "file" / "output")):
        pytest.fail("work began")


@pytest.mark.slow
def test_ctrl_c_keeps_what_there_is(tmp_path):
    arguments = ["--num_inference_steps", *map(str, range(6, 40)), "--num_samples", "2", "--solver", "heun"]
    output = tmp_path / "sdm"
    with Script(CALIBRATE, "--output_dir", output, *arguments) as calibration:
        calibration.wait_for((output / "scheduler" / "6_steps.solver").exists)
        assert f"`--output_dir {output}` is in use" in last_words(run_script(CALIBRATE, "--output_dir", output))
        words = last_words(calibration.interrupt())
    assert words == "calibrate_sdm.py: interrupted; the same command goes on from the plans so far."
    scheduler = SDMScheduler.from_pretrained(tmp_path / "sdm" / "scheduler")
    assert 6 in scheduler.plans
    scheduler.set_timesteps(6)

    output, measured = tmp_path / "evaluation", tmp_path / "evaluation" / "shards"
    with Script(ROOT / "training" / "evaluate.py", "--output_dir", output, "--num_samples", "64000") as evaluation:
        evaluation.wait_for(lambda: len(shards(measured)) > 1)
        words = last_words(evaluation.interrupt())
    assert words == "evaluate.py: interrupted; the same command goes on from what was measured."
    assert all("diverged" in load_safetensors(path)[0] for path in measured.iterdir())


@pytest.mark.parametrize("content", [{"weights": torch.zeros(2)}, {"solver_config": {}}, torch.zeros(2)])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "3_steps.pt"
    save_state(content, path)
    with pytest.raises(ValueError, match=f"{path} is not a checkpoint"):
        load_checkpoint(path, {})


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_launchers_that_split_networks_up_are_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"{name}.*multi_gpu"):
        start_accelerator()


@pytest.mark.parametrize("rank", [None, "0"])
def test_processes_that_a_launcher_did_not_start_are_missed(monkeypatch, rank):
    warnings: list[str] = []
    monkeypatch.setattr(processes.logger, "warning", warnings.append)
    alone = SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    monkeypatch.setattr(processes, "Accelerator", lambda: alone)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name in ("RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert start_accelerator() is alone
    assert ["MPI only" in warning for warning in warnings] == [True] * (rank is None)


@pytest.mark.parametrize("begin", [start_accelerator, lambda: exclusive_folder("").__enter__()])
def test_processes_wait_longer_than_a_teacher_samples(monkeypatch, begin):
    """One may have samples to make that all wait for; PyTorch's limit is ten minutes on GPUs."""
    variables = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_PORT": 29500,
        "OMP_NUM_THREADS": 1,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(PartialState, "_shared_state", {})

    def init_process_group(backend, timeout=timedelta(minutes=10), **_):
        raise ConnectionError(f"{timeout.days} days")

    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    with pytest.raises(ConnectionError, match=r"[1-9] days"):
        begin()
