"""Writes RESULTS.md, and the numbers in README.md, from what the other scripts of this folder left here.

    python examples/benchmarks/results_page.py

Numbers in the README stand between lines `<!-- numbers: NAME -->` and `<!-- end -->`, which this script fills. Nothing is measured.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers_gas.schedulers.model_card import METHODS


FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PICTURED_SOLVER, SOLVER_PICTURE = "examples/solvers/text-to-digits/gs", "examples/benchmarks/solver.png"

INTRODUCTION = """# Results

Every number here was written by the script named above it, with the small models in `examples/teachers/`. `python
examples/benchmarks/run_all.py` makes all of it anew. The recorded runs are on a CPU, each with one thread and often another
beside it: ratios within one run hold, seconds are upper bounds. Distances are mean squared differences of final states
to the teacher's from the same noise, on samples that nothing was fitted to.
"""

MODELS = {
    "digits": "`digits`, pixels",
    "text-to-digits": "`text-to-digits`, Stable Diffusion, guidance 4",
    "flow-digits": "`flow-digits`, Stable Diffusion 3, guidance 4",
    "moving-digits": "`moving-digits`, Wan (video), guidance 4",
}

# Name of the script, heading, what to know before reading, further pictures with their captions.
SECTIONS: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "main_job",
        "The main job",
        "What the README's first command prints at its end: a 4-step solver of the `digits` model beside the closest of "
        "Diffusers' schedulers, on samples that it did not learn from.",
        (),
    ),
    (
        "quality",
        "Quality against network evaluations",
        "Every deterministic scheduler of Diffusers that fits the model, with each of its spacing options, was tried on some "
        "samples; the best of all, the best with Karras' spacing and DPM-Solver++ 2M on the Align Your Steps schedule were "
        "then judged beside ours. GS is fitted by Gauss-Newton, GAS goes on from it with a discriminator, SDM is "
        "calibrated. `digits` is an unconditional pixel model, `text-to-digits` a latent one (Stable Diffusion), "
        "`flow-digits` a flow-matching transformer (Stable Diffusion 3), `moving-digits` a video model (Wan); all but "
        "the first under guidance. The Frechet distance is between features of a small digits classifier, to as many images "
        "of the teacher from other seeds: the teacher's own value is the floor. Errors are standard errors over samples: a few that "
        "end at another digit than the teacher's can make most of a mean, hence the medians. Below each table there is how "
        "far fits to other samples differ.",
        tuple(
            (f"quality-{model}.png", f"{model}: teacher, best of Diffusers, GS and GAS at 4 evaluations")
            for model in MODELS
        ),
    ),
    (
        "time_to_quality",
        "Time to quality",
        "Gauss-Newton against the published recipe (Adam) at 4 steps, in one run, from the published start and from ours: the "
        "best of several theory solvers, which is closer to the teacher than what the recipe reaches, before any fit. Each fit "
        "runs in a process of its own; memory is what it adds to the model and the samples.",
        (),
    ),
    (
        "exact_solution",
        "Accuracy against an exact solution",
        "A Gaussian mixture, whose score is known, as the network of a pipeline.",
        (),
    ),
    (
        "sdm_quality",
        "SDM",
        "Distance to the exact solution of the `digits` model's ODE, without training.",
        (),
    ),
    (
        "distillation_cost",
        "What a distillation costs",
        "How one iteration of Gauss-Newton grows with steps, samples and processes, beside one gradient of the same loss.",
        (),
    ),
    (
        "cost_projection",
        "Large models, projected",
        "Nothing here was run: evaluations are those that the small models took, times the arithmetic of the real architectures.",
        (),
    ),
    (
        "step_cost",
        "Cost of a step",
        "Of the scheduler alone, relative to DPM-Solver++ 2M.",
        (),
    ),
)


def page() -> str:
    """The text of RESULTS.md."""
    parts = [INTRODUCTION]
    for name, heading, text, pictures in SECTIONS:
        table = (FOLDER / f"{name}.md").read_text(encoding="utf-8").strip()
        command = "accelerate launch training/train_gas.py" if name == "main_job" else f"python {_path(name)}.py"
        parts.append(f"## {heading}\n\n`{command}`\n\n{text}\n\n{table}\n")
        for picture, caption in ((f"{name}.png", heading), *pictures):
            parts.append(f"![{caption}](examples/benchmarks/{picture})\n")
    return "\n".join(parts)


def readme(text: str) -> str:
    """The README with its numbers filled in.

    Raises:
        ValueError: If it has a place for numbers that there are none for.
    """

    def fill(match: re.Match) -> str:
        if match["name"] not in NUMBERS:
            raise ValueError(f"README.md has a place for {match['name']!r}; there are {sorted(NUMBERS)}.")
        return f"{match['open']}\n{NUMBERS[match['name']]()}\n<!-- end -->"

    places = re.compile(r"(?P<open><!-- numbers: (?P<name>.+?) -->)\n.*?<!-- end -->", re.DOTALL)
    return places.sub(fill, text)


def quality() -> str:
    """Ours relative to the best of Diffusers, by model and number of evaluations: means, and medians over samples."""
    results = _read("quality")
    steps = sorted({row["steps"] for result in results.values() for row in result["rows"][1:]})
    lines = [["model", *(f"{n} evaluations" if n == steps[0] else str(n) for n in steps)], ["---"] * (1 + len(steps))]
    for name, result in results.items():
        found = {(row["method"], row["steps"]): row for row in result["rows"]}

        def cell(n: int, found: dict[tuple[str, int], dict[str, Any]] = found) -> str:
            if ("GS", n) not in found:
                return ""
            ours, best = found["GS", n], found["best of Diffusers", n]
            return "{:.2f} ({:.2f})".format(*(ours[key] / best[key] for key in ("distance", "median")))

        lines.append([MODELS[name], *map(cell, steps)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def frechet() -> str:
    """What adversarial training adds at the fewest evaluations, for the models that it was done with."""
    lines = ["| Frechet distance | evaluations | best of Diffusers | GS | GAS | teacher |", "| --- " * 6 + "|"]
    for name, result in _read("quality").items():
        found = {(row["method"], row["steps"]): row["frechet"] for row in result["rows"]}
        for n in [steps for method, steps in found if method == "GAS"][:1]:
            ours = [found[method, n] for method in ("best of Diffusers", "GS", "GAS")]
            cells = [MODELS[name], str(n), *(f"{value:.2f}" for value in (*ours, result["rows"][0]["frechet"]))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def time() -> str:
    """When Gauss-Newton reaches what the published recipe ends with."""
    results = _read("time_to_quality")

    def reached(name: str) -> dict[str, float]:
        return next(point for point in results["curves"][name] if point["distance"] <= results["target"])

    adam, setting = reached("Adam, published start"), results["setting"]

    def gain(start: str) -> str:
        point = reached(f"Gauss-Newton, {start} start")
        times, fewer = (adam[quantity] / point[quantity] for quantity in ("seconds", "evaluations"))
        return f"{times:.0f} times faster, with {fewer:.0f} times fewer network evaluations"

    return (
        f"**Time to quality.** What the published recipe (Adam) reaches in {setting['adam_steps']} iterations at "
        f"{setting['num_inference_steps']} steps, Gauss-Newton reaches {gain('our')}. Most of that is the start: from the "
        f"published one it is {gain('published')} ([`time_to_quality.py`](examples/benchmarks/time_to_quality.py))."
    )


def cost() -> str:
    """What the scheduler itself costs while sampling, and what distilling large models would."""
    steps = [row for row in _read("step_cost")["rows"] if row["scheduler"] == "GAS (learned)"]
    few = [row["relative"] for row in steps if row["steps"] <= 8]
    fits = [row for row in _read("distillation_cost") if row["processes"] == 1 and row["steps"] == 10]
    memory = {row["method"]: row["peak_memory"] / 2**20 for row in fits}
    large = _read("cost_projection")["projections"]
    flux = next(
        row for row in large if row["model"].startswith("FLUX") and row["steps"] == 4 and row["samples"] == 128
    )
    return (
        f"**Cost.** A step of a learned solver takes {min(few):.2f} to {max(few):.2f} of the time of DPM-Solver++ 2M's at 4 and 8 "
        "steps ([`step_cost.py`](examples/benchmarks/step_cost.py)). Distilling 4 steps for FLUX.1-dev from 128 samples is "
        f"projected to take {flux['gpu_hours']:.0f} GPU hours, without gradients, whose memory grows with steps: at 10 steps on "
        f"`digits` {memory['Gauss-Newton']:.0f} MB beside {memory['backpropagation']:.0f} MB "
        "([`cost_projection.py`](examples/benchmarks/cost_projection.py), "
        "[`distillation_cost.py`](examples/benchmarks/distillation_cost.py))."
    )


def citations() -> str:
    """Of the papers, as model cards have them."""
    return "\n".join(["```bibtex", *(method.citation for method in METHODS.values()), "```"])


NUMBERS: dict[str, Callable[[], str]] = {
    "quality": quality,
    "frechet": frechet,
    "time": time,
    "cost": cost,
    "citations": citations,
}


def refresh() -> None:
    """Writes RESULTS.md and the README's numbers."""
    readme_path = ROOT / "README.md"
    filled = readme(readme_path.read_text(encoding="utf-8"))
    (ROOT / "RESULTS.md").write_text(page(), encoding="utf-8")
    readme_path.write_text(filled, encoding="utf-8")


def _path(name: str) -> str:
    return f"examples/benchmarks/{name}"


def _read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    refresh()
