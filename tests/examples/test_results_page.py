"""RESULTS.md and the README's numbers agree with the benchmarks' results."""

import json
import re
import sys

import pytest
from conftest import ROOT


sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
import results_page


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_pages_are_up_to_date():
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == results_page.page()
    assert results_page.readme(README) == README


def test_the_readme_has_a_place_for_all_numbers():
    assert set(re.findall("<!-- numbers: (.+?) -->", README)) == results_page.NUMBERS.keys()


def test_numbers_elsewhere_are_replaced():
    """A page with other numbers is found to be out of date."""
    quality = json.loads((ROOT / "examples/benchmarks/quality.json").read_text(encoding="utf-8"))
    models = [{(row["method"], row["steps"]): row["distance"] for row in model["rows"]} for model in quality.values()]
    closer = sorted(rows["best of Diffusers", 4] / rows["GS", 4] for rows in models)
    gain = f"{closer[0]:.1f} to {closer[-1]:.1f} times closer"
    assert gain in README
    changed = README.replace(gain, "99.0 to 99.9 times closer")
    assert changed != README
    assert results_page.readme(changed) == README
    with pytest.raises(ValueError, match="a place for 'nothing'"):
        results_page.readme("<!-- numbers: nothing -->\n<!-- end -->")


def test_the_first_lines_run_in_a_checkout(monkeypatch):
    lines = re.search(r"<!-- first lines -->\n```python\n(.+?)```", README, re.DOTALL)
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(lines[1], names)
    assert names["pipe"].scheduler.num_inference_steps == 4 and 4 in names["pipe"].scheduler.solvers
    assert len(names["image"].getcolors(1 << 20)) > 50  # a picture, no uniform ground


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_scripts_and_pictures_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = [first or second for first, second in re.findall(r"\]\(([^)#:]+?)(?:#.*?)?\)|`python (\S+?\.py)`", text)]
    assert len(paths) >= 10
    for path in paths:
        assert (ROOT / path).exists(), path
