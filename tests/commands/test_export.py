"""`diffusers-gas export`."""

import json

from conftest import ROOT
from scripts import run_script

from diffusers_gas import GASScheduler
from diffusers_gas.commands.export import main
from diffusers_gas.schedulers.exporting import exported


FLOW_DIGITS = ROOT / "examples" / "solvers" / "flow-digits" / "gs"
TEXT_TO_DIGITS = ROOT / "examples" / "solvers" / "text-to-digits" / "gs"


def test_the_file(tmp_path):
    path = tmp_path / "solver.json"
    result = run_script("diffusers_gas", "export", TEXT_TO_DIGITS, "--num_inference_steps", 4, 6, "--output", path)
    assert result.returncode == 0, result.stderr
    scheduler = GASScheduler.from_pretrained(TEXT_TO_DIGITS)
    assert json.loads(path.read_text()) == exported(scheduler, [4, 6])


def test_shifts_are_tables(tmp_path):
    path = tmp_path / "a.json"
    main([str(FLOW_DIGITS), "--shifts", "3", "5", "--num_inference_steps", "4", "--output", str(path)])
    tables = json.loads(path.read_text())["tables"]
    assert [(table["num_inference_steps"], table["shift"]) for table in tables] == [(4, 3), (4, 5)]


def test_errors_are_one_line(tmp_path):
    for words in (["--num_inference_steps", 5], ["--mu", 1.0]):
        result = run_script("diffusers_gas", "export", FLOW_DIGITS, *words, "--output", tmp_path / "solver.json")
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].startswith("diffusers-gas export: ")
