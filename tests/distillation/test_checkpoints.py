"""Checkpoints: complete or not there, the newest few, and nothing that runs."""

import os
import pickle

import pytest
import torch
from conftest import file_size_limit

from diffusers_gas.distillation.checkpoints import Checkpoints


STATE = {
    "steps_done": 3,
    "solver": {"a": torch.rand(4, dtype=torch.float64)},
    "lr": {"base_lrs": [1e-3], "none": None},
}


def test_round_trip_is_exact(tmp_path):
    Checkpoints(tmp_path).save(3, STATE)
    loaded = Checkpoints(tmp_path).load("latest")
    assert torch.equal(loaded["solver"]["a"], STATE["solver"]["a"])
    assert {k: v for k, v in loaded.items() if k != "solver"} == {k: v for k, v in STATE.items() if k != "solver"}


def test_the_newest_are_kept_and_latest_is_by_number(tmp_path):
    checkpoints = Checkpoints(tmp_path, total_limit=2)
    for step in (8, 9, 10):
        checkpoints.save(step, {"steps_done": step})
    (tmp_path / "checkpoint-99.partial-1").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not one")
    assert [path.name for path in checkpoints.paths()] == ["checkpoint-9.pt", "checkpoint-10.pt"]
    assert checkpoints.load("latest")["steps_done"] == 10
    assert checkpoints.load("checkpoint-9.pt")["steps_done"] == 9
    assert checkpoints.load(str(tmp_path / "checkpoint-9.pt"))["steps_done"] == 9


def test_missing(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in"):
        Checkpoints(tmp_path / "nothing").load("latest")
    Checkpoints(tmp_path).save(1, STATE)
    with pytest.raises(ValueError, match=r"has \['checkpoint-1.pt'\]"):
        Checkpoints(tmp_path).load("checkpoint-2.pt")


@pytest.mark.parametrize("keep", [0, 10, 400, -20])
def test_damaged_files_are_named(tmp_path, keep):
    path = Checkpoints(tmp_path).save(1, STATE)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"checkpoint-1\.pt is not a readable checkpoint"):
        Checkpoints(tmp_path).load("latest")


def test_nothing_in_a_file_is_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"steps_done": Hostile()}, tmp_path / "checkpoint-1.pt")
    (tmp_path / "checkpoint-2.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("checkpoint-1.pt", "checkpoint-2.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a readable checkpoint"):
            Checkpoints(tmp_path).load(name)
    assert not (tmp_path / "ran").exists()


def test_a_write_that_fails_keeps_the_earlier_ones(tmp_path):
    """The system refuses the bytes past the limit, as it does on a full disk."""
    checkpoints = Checkpoints(tmp_path, total_limit=1)
    checkpoints.save(1, STATE)
    with file_size_limit(10_000), pytest.raises(OSError, match=r"checkpoint-2\.pt could not be written"):
        checkpoints.save(2, {"steps_done": 2, "large": torch.zeros(100_000)})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1.pt"]
    assert checkpoints.load("latest")["steps_done"] == 3
