"""RESULTS.md says what the benchmarks wrote."""

import json
import re
import sys
from typing import Any

from conftest import ROOT


sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
import results_page


def test_page_is_up_to_date():
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == results_page.page()


def test_scripts_and_pictures_exist():
    page = results_page.page()
    paths = re.findall(r"\]\((.+?)\)|`python (.+?)`", page)
    assert len(paths) >= 10
    for path in (path for pair in paths for path in pair if path):
        assert (ROOT / path).is_file(), path


def test_numbers_of_the_readme_are_the_benchmarks():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    distillation = read("distillation_quality")
    for teacher, rows in distillation.items():
        line = next(line for line in readme.splitlines() if line.startswith(f"| `{teacher}`"))
        expected = [f"{row['relative']:.2f}" for row in rows]
        assert re.findall(r"\d\.\d\d", line) == expected, teacher

    frechet = {(row["method"], row["steps"]): row["frechet"] for row in read("gas_quality")}
    gas = [frechet[method, 4] for method in ("GS, Gauss-Newton", "GAS, from Gauss-Newton")]
    numbers = [f"{value:.2f}" for value in (*gas, frechet["teacher", 50])]
    assert re.search("Frechet distance .* from {} to {}; the teacher's own is {}".format(*numbers), flat(readme))

    results = read("time_to_quality")
    times = [
        next(point["seconds"] for point in results["curves"][name] if point["distance"] <= results["target"])
        for name in ("Adam, published start", "Gauss-Newton, our start", "Gauss-Newton, published start")
    ]
    expected = (times[0] / times[1], times[0] / times[2])
    assert re.search("in 1/{:.0f} of the time.* 1/{:.0f} from the published start".format(*expected), flat(readme))

    costs = [row["relative"] for row in read("step_cost")["rows"] if row["scheduler"] == "GAS (learned)"]
    assert f"{min(costs):.2f} to {max(costs):.2f} of DPM-Solver++ 2M" in flat(readme)


def read(name: str) -> Any:
    return json.loads((ROOT / "examples" / "benchmarks" / f"{name}.json").read_text())


def flat(text: str) -> str:
    return " ".join(text.split())
