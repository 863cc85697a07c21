"""The notebook runs from top to bottom in a copy of the checkout's examples, and is committed without its outputs."""

import ast
import re
import shutil
from importlib.metadata import metadata

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient


pytestmark = pytest.mark.slow

NAME = "diffusers_gas.ipynb"
EXAMPLES = ROOT / "examples"
# Seconds after which it is taken to hang.
LIMIT = 600


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(EXAMPLES / NAME, as_version=4)


def test_it_runs(notebook, tmp_path):
    shutil.copyfile(EXAMPLES / "scheduling_solver_table.py", tmp_path / "scheduling_solver_table.py")
    for folder in ("teachers", "solvers"):
        shutil.copytree(EXAMPLES / folder / "text-to-emoji", tmp_path / folder / "text-to-emoji")
    NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert sum("image/png" in data for data in outputs) == 4
    tables = [data["text/markdown"] for data in outputs if "text/markdown" in data]
    rows = [
        dict(zip(*(row.strip("| ").split(" | ") for row in (lines[0], line))))
        for lines in map(str.splitlines, tables)
        for line in lines
    ]
    relative = {row["scheduler"]: row["relative to best"] for row in rows}
    assert float(relative["GS"]) < 0.5 and float(relative["my own"]) < 0.7
    assert (tmp_path / "example_output" / "my-solver" / "3_steps.solver").is_file()
    assert (tmp_path / "example_output" / "my-solver.json").is_file()


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert all(cell.outputs == [] and cell.execution_count is None and cell.metadata == {} for cell in code)


def test_it_finds_the_project(notebook):
    project = metadata("diffusers-gas")["Home-page"]
    repository = project.removeprefix("https://github.com/")
    assert (
        f"(https://colab.research.google.com/github/{repository}/blob/main/examples/{NAME})"
        in notebook.cells[0].source
    )
    install = notebook.cells[1].source
    assert f"git clone --depth 1 {project}\n" in install
    # Nothing is installed where the package is there.
    (condition,) = (
        node for node in ast.parse(re.sub(r"(?m)^( +)[!%].*", r"\1pass", install)).body if isinstance(node, ast.If)
    )
    assert "find_spec" in ast.unparse(condition.test) and len(condition.body) == 3
