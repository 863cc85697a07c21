"""The model card of a scheduler: its content, the treatment of an earlier card, and the upload to the Hub."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import ROOT, TOKEN, client_environment, run_code, running_hub
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from saved_schedulers import planned_scheduler, save_pipeline, trained_scheduler

from diffusers_gas import GASScheduler
from diffusers_gas.presentation import model_card as hub
from diffusers_gas.presentation.model_card import write_model_card


PROVENANCE = {
    "teacher": "user/teacher",
    "prompts_file": "prompts.txt",
    "teacher_num_inference_steps": 50,
    "pipeline_arguments": {"guidance_scale": 7.5, "height": 512},
    "loss": "l2",
    "a|b": None,
    "scales": [0.1] * 100,
}


@pytest.fixture
def scheduler() -> GASScheduler:
    scheduler = trained_scheduler(4, 12)
    for solver in scheduler.solvers.values():
        solver.provenance = dict(PROVENANCE)
    return scheduler


@pytest.fixture
def folder(scheduler, tmp_path) -> Path:
    scheduler.save_pretrained(tmp_path / "scheduler")
    return tmp_path / "scheduler"


def python_blocks(card: ModelCard) -> list[str]:
    return [block.split("```")[0] for block in card.text.split("```python\n")[1:]]


def test_card_has_what_makes_a_solver_findable_and_usable(scheduler, folder, tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / "picture.png")
    path = write_model_card(scheduler, folder, "me/solver", results="| a table |", samples=tmp_path / "picture.png")
    assert path == folder / "README.md"
    card = ModelCard.load(path)
    assert {"diffusers-gas", "GASScheduler", "4-steps", "12-steps"} == set(card.data.tags)
    assert card.data.base_model == "user/teacher" and card.data.get("base_model_relation") == "adapter"
    assert card.data.library_name == "diffusers" and card.data.license == "apache-2.0"

    (usage,) = python_blocks(card)
    assert len([line for line in usage.splitlines() if line and "import" not in line]) <= 4
    calls = [node for node in ast.walk(ast.parse(usage)) if isinstance(node, ast.Call)]
    constants = {ast.literal_eval(value) for call in calls for value in call.args}
    assert constants == {"user/teacher", "me/solver", "a fox"}
    keywords = {word.arg: ast.literal_eval(word.value) for call in calls for word in call.keywords}
    assert keywords == {"num_inference_steps": 4, "guidance_scale": 7.5}

    rows = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    assert ["4 steps", "12 steps"] in rows
    assert ["teacher num inference steps", "50", "50"] in rows and ["scales", "100 values", "100 values"] in rows
    assert not any("None" in cell for row in rows for cell in row)
    for expected in ("| a table |", "(card/samples.png)", "2510.17699", "@misc"):
        assert expected in card.text
    Image.open(folder / "card" / "samples.png").verify()
    assert not list(folder.rglob("*partial*"))
    assert GASScheduler.from_pretrained(folder).solvers.keys() == {4, 12}


def test_card_of_sdm(tmp_path):
    scheduler = planned_scheduler(12, 8)
    scheduler.save_pretrained(tmp_path)
    card = ModelCard.load(write_model_card(scheduler, tmp_path))
    assert {"SDMScheduler", "8-steps", "12-steps"} < set(card.data.tags) and card.data.base_model is None
    assert "8 or 12 network evaluations" in card.text and "2602.12624" in card.text and "2510.17699" not in card.text
    assert "import SDMScheduler" in python_blocks(card)[0]


def test_card_of_an_untrained_scheduler_claims_nothing(tmp_path):
    scheduler = GASScheduler()
    scheduler.save_pretrained(tmp_path)
    card = ModelCard.load(write_model_card(scheduler, tmp_path))
    assert "untrained" in card.text and "refused" not in card.text
    assert not (tmp_path / "card").exists()


def test_generated_card_is_renewed_and_keeps_what_was_given(scheduler, folder):
    path = write_model_card(scheduler, folder, base_model="user/base", license="mit", results="Measured: 1")
    path.write_text(path.read_text().replace("- GASScheduler", "- GASScheduler\n- mine"))
    del scheduler.solvers[4]
    scheduler.save_pretrained(folder)
    card = ModelCard.load(write_model_card(scheduler, folder))
    assert card.data.base_model == "user/base" and card.data.license == "mit" and "Measured: 1" in card.text
    assert set(card.data.tags) == {"diffusers-gas", "GASScheduler", "mine", "12-steps"}
    assert "4 or 12" not in card.text


@pytest.mark.parametrize("kind", ["own", "generated", "placeholder"])
def test_written_card_stays(kind, scheduler, folder):
    """Also if it was a generated one that somebody has changed."""
    path, text = folder / "README.md", "My own words.\n"
    if kind == "generated":
        text += write_model_card(scheduler, folder).read_text().replace(hub.GENERATED, "")
    elif kind == "placeholder":
        card = ModelCard.from_template(ModelCardData(), model_description=hub.PLACEHOLDER)
        path.write_text(str(card))
        assert hub.PLACEHOLDER not in write_model_card(scheduler, folder).read_text()
        text = f"{card}\nMy own words.\n"
    path.write_text(text)
    assert write_model_card(scheduler, folder, results="Measured: 1").read_text() == text
    assert not (folder / hub.RESULTS).exists()


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda folder: (folder / "README.md").mkdir(), {}, r"README\.md cannot be made"),
        (lambda folder: (folder / "card").write_text(""), {"results": "Measured: 1"}, "card"),
        (lambda folder: None, {"samples": "missing.png"}, r"README\.md cannot be made .*missing\.png"),
        (lambda folder: None, {"base_model": "no/such/name"}, "no/such/name"),
        (lambda folder: (folder / "README.md").write_text(f"---\na: [\n---\n{hub.GENERATED}"), {}, "cannot be made"),
    ],
)
def test_card_that_cannot_be_written_is_named(spoil, arguments, message, scheduler, folder):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        write_model_card(scheduler, folder, **arguments)


def test_every_way_to_the_hub_brings_a_card(folder, tmp_path):
    with running_hub() as server:
        answers = run_code(
            server,
            tmp_path / "home",
            f"""
