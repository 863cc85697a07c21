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
The others. *First order* is the comparison with Euler or DDIM. A few pipelines run with neither.
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


class Notes:
    """Footnotes, each message once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, pipeline: str, message: str) -> str:
        """The mark of a footnote, which is made if it is new."""
        text = " ".join(message.split()).replace(pipeline, "The pipeline")
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}](#notes-on-the-classes)"

    def failure(self, pipeline: str, failure: dict[str, str]) -> str:
        """The mark of a footnote about an error."""
        parts = [f"`{failure['error']}`" if failure["error"] else "", failure["message"]]
        file, _, _ = failure["where"].rpartition(":")
        # Where this package refuses something, the message says it all.
        refusal = failure["error"] == "ValueError" and file.startswith("diffusers_gas/")
        where = f" (`{file}`)" if file and not refusal else ""
        return self.mark(pipeline, ": ".join(part for part in parts if part) + where)


def _row(name: str, found: dict[str, Any], notes: Notes) -> list[str]:
    for key, text in (("not_built", "not built"), ("not_sampled", "not run")):
        if key in found:
            return [f"`{name}`", found.get("noise", ""), text + notes.failure(name, found[key]), "", "", ""]
    results = [found[scheduler] for scheduler in SCHEDULERS]
    cells = [f"`{name}`", found.get("noise", ""), *(_sampled(name, result, notes) for result in results)]
    if not all(result.get("sampled") for result in results):
        return [*cells, "", _fit(name, found.get("distilled", {}), notes)]
    compared = first_order(found)
    if compared == "":
        failures = [
            result["first_order"]["failure"] for result in results if not isinstance(result["first_order"], float)
        ]
        compared = "not compared" + notes.failure(name, failures[0])
    elif compared == "no":
        compared += notes.mark(name, "States differ from those of Diffusers' scheduler.")
    return [*cells, compared, _fit(name, found["distilled"], notes)]


def _sampled(name: str, result: dict[str, Any], notes: Notes) -> str:
    if result.get("sampled"):
        return "yes"
    if "refused" in result:
        return "refused" + notes.mark(name, f"`ValueError`: {result['refused']}")
    return "no" + notes.failure(name, result["failure"])


def _fit(name: str, result: dict[str, Any], notes: Notes) -> str:
    if not result:
        return ""
    if "failure" in result:
        return "no" + notes.failure(name, result["failure"])
    if not result["closer"]:
        return "no" + notes.mark(name, "The fit did not come closer to the teacher.")
    return "yes" if _is_distilled(result) else "no" + notes.mark(name, "The pipeline does not sample what was fitted.")


def row(name: str, found: dict[str, Any]) -> list[str]:
    """The cells of a class."""
    return _row(name, found, Notes())


def table(results: dict[str, Any]) -> str:
    """What stands between the two lines in PIPELINES.md."""
    notes = Notes()
    rows = [_row(name, found, notes) for name, found in results["classes"].items()]
    packages = sorted({package for packages in results["missing_packages"].values() for package in packages})
    legend = LEGEND.format(
        version=results["versions"]["diffusers"],
        deprecated=len(results["deprecated"]),
        missing=len(results["missing_packages"]),
        packages=", ".join(packages),
        **numbers(results),
    )
    working: dict[str, list[str]] = {}
    for name, noise, *cells in rows:
        if cells == ["yes"] * 4:
            working.setdefault(noise, []).append(name)
    listed = _table(["noise", "pipelines"], [[noise, ", ".join(names)] for noise, names in sorted(working.items())])
    others = [cells for cells in rows if cells[2:] != ["yes"] * 4]
    text = _table(["pipeline", "noise", "GAS", "SDM", "first order", "distilled"], others)
    numbered = "\n".join(f"{i}. {note}" for i, note in enumerate(notes.texts, start=1))
    legend = "\n".join(textwrap.wrap(legend, LINE, break_long_words=False, break_on_hyphens=False))
    parts = (legend, WORKING, listed, OTHERS, f"{text}\n\n### Notes on the classes\n\n{numbered}\n")
    return "\n".join(parts)


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
