"""States of trainings on disk: complete or not there, and nothing that runs."""

import os
import pickle

import pytest
import torch
from conftest import file_size_limit

from diffusers_gas.utils.files import load_state, save_state


STATE = {
    "steps_done": 3,
    "solver": {"a": torch.rand(4, dtype=torch.float64)},
    "lr": {"base_lrs": [1e-3], "none": None},
}


def test_round_trip_is_exact(tmp_path):
    path = tmp_path / "new" / "state.pt"
    save_state({"steps_done": 2}, path)
    (path.parent / f"{path.name}.partial-1").write_bytes(b"half")  # of a killed process
    save_state(STATE, path)
    loaded = load_state(path)
    assert torch.equal(loaded["solver"]["a"], STATE["solver"]["a"])
    assert {k: v for k, v in loaded.items() if k != "solver"} == {k: v for k, v in STATE.items() if k != "solver"}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 10, 400, -20])
def test_damaged_files_are_named(tmp_path, keep):
    path = tmp_path / "state.pt"
    save_state(STATE, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"state\.pt is not a readable checkpoint .* Remove it"):
        load_state(path)


def test_nothing_in_a_file_is_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"steps_done": Hostile()}, tmp_path / "1.pt")
    (tmp_path / "2.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("1.pt", "2.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a readable checkpoint"):
            load_state(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_write_that_fails_keeps_the_earlier_file(tmp_path):
    """The system refuses the bytes past the limit, as it does on a full disk."""
    path = tmp_path / "state.pt"
    save_state(STATE, path)
    with file_size_limit(10_000), pytest.raises(OSError, match=r"state\.pt could not be written"):
        save_state({"steps_done": 4, "large": torch.zeros(100_000)}, path)
    assert list(tmp_path.iterdir()) == [path] and load_state(path)["steps_done"] == 3
