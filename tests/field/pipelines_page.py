"""Writes the table of all pipeline classes in PIPELINES.md from `field_matrix.json`.

    python tests/field/pipelines_page.py

The table stands between the lines `<!-- field matrix -->` and `<!-- end -->`. This script measures nothing.
"""

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from diffusers_gas.utils.files import write_text


FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parents[1] / "PIPELINES.md"
PLACE = re.compile(r"(<!-- field matrix -->\n).*?(<!-- end -->)", re.DOTALL)
SCHEDULERS = ("GASScheduler", "SDMScheduler")
EQUAL = 1e-3

LEGEND = (
    "Diffusers {version} exports {total} classes of pipelines, beside {deprecated} deprecated ones and {missing} that need "
    "packages which are not among our test requirements ({packages}). **{works} of them sample with both schedulers as "
    "Diffusers does**, {refused} are refused by a `ValueError` before any evaluation of a network, {failing} fail, and {untested} "
    "could not be run with small networks. {distilled} were distilled."
)
WORKING = """
With these, everything works: both schedulers take as many evaluations as Diffusers' own in the same call, in first order every
state equals that of Diffusers' Euler or DDIM, and after an iteration of gradient-free distillation the pipeline samples what was fitted.
"""
OTHERS = """
The others. *First order* is the comparison with Euler or DDIM. A few pipelines run with neither. *Distilled* is an iteration of a fit.
"""
LINE = 128


def outcome(found: dict[str, Any]) -> str:
    """`works`, `refused`, `failing` or `untested`, from what is recorded of a class."""
    if "not_built" in found or "not_sampled" in found:
        return "untested"
    results = [found[name] for name in SCHEDULERS]
    if all("refused" in result for result in results):
        return "refused"
    works = all(result.get("sampled") for result in results) and first_order(found) != "no"
    return "works" if works else "failing"


def first_order(found: dict[str, Any]) -> str:
    """Whether both schedulers equal Diffusers' in first order: `yes`, `no`, or an empty text if it was not compared."""
    values = [found.get(name, {}).get("first_order") for name in SCHEDULERS]
    differences = [value for value in values if isinstance(value, float)]
    if len(differences) < len(values):
        return ""
    return "yes" if max(differences) < EQUAL else "no"


def numbers(results: dict[str, Any]) -> dict[str, int]:
    """How many classes there are of each outcome, and in total."""
    outcomes = [outcome(found) for found in results["classes"].values()]
    return {name: outcomes.count(name) for name in ("works", "refused", "failing", "untested")} | {
        "total": len(outcomes),
        "distilled": sum(_is_distilled(found.get("distilled", {})) for found in results["classes"].values()),
    }


def _is_distilled(result: dict[str, Any]) -> bool:
    return bool(result.get("closer") and result.get("as_fitted"))


Answer = tuple[str, str]
"""A cell of the table, and the reason if it is not `yes`."""


def row(name: str, found: dict[str, Any]) -> list[str]:
    """The cells of a class: its name, its noise, GAS, SDM, first order, distilled, and why something does not work."""
    for key, text in (("not_built", "not built"), ("not_sampled", "not run")):
        if key in found:
            answers = [(text, _failure(found[key])), *[("", "")] * 3]
            break
    else:
        results = [found[scheduler] for scheduler in SCHEDULERS]
        sampled = all(result.get("sampled") for result in results)
        compared = _compared(found) if sampled else ("", "")
        answers = [*map(_sampled, results), compared, _fit(found.get("distilled", {}))]
    cells, reasons = zip(*answers)
    why = " ".join(dict.fromkeys(filter(None, reasons))).replace(name, "The pipeline").replace("|", "\\|")
    return [f"`{name}`", found.get("noise", ""), *cells, " ".join(why.split())]


def _failure(failure: dict[str, str]) -> str:
    parts = [f"`{failure['error']}`" if failure["error"] else "", failure["message"]]
    file, _, _ = failure["where"].rpartition(":")
    # Where this package refuses something, the message says it all.
    refusal = failure["error"] == "ValueError" and file.startswith("diffusers_gas/")
    return ": ".join(part for part in parts if part) + (f" (`{file}`)" if file and not refusal else "")


def _sampled(result: dict[str, Any]) -> Answer:
    if result.get("sampled"):
        return "yes", ""
    return (
        ("refused", f"`ValueError`: {result['refused']}")
        if "refused" in result
        else ("no", _failure(result["failure"]))
    )


def _compared(found: dict[str, Any]) -> Answer:
    compared = first_order(found)
    if compared == "":
        results = [found[name]["first_order"] for name in SCHEDULERS]
        failure = next(result["failure"] for result in results if not isinstance(result, float))
        return "not compared", _failure(failure)
    return compared, "" if compared == "yes" else "States differ from those of Diffusers' scheduler."


def _fit(result: dict[str, Any]) -> Answer:
    if not result:
        return "", ""
    if "failure" in result:
        return "no", _failure(result["failure"])
    if not result["closer"]:
        return "no", "The fit did not come closer to the teacher."
    return ("yes", "") if _is_distilled(result) else ("no", "The pipeline does not sample what was fitted.")


def table(results: dict[str, Any]) -> str:
    """What stands between the two lines in PIPELINES.md."""
    rows = [row(name, found) for name, found in results["classes"].items()]
    packages = sorted({package for packages in results["missing_packages"].values() for package in packages})
    legend = LEGEND.format(
        version=results["versions"]["diffusers"],
        deprecated=len(results["deprecated"]),
        missing=len(results["missing_packages"]),
        packages=", ".join(packages),
        **numbers(results),
    )
    working: dict[str, list[str]] = {}
    others: dict[tuple[str, ...], list[str]] = {}
    for name, noise, *cells in rows:
        if cells[:4] == ["yes"] * 4:
            working.setdefault(noise, []).append(name)
        else:
            others.setdefault(tuple(cells), []).append(name)
    listed = _table(["noise", "pipelines"], [[noise, ", ".join(names)] for noise, names in sorted(working.items())])
    most_first = sorted(others.items(), key=lambda group: -len(group[1]))
    found = [[*cells, ", ".join(names)] for cells, names in most_first]
    text = _table(["GAS", "SDM", "first order", "distilled", "why", "pipelines"], found)
    legend = "\n".join(textwrap.wrap(legend, LINE, break_long_words=False, break_on_hyphens=False))
    return "\n".join((legend, WORKING, listed, OTHERS, f"{text}\n"))


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def page(text: str) -> str:
    """PIPELINES.md with its table filled in.

    Raises:
        ValueError: If it has no place for the table.
    """
    results = json.loads((FOLDER / "field_matrix.json").read_text(encoding="utf-8"))
    if not PLACE.search(text):
        raise ValueError("PIPELINES.md has no lines `<!-- field matrix -->` and `<!-- end -->`.")
    return PLACE.sub(lambda match: f"{match[1]}{table(results)}{match[2]}", text)


def refresh() -> None:
    """Writes PIPELINES.md."""
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    refresh()
