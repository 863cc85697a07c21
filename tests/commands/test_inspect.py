"""What `diffusers-gas inspect` shows of saved schedulers."""

from pathlib import Path

import pytest
import torch
from conftest import TEACHER
from PIL import Image
from saved_schedulers import CONFIGS, learned
from scripts import Script, run_script

from diffusers_gas import GASScheduler, SDMPlan, SDMScheduler
from diffusers_gas.commands.inspect_solver import main


PROVENANCE = {"teacher": "user/teacher", "loss": "l2", "pipeline_arguments": {"guidance_scale": 7.5}}


def inspect(*arguments: object) -> Script:
    return run_script("diffusers_gas", "inspect", *arguments)


def numbers(text: str, header: str) -> list[list[float]]:
    """The rows of the table whose header line begins with some words."""
    lines = iter(text.splitlines())
    next(line for line in lines if " ".join(line.split()).startswith(header))
    rows = []
    for line in lines:
        if not line:
            break
        rows.append([float(cell) if cell != "-" else float("nan") for cell in line.split()])
    return rows


@pytest.fixture
def folder(tmp_path) -> Path:
    scheduler = learned(CONFIGS["scaled-linear"], 4, 10)
    for n, solver in scheduler.solvers.items():
        solver.provenance = {**PROVENANCE, "distance": n / 1000}
    scheduler.save_pretrained(tmp_path / "gs")
    return tmp_path / "gs"


def test_a_learned_solver(folder):
    result = inspect(folder, "--output", folder / "solver.png")
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert max(map(len, text.splitlines()[1:])) <= 100
    for expected in ("teacher  ", "user/teacher", "guidance scale", "7.5", "distance", "0.004 (4), 0.01 (10)"):
        assert expected in text
    assert "4 steps: 27 learned numbers" in text and "10 steps: 129 learned numbers" in text

    scheduler = GASScheduler.from_pretrained(folder)
    for n, part in zip((4, 10), text.split("learned numbers")[1:]):
        noise_schedule = scheduler.noise_schedule()
        table = scheduler.solvers[n].table(noise_schedule)
        scheduler.set_timesteps(n)
        rows = numbers(part, "k t evaluation t model timestep sigma log-SNR")
        assert [row[0] for row in rows] == list(range(n + 1)) and len(rows[-1]) == 4
        columns = torch.tensor([row[1:] for row in rows[:-1]]).T.double()
        expected = (
            table.times[:-1],
            table.evaluation_times,
            scheduler.timesteps,
            torch.tensor(scheduler.step_numbers().sigmas[:-1]),
            2 * noise_schedule.lambda_(table.times[:-1]),
        )
        for column, values in zip(columns, expected):
            torch.testing.assert_close(column, values.detach().double(), rtol=5e-4, atol=5e-3)
        weights = table.weights.tolist()
        for k, row in enumerate(numbers(part, "k a[k] u[k] U[k,0]")):
            assert row == pytest.approx([k, *weights[k][: 3 + k]], abs=6e-5)
    assert Image.open(folder / "solver.png").size[0] > 900


def test_one_step_count_of_an_output_folder_of_training(folder, capsys):
    (folder.parent / "output").mkdir()
    folder.rename(folder.parent / "output" / "scheduler")
    main([str(folder.parent / "output"), "--num_inference_steps", "10"])
    text = capsys.readouterr().out
    assert (
        "10 steps: 129 learned numbers" in text
        and "27 learned" not in text
        and "0.004 " not in text.split("\n10 steps")[0]
    )


