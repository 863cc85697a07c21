"""The demo page: what it computes, what it refuses, the Space that it writes, and the page itself in a browser."""

import copy
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DiffusionPipeline
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from PIL import Image
from scripts import TIMEOUT
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from diffusers_gas import GASScheduler, SampleInputs
from diffusers_gas.comparison import errors_to_teacher
from diffusers_gas.guided_solver import GuidedSolver
from diffusers_gas.pipelines.sampling import sample_images
from diffusers_gas.pipelines.teacher import TeacherCache, default_teacher


EXAMPLES = ROOT / "examples"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Seconds to wait for something on the page.
PATIENCE = 120
PROMPT, SEED, GUIDANCE = "the blue digit seven", 123_456, 4.0
# Most tests are on a quicker model than the default.
DIGITS = "text-to-digits"
DIGIT_PROMPTS = ["a handwritten red 3", "the blue digit seven", "a drawing of the green four", "eight"]

# On which Diffusers' schedulers are compared, and how many of them the page compares.
NUM_COMPARED, NUM_RIVALS = 4, 2

# Runs the script that is its first argument, the demo or one that imports it, with fewer compared samples and schedulers, and writes
# every address outside this machine that the process asks for.
GUARD = """\
import itertools, os, runpy, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[1][0] if event == "socket.connect" else arguments[0]
        if isinstance(arguments[1], tuple | int | str | None) and str(host) not in ("127.0.0.1", "localhost", "None", "/"):
            os.write(2, f"OUTSIDE: {event} {arguments}\\n".encode())

sys.addaudithook(watch)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import demo
demo.NUM_COMPARED = int(os.environ["NUM_COMPARED"])
schedulers, number = demo.training_free_schedulers, int(os.environ["NUM_RIVALS"])
demo.training_free_schedulers = lambda config: dict(itertools.islice(schedulers(config).items(), number))
demo.main() if os.path.basename(sys.argv[0]) == "demo.py" else runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    module.NUM_COMPARED = NUM_COMPARED
    return module


def comparison_of(demo: ModuleType, model: str, *methods: str) -> Any:
    path = str(EXAMPLES / "teachers" / model)
    solvers = demo.load_solvers(path, [str(EXAMPLES / "solvers" / model / method) for method in methods])
    return demo.Comparison(DiffusionPipeline.from_pretrained(path), solvers, DIGIT_PROMPTS)


@pytest.fixture(scope="module")
def text_to_digits(demo) -> Any:
    return comparison_of(demo, DIGITS, "gs", "gas")


def distance(pipe: DiffusionPipeline, scheduler: Any, n: int, inputs: SampleInputs, folder: Path) -> float:
    teacher = default_teacher(pipe)
    reference = TeacherCache(folder, DIGITS, teacher, 50).collect(pipe, inputs, 1, "Teacher")
    return errors_to_teacher(pipe, scheduler, n, reference, batch_size=1)[0]


def test_samples_and_their_distances(text_to_digits, tmp_path):
    inputs, n, guidance = text_to_digits.request(f" {PROMPT}\n", f" {SEED} ", "4", GUIDANCE)
    teacher, best, gs, gas = text_to_digits.samples(inputs, n, guidance)
    assert [sample.evaluations for sample in (teacher, best, gs, gas)] == [50, 4, 4, 4]
    rows = text_to_digits.compared(n, guidance)
    assert len(rows) > 20 and best.scheduler == min(rows, key=lambda row: row.distance).scheduler
    pipe, expected = text_to_digits.pipe, SampleInputs.create(SEED, 1, prompt=PROMPT, guidance_scale=GUIDANCE)
    schedulers = [text_to_digits.rivals[best.scheduler], *text_to_digits.solvers.values()]
    for sample, scheduler in zip((best, gs, gas), schedulers):
        assert sample.distance == pytest.approx(distance(pipe, scheduler, n, expected, tmp_path), rel=1e-4)
        assert f"**{sample.distance:.2g}**" in sample.caption() and "4 evaluations" in sample.caption()
        (image,) = sample_images(pipe, scheduler, n, expected)
        assert_magnified(sample.picture, image)
    shown = dict(zip(("Teacher", "Best of Diffusers", "GS", "GAS"), (teacher, best, gs, gas)))
    text = text_to_digits.verdict(shown, n, guidance)
    ratios = [sample.distance / best.distance for sample in (gs, gas)]
    assert f"**{ratios[0]:.2g} for GS and {ratios[1]:.2g} for GAS**" in text and best.scheduler in text


def assert_magnified(picture: Image.Image, image: np.ndarray) -> None:
    times = picture.height // image.shape[0]
    pixels = np.repeat(np.repeat(image.squeeze(), times, 0), times, 1)
    assert times > 1 and np.abs(np.asarray(picture) / 255 - pixels).max() < 1e-3


def test_a_solver_without_the_number_of_evaluations(text_to_digits, monkeypatch):
    monkeypatch.setattr(text_to_digits, "rivals", dict([*text_to_digits.rivals.items()][:NUM_RIVALS]))
    inputs, n, guidance = text_to_digits.request(PROMPT, "1", "6", GUIDANCE)
    *others, gas = text_to_digits.samples(inputs, n, guidance)
    assert gas == "Distilled for 4 evaluations only." and not any(isinstance(sample, str) for sample in others)
    names = ("Teacher", "Best of Diffusers", "GS", "GAS")
    assert "for GAS" not in text_to_digits.verdict(dict(zip(names, (*others, gas))), n, guidance)


def test_the_page_begins_with_a_number_of_evaluations_that_all_solvers_have(demo, text_to_digits):
    gs = text_to_digits.solvers["GS"]

    def first(*step_counts: int) -> int:
        other = GASScheduler.from_config(gs.config)
        for n in step_counts:
            other.add_solver(gs.solvers[n])
        return demo.Comparison(text_to_digits.pipe, {"GS": gs, "GAS": other}, DIGIT_PROMPTS).first_step_count

    assert sorted(gs.solvers)[0] == 4 and first(8, 6) == 6 and first(10) == 10
    fewer = GASScheduler.from_config(gs.config)
    for n in (3, 4):
        fewer.add_solver(fewer.theory_solver(n))
    assert demo.Comparison(text_to_digits.pipe, {"GS": fewer}, DIGIT_PROMPTS).first_step_count == 4


def test_a_solver_of_a_range_follows_the_guidance_scale(demo, text_to_digits, monkeypatch):
    scheduler = GASScheduler.from_config(text_to_digits.solvers["GS"].config)
    knots = [copy.deepcopy(text_to_digits.solvers["GS"].solvers[4].at()) for _ in range(2)]
    with torch.no_grad():
        knots[1].data_coefficients += 0.05
    scheduler.add_solver(GuidedSolver(knots, (2.0, 8.0), "guidance_scale", 4.0))
    scheduler.solvers[4].provenance = {"pipeline_arguments": {"guidance_scale": [2.0, 8.0]}}
    comparison = demo.Comparison(text_to_digits.pipe, {"GS": scheduler}, DIGIT_PROMPTS)
    assert comparison.guidance == 4.0
    monkeypatch.setattr(comparison, "compared", lambda n, guidance: [])  # of Diffusers' schedulers nothing is shown
    monkeypatch.setattr(demo, "TEACHER_STEPS", 2)  # nor of the teacher
    for guidance, nearest in ((2.0, 2.0), (5.5, 5.5), (9.5, 8.0), (9.5, 8.0)):
        inputs, n, _ = comparison.request(PROMPT, "3", "4", guidance)
        with demo.warnings_of_the_package() as warnings:
            *_, found = comparison.samples(inputs, n, guidance)
        assert any("from 2 to 8 and is used with 9.5" in text for text in warnings) == (guidance > 8)
        plain = GASScheduler.from_config(scheduler.config)
        plain.add_solver(scheduler.solvers[4].at(nearest))
        plain.solvers[4].provenance = {}
        assert_magnified(found.picture, sample_images(comparison.pipe, plain, 4, inputs)[0])


def test_schedulers_are_compared_once(text_to_digits, demo, monkeypatch):
    rows = text_to_digits.compared(4, GUIDANCE)
    monkeypatch.setattr(demo, "compare", None)
    assert text_to_digits.compared(4, GUIDANCE) is rows


@pytest.mark.parametrize("model, methods", [("digits", ("gs", "gas")), ("moving-digits", ("gs",))])
def test_models_without_prompts_and_of_videos(demo, model, methods, monkeypatch):
    comparison = comparison_of(demo, model, *methods)
    assert (comparison.takes_prompt, comparison.guidance) == ((False, None) if model == "digits" else (True, 4.0))
    prompt = "" if model == "digits" else "a red three moves up"
    inputs, n, guidance = comparison.request(prompt, "5", "4", None if model == "digits" else 4.0)
    teacher, best, *ours = comparison.samples(inputs, n, guidance)
    assert len(ours) == len(methods) and all(sample.distance < best.distance for sample in ours)
    assert teacher.picture.size == (512, 512)
    # Its progress display would change tqdm for all tests of this process.
    monkeypatch.setattr("gradio.helpers.patch_tqdm", lambda: None)
    demo.make_page(comparison, model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": " \n"}, "prompt is empty.*a handwritten red 3"),
        ({"seed": "abc"}, "seed must be a whole number, got “abc”"),
        ({"seed": "1.5"}, "seed must be a whole number"),
        ({"seed": ""}, "seed must be a whole number"),
        ({"seed": "-1"}, "from 0 to"),
        ({"seed": str(2**63)}, "from 0 to"),
        ({"evaluations": "5"}, "no solver for 5 network evaluations.*GS: 4, 6, 8, 10; GAS: 4"),
        ({"evaluations": None}, "evaluations must be a whole number"),
        ({"evaluations": "four"}, "evaluations must be a whole number, got “four”"),
        ({"guidance": -1.0}, "from 0 to 30, got -1.0"),
        ({"guidance": 31.0}, "from 0 to 30, got 31.0"),
        ({"guidance": float("nan")}, "from 0 to 30, got nan"),
        ({"guidance": None}, "from 0 to 30, got None"),
    ],
)
def test_bad_input(text_to_digits, change, message):
    with pytest.raises(ValueError, match=message):
        text_to_digits.request(**{"prompt": "eight", "seed": "1", "evaluations": "4", "guidance": 4.0} | change)


def test_a_model_that_fails(demo, text_to_digits, monkeypatch, capsys):
    def fails(*_: Any) -> Iterator[str]:
        yield "the teacher"
        raise RuntimeError("out of memory")

    monkeypatch.setattr("gradio.helpers.patch_tqdm", lambda: None)
    monkeypatch.setattr(text_to_digits, "samples", fails)
    page = demo.make_page(text_to_digits, DIGITS)
    (sample,) = (event.fn for event in page.fns.values() if event.fn and event.fn.__name__ == "sample")
    *_, (shown,) = (update.values() for update in sample(PROMPT, "1", "4", 4.0))
    assert shown.value == "**Sampling failed.** RuntimeError: out of memory" and shown.visible
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--solvers", "{examples}/solvers/digits/gs"], "do not fit"),
        (["--solvers", "{examples}/solvers/text-to-emoji/sdm"], "solver"),
        (["--write_space", "{folder}"], "must be a new or empty folder"),
        (["--write_space", "{folder}/new", "--solvers", "not a folder"], "not a folder"),
    ],
)
def test_what_cannot_be_shown(demo, arguments, message, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises((ValueError, OSError), match=message):
        demo.main([argument.format(examples=EXAMPLES, folder=tmp_path) for argument in arguments])
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_space_of_repositories_on_the_hub(demo, tmp_path):
    arguments = [
        "--pretrained_model_name_or_path",
        "some/model",
        "--solvers",
        "you/some-model-gas",
        "--prompts",
        "a fox's den",
    ]
    demo.main([*arguments, "--write_space", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "app.py", "demo.py", "requirements.txt"}
    assert SpaceCard.load(tmp_path / "README.md").data.models == ["some/model", "you/some-model-gas"]
    assert started_with(tmp_path / "app.py") == arguments


@pytest.fixture(scope="module")
def space(demo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("space")
    model, solvers = EXAMPLES / "teachers" / DIGITS, EXAMPLES / "solvers" / DIGITS
    arguments = ["--pretrained_model_name_or_path", model, "--solvers", solvers / "gs", solvers / "gas"]
    demo.main([*map(str, arguments), "--prompts", *DIGIT_PROMPTS, "--write_space", str(folder)])
    return folder


def started_with(app: Path) -> list[str]:
    """The arguments that the `app.py` of a Space starts the demo with."""
    called: list[list[str]] = []
    source = app.read_text(encoding="utf-8").replace("from demo import main", "")
    exec(compile(source, "app.py", "exec"), {"main": called.append, "__file__": str(app)})
    return called[0]


def test_the_default_space_has_its_model_and_solvers(demo, tmp_path):
    demo.main(["--write_space", str(tmp_path)])
    _, model, _, *others = started_with(tmp_path / "app.py")
    solvers, prompts = others[: len(demo.SOLVERS)], others[len(demo.SOLVERS) :]
    assert prompts == ["--prompts", *demo.PROMPTS] and "gs" in [path.name for path in demo.SOLVERS]
    assert all(tmp_path in Path(path).parents for path in (model, *solvers))
    comparison = demo.Comparison(
        DiffusionPipeline.from_pretrained(model), demo.load_solvers(model, solvers), demo.PROMPTS
    )
    assert comparison.guidance == 7.5 and comparison.step_counts
    assert "Noto Emoji" in (Path(model) / "README.md").read_text(encoding="utf-8")


def test_the_header_of_a_space(space):
    """The rules of https://huggingface.co/docs/hub/spaces-config-reference, as far as they concern these settings."""
    data = SpaceCard.load(space / "README.md").data
    assert (data.sdk, data.sdk_version) == ("gradio", version("gradio"))
    assert (space / data.app_file).is_file()
    assert re.fullmatch(r"3\.\d+", data.python_version) and data.license == "apache-2.0"
    assert data.title and len(data["short_description"]) <= 60
    known = {
        "title",
        "sdk",
        "sdk_version",
        "python_version",
        "app_file",
        "license",
        "models",
        "tags",
        "short_description",
    }
    assert data.to_dict().keys() <= known
    (requirement,) = map(Requirement, (space / "requirements.txt").read_text().splitlines())
    assert requirement.name == "diffusers-gas" and requirement.extras == {"demo"}


