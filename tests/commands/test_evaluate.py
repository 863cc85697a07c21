"""The evaluation script as a user runs it: real processes, a small job on the shipped teacher."""

import json
import shutil

import numpy as np
import pytest
from conftest import ROOT, TEACHER
from PIL import Image
from scripts import TWO_PROCESSES, Script, launch, run_script
from torch import nn

from diffusers_gas.commands import evaluate
from diffusers_gas.papers.evaluation.feature_extractors import SmallClassifier


SCRIPT = ROOT / "training" / "evaluate.py"
DDIM = "DDIMScheduler:timestep_spacing=trailing,clip_sample=false"
# The script chooses these itself.
CLASSIFIER = str(TEACHER / "classifier")
MODEL = ["--pretrained_model_name_or_path", str(TEACHER), "--feature_extractor", CLASSIFIER]
SMALL = ["--num_samples", "80", "--teacher_num_inference_steps", "8", "--schedulers", DDIM]
SMALL += ["--num_inference_steps", "3", "12", "--compare_with_teacher"]


def results(folder) -> dict[tuple[str, int], dict]:
    rows = json.loads((folder / "results.json").read_text())["results"]
    return {(row["scheduler"], row["num_inference_steps"]): row for row in rows}


def times(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run with images: its folder, its output and its results."""
    folder = tmp_path_factory.mktemp("evaluation")
    result = run_script(SCRIPT, "--output_dir", str(folder), "--save_images", *SMALL)
    assert result.returncode == 0, result.stderr
    return folder, result, results(folder)


def test_run(evaluated):
    folder, result, rows = evaluated
    for expected in ("DDPMPipeline", "80, seeds 50000 to 50079", "distance to teacher", f"{DDIM}, 12 steps"):
        assert expected in result.stdout
    assert (folder / "results.md").read_text().strip() in result.stdout
    assert list(rows) == [("teacher", 8), (DDIM, 3), (DDIM, 12)]
    teacher, coarse, fine = rows.values()
    assert teacher["frechet_distance"] < 1e-6 and teacher["distance"] == 0
    for name in ("frechet_distance", "distance"):
        assert coarse[name] > 2 * fine[name] > 0
    assert all(row["num_diverged"] == 0 for row in rows.values())
    folders = sorted((folder / "images").iterdir())
    assert len(folders) == 3
    assert all(len(list(path.glob("*.png"))) == 80 for path in folders)
    assert np.asarray(Image.open(folders[0] / "050000.png")).std() > 10


def test_a_second_run_samples_only_what_is_new(evaluated):
    folder = evaluated[0]
    before = times(folder / "shards")
    assert len(before) == 6  # two of each sampler
    table = (folder / "results.md").read_text()
    evaluate.main([*MODEL, "--output_dir", str(folder), *SMALL])
    assert times(folder / "shards") == before
    assert (folder / "results.md").read_text() == table
    evaluate.main([*MODEL, "--output_dir", str(folder), *SMALL, "--num_inference_steps", "2", "3"])
    after = times(folder / "shards")
    assert len(after) == 8 and before.items() <= after.items()


def test_references(evaluated):
    """The statistics of the teacher's own samples."""
    folder, _, before = evaluated
    reference = folder / "teacher.npz"
    evaluate.main(
        [*MODEL, "--output_dir", str(folder), *SMALL, "--num_inference_steps", "3", "--reference", str(reference)]
    )
    for sampler, row in results(folder).items():
        assert row["frechet_distance"] == pytest.approx(before[sampler]["frechet_distance"], rel=1e-4, abs=1e-4)


def test_an_extractor_is_known_by_its_content(evaluated, tmp_path):
    """Wherever it lies, and whatever else has its name."""
    folder = evaluated[0]
    before, reference = times(folder / "shards"), ["--reference", str(folder / "teacher.npz")]
    same, other = (shutil.copytree(CLASSIFIER, tmp_path / name / "classifier") for name in ("same", "other"))
    arguments = [*MODEL, "--output_dir", str(folder), *SMALL, "--num_inference_steps", "3", *reference]
    evaluate.main([*arguments, "--feature_extractor", str(same)])
    assert times(folder / "shards") == before
    SmallClassifier.from_pretrained(other).apply(nn.Module.half).save_pretrained(other)
    with pytest.raises(ValueError, match="holds features of another extractor"):
        evaluate.main([*arguments, "--feature_extractor", str(other)])


def test_killed_runs_continue(tmp_path):
    shards = tmp_path / "shards"
    arguments = ["--output_dir", str(tmp_path), "--schedulers", "teacher", "--teacher_num_inference_steps", "8"]
    with Script(SCRIPT, *arguments, "--num_samples", "6400") as script:
        script.wait_for(lambda: len(times(shards)) >= 2)
    before = dict(sorted(times(shards).items(), key=lambda item: item[1])[:2])
    assert len(before) == 2
    evaluate.main([*MODEL, *arguments, "--num_samples", "128"])
    after = times(shards)
    assert before.items() <= after.items()
    assert results(tmp_path)["teacher", 8]["frechet_distance"] < 1e-6


@pytest.mark.slow
def test_two_processes_share_the_work(evaluated, tmp_path):
    result = launch(TWO_PROCESSES, SCRIPT, "--output_dir", str(tmp_path), *SMALL, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    assert len(times(tmp_path / "shards")) == 6
    assert result.stdout.count("80 samples:") == 1
    alone = evaluated[2]
    for sampler, row in results(tmp_path).items():
        for name in ("frechet_distance", "distance"):
            assert row[name] == pytest.approx(alone[sampler][name], rel=1e-2, abs=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--schedulers", "BestScheduler"], "BestScheduler is neither a scheduler class"),
        (["--schedulers", "UniPCMultistepScheduler:speed=2"], "'speed=2' is not name=value with one of the settings"),
        (["--reference", "{tmp}/nothing.npz"], r"`--reference .*nothing.npz` must be"),
        (["--reference", "{tmp}/wrong.npz"], "has statistics of 3 features, .*classifier makes 32"),
        (["--reference", "{tmp}/other.npz"], "holds features of another extractor than"),
        (["--reference", "{tmp}"], r"`--reference .*` must be a .npz file with mu and sigma"),
        (["--feature_extractor", "best"], "best is not a feature extractor"),
        (["--feature_extractor", "{tmp}/inception.pt"], "it must be 'inception' or a folder"),
        (["--num_samples", "1"], "at least 2 samples"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "other.npz", mu=np.zeros(32), sigma=np.eye(32), feature_extractor="inception")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        evaluate.main([*MODEL, "--output_dir", str(tmp_path / "out"), *SMALL[:4], *arguments])


def test_there_must_be_something_to_measure():
    with pytest.raises(ValueError, match="Nothing to measure"):
        evaluate.EvaluationSettings("some/model")
    evaluate.EvaluationSettings("some/model", compare_with_teacher=True)


def test_errors_are_one_line():
    result = run_script(
        SCRIPT, "--pretrained_model_name_or_path", str(TEACHER.parent), "--feature_extractor", "digits"
    )
    assert result.returncode != 0
    assert "evaluate.py: " in result.stderr and "Traceback" not in result.stderr
