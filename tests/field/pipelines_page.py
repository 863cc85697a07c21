"""Writes the table of all pipeline classes in PIPELINES.md from `field_matrix.json`.

    python tests/field/pipelines_page.py

The table stands between the lines `<!-- field matrix -->` and `<!-- end -->`. This script measures nothing.
"""

import json
import re
from pathlib import Path
from typing import Any

from diffusers_gas.utils.files import write_text


FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parents[1] / "PIPELINES.md"
PLACE = re.compile(r"(<!-- field matrix -->\n).*?(<!-- end -->)", re.DOTALL)
SCHEDULERS = ("GASScheduler", "SDMScheduler")
EQUAL = 1e-3

LEGEND = """Diffusers {version} exports {total} classes of pipelines, beside {deprecated} deprecated ones and {missing} that need
packages which are not among our test requirements ({packages}). **{works} of them sample with both schedulers as Diffusers
does**, {refused} are refused by a `ValueError` before any evaluation of a network, {failing} fail, and {untested} could not be run
with small networks.

- *GAS*, *SDM*: sampled as many evaluations as Diffusers' scheduler in the same call, at 4 and 8 steps, finite and repeatable.
- *first order*: every state equals that of Diffusers' Euler or DDIM on the same times, for both schedulers. A few pipelines run
  with neither, so that this is not compared.
- *distilled*: one iteration of gradient-free distillation came closer to the teacher, and the pipeline then samples what was
  fitted.
"""


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
        "distilled": sum(_distilled(found) == "yes" for found in results["classes"].values()),
    }


def _distilled(found: dict[str, Any]) -> str:
    result = found.get("distilled", {})
    return "yes" if result.get("closer") and result.get("as_fitted") else ("no" if result else "")


class Notes:
    """Footnotes, each message once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def reference(self, message: str) -> str:
        """The mark of a footnote, which is made if it is new."""
        text = re.sub(r"\w+Pipeline\b", "The pipeline", " ".join(message.split()), count=1)
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}](#notes-on-the-classes)"


def _failure(failure: dict[str, str]) -> str:
    where = f" ({failure['where'].rsplit(':', 1)[0]})" if failure["where"] else ""
    kind = f"`{failure['error']}`: " if failure["error"] else ""
    return f"{kind}{failure['message']}{where}"


def _row(name: str, found: dict[str, Any], notes: Notes) -> list[str]:
    for key, text in (("not_built", "not built"), ("not_sampled", "not run")):
        if key in found:
            return [f"`{name}`", found.get("noise", ""), text + notes.reference(_failure(found[key])), "", "", ""]
    cells = [f"`{name}`", found.get("noise", "")]
    for scheduler in SCHEDULERS:
        result = found[scheduler]
        if result.get("sampled"):
            cells.append("yes")
        elif "refused" in result:
            cells.append("refused" + notes.reference(f"`ValueError`: {result['refused']}"))
        else:
            cells.append("no" + notes.reference(_failure(result["failure"])))
    sampled = all(found[scheduler].get("sampled") for scheduler in SCHEDULERS)
    compared = first_order(found)
    if sampled and compared == "":
        values = (found[scheduler]["first_order"] for scheduler in SCHEDULERS)
        failure = next(value["failure"] for value in values if not isinstance(value, float))
        compared = "not compared" + notes.reference(_failure(failure))
    elif compared == "no":
        compared += notes.reference(
            "States differ from Diffusers': the pipeline reads other quantities of its scheduler than the interface has."
        )
    fitted = _distilled(found)
    if "failure" in found.get("distilled", {}):
        fitted += notes.reference(_failure(found["distilled"]["failure"]))
    elif fitted == "no":
        fitted += notes.reference(
            "The fit did not come closer to the teacher."
            if not found["distilled"]["closer"]
            else "The pipeline samples other states than those that the fit measured."
        )
    return [*cells, compared if sampled else "", fitted]


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
    lines = [["pipeline", "noise", "GAS", "SDM", "first order", "distilled"], ["---"] * 6, *rows]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    numbered = "\n".join(f"{i}. {note}" for i, note in enumerate(notes.texts, start=1))
    return f"{legend}\n{text}\n\n### Notes on the classes\n\n{numbered}\n"


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