@contextmanager
def served(script: Path, folder: Path, num_rivals: int = NUM_RIVALS) -> Iterator[tuple[str, Path]]:
    """The address of the page of a script that runs in a folder, and the file with its errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "guard.py").write_text(GUARD)
    errors = folder / "stderr"
    hidden = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_ANALYTICS_ENABLED")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"GRADIO_SERVER_PORT": str(port), "NO_PROXY": "127.0.0.1,localhost", "TMPDIR": str(folder)}
    environment |= {"NUM_COMPARED": str(NUM_COMPARED), "NUM_RIVALS": str(num_rivals)}
    environment["PYTHONPATH"] = os.pathsep.join([environment.get("PYTHONPATH", ""), str(ROOT)])
    with errors.open("w") as stderr:
        command = [sys.executable, str(folder / "guard.py"), str(script)]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stderr, stderr=stderr)
    try:
        deadline = time.monotonic() + TIMEOUT
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert process.poll() is None and time.monotonic() < deadline, errors.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", errors
    finally:
        process.kill()
        process.wait()


@contextmanager
def browser() -> Iterator[Chrome]:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        reason = f"The page needs a browser: one of {', '.join(BROWSERS)}, and chromedriver (apt-get install chromium-driver)."
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    options = ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1500"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    chrome = Chrome(options, ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


class Page:
    """The page in a browser."""

    def __init__(self, chrome: Chrome, address: str):
        self.chrome = chrome
        chrome.get(address)
        self.wait(lambda: self.find("#sample"))

    def wait(self, ready: Callable[[], Any]) -> Any:
        try:
            # The page replaces its parts while they are looked at.
            stale = [StaleElementReferenceException]
            return WebDriverWait(self.chrome, PATIENCE, 0.1, stale).until(lambda _: ready())
        except TimeoutException:
            raise AssertionError(f"not so after {PATIENCE} s:\n{self.find('body')[0].text}") from None

    def find(self, selector: str) -> list[Any]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def text(self, name: str) -> str:
        return "".join(element.text for element in self.find(f"#{name}"))

    def enter(self, name: str, text: str) -> None:
        (field,) = self.find(f"#{name} input:not([type=range]), #{name} textarea")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.BACKSPACE, text, Keys.TAB)

    def sample(self) -> None:
        self.find("#sample")[0].click()

    def pictures(self, prefix: str = "picture-") -> list[str]:
        """The addresses of the pictures that the browser has loaded and shows."""
        images = f"[...document.querySelectorAll('[id^={prefix}] img')]"
        return self.chrome.execute_script(
            f"return {images}.filter(i => i.complete && i.naturalWidth > 99).map(i => i.src)"
        )

    def hosts(self) -> set[str | None]:
        """The hosts that the page has asked for something."""
        messages = (json.loads(entry["message"])["message"] for entry in self.chrome.get_log("performance"))
        urls = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        return {urlsplit(url).hostname for url in urls if not url.startswith(("data:", "blob:", "chrome"))}


def test_the_page(space, text_to_digits, tmp_path):
    """On the written Space, whose folder is all that it needs beside the package."""
    with browser() as chrome, served(space / "app.py", tmp_path) as (address, errors):
        page = Page(chrome, address)

        def whole() -> list[str]:
            """The addresses of the pictures, if all is drawn."""
            pictures = page.pictures()
            drawn = len(pictures) == 4 and len(page.pictures("table-")) == 2 and page.text("verdict")
            return pictures if drawn else []

        first = page.wait(whole)  # it draws by itself at first
        page.enter("prompt", PROMPT)
        page.enter("seed", str(SEED))
        page.enter("guidance", str(GUIDANCE))
        page.sample()
        pictures = page.wait(lambda: [] if set(first) & set(found := whole()) else found)
        expected = SampleInputs.create(SEED, 1, prompt=PROMPT, guidance_scale=GUIDANCE)
        pipe, solver = text_to_digits.pipe, text_to_digits.solvers["GS"]
        with urlopen(pictures[2]) as response:
            assert_magnified(Image.open(BytesIO(response.read())), sample_images(pipe, solver, 4, expected)[0])
        captions = [page.text(f"caption-{i}") for i in range(4)]
        evaluations = [re.search(r"(\d+) evaluations, \d+\.\d\d s", caption)[1] for caption in captions]
        assert evaluations == ["50", "4", "4", "4"] and "distance" not in captions[0]
        distances = [float(re.search(r"distance to the teacher ([\d.e-]+)", caption)[1]) for caption in captions[1:]]
        assert distances[1] == pytest.approx(distance(pipe, solver, 4, expected, tmp_path / "teacher"), rel=0.05)
        ratio = float(re.search(r"([\d.]+) for GS", page.text("verdict"))[1])
        assert ratio == pytest.approx(distances[1] / distances[0], rel=0.15) and "for GAS" in page.text("verdict")
        assert not page.text("message")

        right = {"prompt": "eight", "seed": "7", "evaluations": "6"}
        wrong = {
            "prompt": ("", "The prompt is empty"),
            "seed": ("abc", "got “abc”"),
            "evaluations": ("5", "no solver for 5 network evaluations"),
        }
        for name, (text, message) in wrong.items():
            page.enter(name, text)
            page.sample()
            page.wait(lambda message=message: message in page.text("message"))
            page.wait(lambda: not page.pictures() and not page.text("verdict"))
            page.enter(name, right[name])
        page.enter("guidance", "9")
        page.sample()
        page.wait(lambda: len(page.pictures()) == 3 and len(page.pictures("table-")) == 1 and page.text("verdict"))
        assert page.text("caption-3") == "Distilled for 4 evaluations only."
        said = page.text("message")
        assert (
            "from 1.5 to 8" in said and "used with 9" in said and not any(text in said for _, text in wrong.values())
        )
        assert page.hosts() == {"127.0.0.1"}
        assert "OUTSIDE" not in errors.read_text() and "Traceback" not in errors.read_text()


@pytest.mark.slow
def test_the_page_of_the_checkout(demo, tmp_path):
    """With the default model, its first prompt and seed, and all rivals."""
    with browser() as chrome, served(EXAMPLES / "demo.py", tmp_path, num_rivals=100) as (address, errors):
        page = Page(chrome, address)
        page.wait(lambda: len(page.pictures()) == 2 + len(demo.SOLVERS) and page.text("verdict"))
        assert float(re.search(r"([\d.]+) for GS", page.text("verdict"))[1]) < 0.5 and not page.text("message")
        assert "OUTSIDE" not in errors.read_text() and "Traceback" not in errors.read_text()