from diffusers import DDIMScheduler
from diffusers_gas import GASScheduler
from diffusers_gas.presentation.model_card import write_model_card
folder, token = {str(folder)!r}, {TOKEN!r}
scheduler = GASScheduler.from_pretrained(folder)
DDIMScheduler().push_to_hub("user/placeholder", token=token)
scheduler.push_to_hub("user/placeholder", token=token)
scheduler.push_to_hub("user/part", token=token, subfolder="scheduler")
write_model_card(scheduler, folder, results="Measured: 1")
scheduler.save_pretrained(folder, push_to_hub=True, repo_id="user/saved", token=token, private=True)
scheduler.push_to_hub("user/saved", token=token)
answers["local"] = open(folder + "/README.md").read()
""",
        )
        cards = {name: repo.files.get("README.md", b"").decode() for name, repo in server.repositories.items()}
        assert not cards["user/part"] and "scheduler/README.md" not in server.repositories["user/part"].files
        for name in ("user/placeholder", "user/saved"):
            assert ModelCard(cards[name]).data.base_model == "user/teacher"
            assert f'from_pretrained("{name}")' in cards[name] and "4 or 12 network evaluations" in cards[name]
        assert "Measured: 1" in answers["local"]
        assert server.repositories["user/saved"].private

        # A card that somebody wrote on the Hub, or changed there since, stays as it is, whatever the folder has.
        repository, path = server.repositories["user/saved"], "/user/saved/resolve/main/README.md"
        # The cache still has the generated one.
        for i, server.failing in enumerate(({path: 503}, {path: 0}, {}, {})):
            repository.commit({**repository.files, "README.md": b"Version %d" % i, "4_steps.solver": b""})
            answers = run_code(
                server,
                tmp_path / "home",
                f"""
import time
from diffusers_gas import GASScheduler
time.sleep = lambda seconds: None  # from one attempt to the next
scheduler = GASScheduler.from_pretrained({str(folder)!r})
for push in (
    lambda: scheduler.save_pretrained({str(folder)!r}, push_to_hub=True, repo_id="user/saved", token={TOKEN!r}),
    lambda: scheduler.push_to_hub("user/saved", token={TOKEN!r}),
):
    try:
        push()
    except Exception as error:
        answers[type(error).__name__] = str(error)
""",
            )
            assert b"Version %d" % i in repository.files["README.md"]
            assert len(answers) > 1 if server.failing else repository.files["4_steps.solver"], answers


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, results, picture, arguments",
    [
        (
            "train_gas.py",
            "comparison.md",
            "comparison.png",
            "--max_train_iterations 0 --teacher_num_inference_steps 5 --num_teacher_samples 4 --num_validation_samples 4",
        ),
        (
            "calibrate_sdm.py",
            None,
            "calibration.png",
            "--num_inference_steps 4 --num_samples 2 --most_evaluations 200 --solver unipc",
        ),
    ],
)
def test_training_scripts_push_their_results(tmp_path, script, results, picture, arguments):
    save_pipeline(tmp_path / "pipeline", GASScheduler())
    command = [
        sys.executable,
        str(ROOT / "training" / script),
        "--output_dir",
        "out",
        "--push_to_hub",
        *arguments.split(),
    ]
    command += ["--hub_model_id", "user/trained"]
    command += ["--pretrained_model_name_or_path", "user/teacher"]
    with running_hub() as server:
        server.add_folder("user/teacher", tmp_path / "pipeline")
        result = subprocess.run(
            command,
            env=client_environment(server.url, tmp_path / "home", HF_TOKEN=TOKEN),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        files = server.repositories["user/trained"].files
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "user/teacher" and "4-steps" in card.data.tags
    table = "| evaluations | solver |" if results is None else (tmp_path / "out" / results).read_text().strip()
    assert table in card.text and "| teacher | user/teacher |" in card.text and "| measured" not in card.text
    assert files["card/samples.png"] == (tmp_path / "out" / picture).read_bytes()
    assert TOKEN not in files["README.md"].decode()
