"""`diffusers-gas calibrate` on the shipped model."""

from types import SimpleNamespace

import pytest
from conftest import TEACHER

from diffusers_gas import SDMScheduler
from diffusers_gas.commands import calibrate, reporting


MODEL = ["--pretrained_model_name_or_path", str(TEACHER)]
SMALL = ["--num_inference_steps", "6", "--num_samples", "3", "--solver", "heun", "--most_evaluations", "400"]


def test_what_cannot_be_pictured_is_pushed_without_a_picture(tmp_path, monkeypatch, capsys):
    def no_picture() -> None:
        raise ValueError("No picture: nothing to see.")

    pushed = []
    monkeypatch.setattr(reporting, "figures", no_picture)
    monkeypatch.setattr(calibrate, "push_to_hub", lambda *arguments: pushed.append(arguments))
    monkeypatch.setattr(calibrate.CalibrationSettings, "create_repository", lambda *arguments: None)
    (tmp_path / "scheduler").mkdir()  # as a run leaves it that is killed in its first save
    calibrate.main([*MODEL, "--output_dir", str(tmp_path), "--push_to_hub", *SMALL])
    assert "No picture: nothing to see." in capsys.readouterr().out
    ((_, _, scheduler, results, samples),) = pushed
    assert samples is None and list(scheduler.plans) == [6] and "| 6 | heun |" in results
    record = SDMScheduler.from_pretrained(tmp_path / "scheduler").plans[6].provenance
    assert (record["teacher"], record["torch_dtype"]) == ("digits", "float32")


@pytest.mark.slow
def test_the_target_may_be_a_teacher(tmp_path, capsys):
    teacher = ["--teacher_scheduler", "DDIMScheduler", "--teacher_num_inference_steps", "9"]
    calibrate.main([*MODEL, "--output_dir", str(tmp_path), "--target", "teacher", *teacher, *SMALL])
    assert "the samples of DDIMScheduler in 9 steps" in capsys.readouterr().out
    record = SDMScheduler.from_pretrained(tmp_path / "scheduler").plans[6].provenance
    assert (record["teacher_scheduler"], record["teacher_num_inference_steps"]) == ("DDIMScheduler", 9)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_inference_steps", "1"], "at least 2"),
        (["--teacher_scheduler", "DDIMScheduler"], "--target teacher"),
        (["--prompts_file", "{tmp}/nothing.txt"], "nothing.txt"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    with pytest.raises((ValueError, OSError), match=message):
        calibrate.main([*MODEL, "--output_dir", str(tmp_path / "out"), *arguments])


def test_several_processes_are_refused(tmp_path, monkeypatch):
    """Each would make the same plans."""
    monkeypatch.setattr(calibrate, "process_state", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="one process, got 2"):
        calibrate.main([*MODEL, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
