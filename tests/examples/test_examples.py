"""The examples run offline and write what they announce, with their defaults where these are quick."""

import ast
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageSequence
from scripts import run_script

import diffusers_gas
from diffusers_gas import GASScheduler, SDMScheduler


EXAMPLES = ROOT / "examples"
# Modules for users, beside the names of the package itself. `description` is `diffusers-gas inspect` in Python.
PUBLIC_MODULES = (
    "diffusers_gas.adaptive",
    "diffusers_gas.calibration",
    "diffusers_gas.comparison",
    "diffusers_gas.pipelines.",
    "diffusers_gas.presentation.",
)


def run(folder: Path, name: str, *arguments: object) -> str:
    """Runs an example in a folder, and returns what it prints."""
    result = run_script(EXAMPLES / f"{name}.py", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def panels(path: Path) -> np.ndarray:
    """The images of a comparison picture, of shape `(rows, columns, height, width, 3)`. They are found by their black frames."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(float)
    dark = (pixels < 128).all(axis=2)

    def inside(profile: np.ndarray, share: float) -> tuple[np.ndarray, int]:
        """Where the images between pairs of lines begin, and the size that all of them have."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], profile > share, [0]])))
        starts, ends = edges[1::4], edges[2::4]
        return starts, (ends - starts).min()

    columns, width = inside(dark.mean(axis=0), 0.5)
    rows, height = inside(dark[:, columns[0] : columns[0] + width].mean(axis=1), 0.9)
    return np.array([[pixels[y : y + height, x : x + width] for x in columns] for y in rows])


def squared_differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Means over all axes but the first."""
    return np.square(a - b).reshape(len(a), -1).mean(axis=1)


@pytest.mark.parametrize(
    "name, other", [("text_to_image", "flow-digits"), ("image_to_image", "flow-digits"), ("text_to_video", "digits")]
)
def test_a_solver_for_another_noise_schedule_is_refused(name, other, tmp_path):
    solver = EXAMPLES / "solvers" / other / "gs"
    result = run_script(EXAMPLES / f"{name}.py", "--solver", solver, cwd=tmp_path)
    assert result.returncode != 0 and f"The solvers in {solver} do not fit the scheduler of" in result.stderr


def test_text_to_image(tmp_path):
    assert run(tmp_path, "text_to_image").strip() == "Picture: example_output/text_to_image.png"
    ours, own, fine = panels(tmp_path / "example_output" / "text_to_image.png")
    assert len(ours) == 6
    assert squared_differences(ours, fine).sum() < 0.3 * squared_differences(own, fine).sum()


@pytest.mark.slow
def test_image_to_image(tmp_path):
    Image.fromarray(np.full((64, 64), 128, np.uint8)).save(tmp_path / "grey.png")
    assert run(tmp_path, "image_to_image").strip() == "Picture: example_output/image_to_image.png"
    picture = tmp_path / "example_output" / "image_to_image.png"
    sketch, ours, untrained, own, fine = panels(picture)
    for other in (untrained, own):
        assert squared_differences(ours, fine).sum() < 0.9 * squared_differences(other, fine).sum()
    # The result resembles the sketch.
    assert np.corrcoef(sketch[0].ravel(), ours[0].ravel())[0, 1] > 0.5
    run(tmp_path, "image_to_image", "--image", "grey.png", "--output", "other.png")
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "other.png")), np.asarray(Image.open(picture)))


def test_text_to_video(tmp_path):
    assert "9 frames" in run(tmp_path, "text_to_video")
    film = Image.open(tmp_path / "example_output" / "text_to_video.gif")
    frames = np.array([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]).astype(float)
    assert frames.shape == (9, 2 * 160 + 20, 3 * 160, 3)
    assert np.abs(np.diff(frames, axis=0)).mean() > 1, "something moves"
    ours, own, fine = np.split(frames[:, 20:], 3, axis=2)
    assert np.square(ours - fine).mean() < 0.5 * np.square(own - fine).mean()


@pytest.mark.slow
def test_distill_your_own(tmp_path):
    """From fewer samples and in fewer iterations than by default."""
    text = run(tmp_path, "distill_your_own", "--num_samples", 20, "--max_iterations", 2)
    before, after = map(float, re.search(r"4 steps.*: ([\d.]+) before, ([\d.]+) after", text).groups())
    assert 0 < after < 0.6 * before
    folder = tmp_path / "example_output" / "distilled"
    assert list(GASScheduler.from_pretrained(folder).solvers) == [4]
    assert Image.open(folder / "samples.png").size > (800, 100)


@pytest.mark.slow
def test_calibrate(tmp_path):
    text = run(tmp_path, "calibrate")
    plan = SDMScheduler.from_pretrained(tmp_path / "example_output" / "calibrated").plans[8]
    assert f"8 evaluations: {plan.num_steps} steps" in text
    assert panels(tmp_path / "example_output" / "calibrated" / "samples.png").shape[:2] == (1, 6)


@pytest.mark.slow
def test_sdm_methods(tmp_path):
    text = run(tmp_path, "sdm_methods")
    curvature = [[float(number) for number in row] for row in re.findall(r"^ +(\S+) +(\S+) +(\S+)$", text, re.M)[1:]]
    assert len(curvature) > 4 and all(0.05 < free / exact < 2 for _, free, exact in curvature)
    rows = {
        name.strip(): (int(n), float(d)) for name, n, d in re.findall(r"^(.+: .+?) +(\d+)  (\S+e-\d+)$", text, re.M)
    }
    assert len(rows) == 16
    (n, heun), (fewer, switch) = rows["Heun: Karras"], rows["adaptive, curvature switch: Karras"]
    assert (n, rows["UniPC: Karras"][0]) == (23, 12) and fewer < n
    assert switch < 2 * heun < rows["Euler: Karras"][1]
    assert rows["Heun: bounded error, verified search"][1] < heun
    assert Image.open(tmp_path / "example_output" / "sdm_methods.png").size > (1000, 300)


def test_compare_schedulers(tmp_path):
    text = run(tmp_path, "compare_schedulers", "--prompts", "red apple", "police car", "sunflower")
    rows = re.findall(r"(\d+) steps +([\d.]+) +(\S+)", text)
    names = ["text-to-emoji/gs", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"]
    assert [(int(n), name) for n, _, name in rows] == [(4, name) for name in names]
    distances = [float(distance) for _, distance, _ in rows]
    assert distances[0] < 0.5 * min(distances[1:])
    assert panels(tmp_path / "example_output" / "compare_schedulers.png").shape[:2] == (4, 3)


def test_what_is_wrong_is_said_before_anything_is_sampled(tmp_path):
    result = run_script(EXAMPLES / "compare_schedulers.py", "--num_inference_steps", "7", cwd=tmp_path)
    assert result.returncode != 0 and "No solver for 7 steps" in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_import_public_names_only(path):
    public = {*diffusers_gas.__all__, *(module.removeprefix("diffusers_gas.") for module in PUBLIC_MODULES)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "diffusers_gas":
            names = {alias.name for alias in node.names}
            assert not any(name.startswith("_") for name in names)
            assert node.module.startswith(PUBLIC_MODULES) or names <= public, node.module


def test_examples_have_the_same_prompts():
    """They are meant to be copied alone, so each has them. The default model must know them."""
    sources = [path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py") if path.stem != "text_to_video"]
    notebook = json.loads((EXAMPLES / "diffusers_gas.ipynb").read_text(encoding="utf-8"))
    sources.append("".join(notebook["cells"][2]["source"]))
    found = [re.search(r"^PROMPTS = (\[.*?\])$", source, re.M | re.S) for source in sources]
    first, *others = (ast.literal_eval(match[1]) for match in found if match)
    assert len(others) == 4 and all(prompts == first for prompts in others)
    known = (EXAMPLES / "teachers" / "text-to-emoji" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert set(first) < set(known)


def test_every_example_is_listed():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"examples/(\w+\.py)|\]\((\w+\.ipynb)\)", text))
    paths = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]
    assert {script or notebook for script, notebook in listed} == {path.name for path in paths}
