"""The command `diffusers-gas`: its commands, their settings, and how they end."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import pytest
import torch
from conftest import ROOT, TEACHER
from diffusers.utils import dynamic_modules_utils
from scripts import run_script

from diffusers_gas.commands import main
from diffusers_gas.commands.arguments import AtLeast0, AtLeast1, PipelineSettings, TeacherSettings, help_texts, parse
from diffusers_gas.commands.calibrate import CalibrationSettings
from diffusers_gas.commands.evaluate import EvaluationSettings
from diffusers_gas.commands.train import TrainSettings


def test_help_lists_the_commands():
    result = run_script("diffusers_gas", "--help")
    assert result.returncode == 0
    for name, (_, description) in main.COMMANDS.items():
        assert f"  {name} " in result.stdout and description in result.stdout


@pytest.mark.parametrize("name", ["train", "calibrate", "evaluate", "inspect", "export", "list"])
def test_commands_have_help_and_scripts_are_commands(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["anything", name, "--help"])
    with pytest.raises(SystemExit) as exit_:
        main.main()
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: diffusers-gas {name} [-h]")
    scripts = {"train": "train_gas.py", "calibrate": "calibrate_sdm.py", "evaluate": "evaluate.py"}
    if name in scripts:
        result = run_script(ROOT / "training" / scripts[name], "--help")
        assert result.returncode == 0 and result.stdout.startswith(f"usage: {scripts[name]} [-h]")


@pytest.mark.parametrize("words", [[], ["distill"]])
def test_unknown_commands(words):
    result = run_script("diffusers_gas", *words)
    assert result.returncode == 2 and "usage: diffusers-gas [-h] COMMAND" in result.stderr


@pytest.mark.parametrize("name", ["train", "calibrate", "evaluate"])
def test_errors_are_one_line(tmp_path, name):
    words = ["--pretrained_model_name_or_path", tmp_path, "--output_dir", tmp_path / "out"]
    result = run_script("diffusers_gas", name, *words)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"diffusers-gas {name}: ")


def test_the_model_must_be_named():
    with pytest.raises(ValueError, match="Pass `--pretrained_model_name_or_path`"):
        PipelineSettings()
    assert PipelineSettings("some/model").pretrained_model_name_or_path == "some/model"


def test_code_of_a_model_runs_for_those_who_trust_it(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    shutil.copytree(TEACHER, folder)
    (folder / "drawing.py").write_text(
        "from diffusers import DDPMPipeline\n\nclass Drawing(DDPMPipeline):\n    pass\n"
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["drawing", "Drawing"]}))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        PipelineSettings(str(folder)).load_pipeline(torch.device("cpu"))
    pipe = PipelineSettings(str(folder), trust_remote_code=True).load_pipeline(torch.device("cpu"))
    assert type(pipe).__name__ == "Drawing"


def test_scripts_may_have_a_model(tmp_path):
    """It is used if none is named. What is given wins over its settings."""
    model = {"pretrained_model_name_or_path": "models/a", "teacher_num_inference_steps": 7}
    assert parse(TeacherSettingsAndPipeline, None, [], model) == model
    words = ["--teacher_num_inference_steps", "9"]
    assert parse(TeacherSettingsAndPipeline, None, words, model) == {**model, "teacher_num_inference_steps": 9}
    named = {"pretrained_model_name_or_path": "mine"}
    words = ["--pretrained_model_name_or_path", "mine"]
    assert parse(TeacherSettingsAndPipeline, None, words, model) == named
    config = tmp_path / "config.yaml"
    config.write_text("pretrained_model_name_or_path: mine")
    assert parse(TeacherSettingsAndPipeline, None, ["--config", str(config)], model) == named
    assert parse(TeacherSettingsAndPipeline, None, []) == {}


@dataclass
class TeacherSettingsAndPipeline(TeacherSettings, PipelineSettings):
    """A model and its teacher."""


@dataclass
class Base:
    """A group."""

    count: int = 3
    offset: int = 0


@dataclass
class Settings(Base):
    """Another group.

    Args:
        kind, rate: Of 100 % of
            what there is.
        fast: Whether: it is.
    """

    count: int = 5
    rate: float = 0.1
    kind: Literal["a", "b"] | None = None
    fast: bool = False
    name: str | None = None
    names: Sequence[str] = ("x",)
    size: AtLeast1 | None = None
    sizes: Sequence[AtLeast0] | None = None


def test_fields_are_arguments(tmp_path):
    assert parse(Settings, None, []) == {} and Settings().count == 5
    words = ["--count", "2", "--offset", "-1", "--rate", "1e-3", "--kind", "b", "--fast", "--names", "y", "z"]
    given = {"count": 2, "offset": -1, "rate": 1e-3, "kind": "b", "fast": True, "names": ["y", "z"]}
    assert parse(Settings, None, words) == given
    assert parse(Settings, None, ["--size", "1", "--sizes", "0", "2"]) == {"size": 1, "sizes": [0, 2]}
    config = tmp_path / "config.yaml"
    config.write_text("count: 7\nrate: 0.5\nfast: true\nnames: [u, v]\n")
    given = {"count": 7, "rate": 2.0, "fast": False, "names": ["u", "v"]}
    assert parse(Settings, None, ["--config", str(config), "--rate", "2", "--no-fast"]) == given


def test_docstrings_are_the_help(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, "A program.", ["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "A program.",
        "A group:",
        "Another group:",
        "--kind {a,b} Of 100 % of what there is.",
        "--fast, --no-fast Whether: it is. (default: False)",
        "--count COUNT (default: 5)",
        "--offset OFFSET (default: 0)",
        "--names NAMES [NAMES ...] (default: x)",
        "--name NAME --",
    ):
        assert text in printed


@pytest.mark.parametrize("settings_class", [TrainSettings, EvaluationSettings, CalibrationSettings])
def test_every_setting_is_explained(settings_class, capsys):
    with pytest.raises(SystemExit):
        parse(settings_class, None, ["--help"])
    printed = capsys.readouterr().out
    for setting in fields(settings_class):
        assert any(setting.name in help_texts(base) for base in settings_class.__mro__), setting.name
        assert f"--{setting.name}" in printed


@pytest.mark.parametrize(
    "text, expected",
    [
        ("name: no", {"name": "no"}),
        ("name: 0123", {"name": "0123"}),
        ("name: '-5 degrees'", {"name": "-5 degrees"}),
        ("name: 1.0", {"name": "1.0"}),
        ("name: null\nkind: ~\ncount:", {}),
        ("count: 0123", {"count": 123}),
        ("rate: 1e-3", {"rate": 1e-3}),
        ("fast: no", {"fast": False}),
        ("fast: null", {}),
        ("fast: Yes", {"fast": True}),
        ("names: [no, null, 0123]", {"names": ["no", "null", "0123"]}),
        ("""name: '{"a": null}'""", {"name": '{"a": null}'}),
        ("\ufeffname: caf\u00e9", {"name": "caf\u00e9"}),
        ("", {}),
    ],
)
def test_values_of_a_yaml_file_have_the_types_of_the_arguments(tmp_path, text, expected):
    config = tmp_path / "config.yaml"
    config.write_text(text, encoding="utf-8")
    assert parse(Settings, None, ["--config", str(config)]) == expected


@pytest.mark.parametrize(
    "content, message",
    [
        (b"fast: maybe", "`fast` must be true or false, got 'maybe'"),
        (b"fast: [true]", "`fast` must be true or false, got 'true'"),
        (b"name: {a: 1}", "`name` must be text, a number or a list of them. Put JSON in quotes"),
        (b"- 1", "must hold arguments and their values"),
        (b"a: [", "is not a YAML file"),
        ("name: é".encode("utf-16"), r"config\.yaml is not UTF-8 text"),
    ],
)
def test_bad_yaml_files(tmp_path, content, message):
    config = tmp_path / "config.yaml"
    config.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        parse(Settings, None, ["--config", str(config)])


@pytest.mark.parametrize(
    "words",
    [["--count", "0"], ["--count", "1.5"], ["--kind", "c"], ["--speed", "1"], ["--size", "0"], ["--sizes", "-1"]],
)
def test_bad_arguments(words):
    with pytest.raises(SystemExit):
        parse(Settings, None, words)