def test_a_calibrated_plan(tmp_path):
    scheduler = SDMScheduler(beta_schedule="scaled_linear")
    sigmas = torch.tensor([14.0, 6.0, 2.0, 0.7, 0.1, 0.0], dtype=torch.float64)
    measured = {name: [0.1 * i for i in range(5)] for name in ("eta", "curvature", "karras_eta")}
    record = {"q": 0.25, "distance": 0.003, "karras_sigmas": sigmas.tolist(), **measured}
    scheduler.add_plan(SDMPlan(sigmas, 2, "heun", record))
    scheduler.save_pretrained(tmp_path / "sdm")
    result = inspect(tmp_path / "sdm", "--output", tmp_path / "plan.png")
    assert result.returncode == 0, result.stderr
    assert "7 evaluations: 5 steps to sigma = 0, heun, of second order from step 2" in result.stdout
    rows = numbers(result.stdout, "step t model timestep sigma log-SNR order eta curvature")
    assert [row[3] for row in rows] == sigmas.tolist()[:-1]
    assert [row[5] for row in rows] == [1, 1, 2, 2, 1]
    assert [row[4] for row in rows] == pytest.approx((-2 * sigmas[:-1].log()).tolist(), abs=0.01)
    assert [row[6] for row in rows[:-1]] == pytest.approx(measured["eta"][:-1])
    assert [row[7] for row in rows[1:]] == pytest.approx(measured["curvature"][1:])
    assert "distance" in result.stdout and "0.003" in result.stdout and "karras" not in result.stdout
    assert Image.open(tmp_path / "plan.png").size[0] > 1000  # with the panels of what was measured


def test_untrained_schedulers(tmp_path, capsys):
    scheduler = GASScheduler(**CONFIGS["flow"])
    scheduler.save_pretrained(tmp_path)
    main([str(tmp_path), "--num_inference_steps", "4", "16"])
    text = capsys.readouterr().out
    assert "4 steps: untrained" in text and "Made by" not in text
    assert max(map(len, text.splitlines()[1:])) <= 100
    weights = scheduler.untrained_solver(4).table(scheduler.noise_schedule()).weights.tolist()
    assert numbers(text, "k a[k] u[k]")[3] == pytest.approx([3, *weights[3]], abs=6e-5)
    assert numbers(text, "k t evaluation t")[-1][-1] == float("inf")
    assert [row[0] for row in numbers(text.split("16 steps")[1], "k U[k,10]")] == list(range(16))

    SDMScheduler(**CONFIGS["flow"]).save_pretrained(tmp_path)
    main([str(tmp_path)])
    assert "6 evaluations: uncalibrated" in capsys.readouterr().out


def test_resolution_dependent_times_are_said_to_be_some(tmp_path, capsys):
    learned(CONFIGS["dynamic-shift"], 4).save_pretrained(tmp_path)
    main([str(tmp_path)])
    assert "shift mu = 1.0" in capsys.readouterr().out


# Runs the command as if matplotlib were not installed and nothing of the package imported.
WITHOUT_MATPLOTLIB = """
import runpy, sys
from diffusers.utils import import_utils

for name in [name for name in sys.modules if name.split(".")[0] in ("matplotlib", "diffusers_gas")]:
    del sys.modules[name]
sys.modules["matplotlib"] = None
import_utils._matplotlib_available = False  # what Diffusers has found out when it was imported
runpy.run_module("diffusers_gas", run_name="__main__")
"""


def test_without_matplotlib_there_are_tables(folder, tmp_path):
    (tmp_path / "script.py").write_text(WITHOUT_MATPLOTLIB)
    result = run_script(tmp_path / "script.py", "inspect", folder, "--output", folder / "solver.png")
    assert "10 steps: 129 learned numbers" in result.stdout
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("diffusers-gas inspect: No picture without matplotlib")
    assert "pip install 'diffusers-gas[train]'" in result.stderr and not (folder / "solver.png").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no/such/folder"], "no/such/folder is neither a folder nor a Hub repository"),
        (["no/repository"], "no/repository"),
        (["{folder}/.."], "scheduler_config.json"),
        (["{folder}", "--num_inference_steps", "4", "5"], r"No solver for 5 steps: .*\[4, 10\]"),
        (["{folder}", "--output", "{folder}/picture.xyz"], "xyz"),
        ([f"{TEACHER}"], "DDPMScheduler"),
    ],
)
def test_what_cannot_be_shown(arguments, message, folder):
    with pytest.raises((ValueError, OSError), match=message):
        main([argument.format(folder=folder) for argument in arguments])


def test_errors_come_without_a_traceback(folder):
    (folder / "4_steps.solver").write_bytes(b"damaged")
    result = inspect(folder)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("diffusers-gas inspect: ") and "4_steps.solver" in line
