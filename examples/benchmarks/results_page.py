"""Writes RESULTS.md from the tables and pictures that the other scripts of this folder left here.

python examples/benchmarks/results_page.py
"""

from pathlib import Path


FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]

INTRODUCTION = """# Results

Every number here was written by the script named above it, with the small models in `examples/teachers/`, in single-threaded CPU
runs beside other work: ratios hold, seconds are upper bounds. Distances are mean squared differences of final states to the
teacher's from the same noise, on held-out samples, by which Gauss-Newton picks the best of its iterations and nothing else is
fitted. This page is put together by `examples/benchmarks/results_page.py`.
"""

# Name of the script, heading, what to know before reading, further pictures with their captions.
SECTIONS = (
    (
        "distillation_quality",
        "Distillation on every shipped teacher",
        "GS by Gauss-Newton and calibrated SDM against Diffusers' few-step schedulers of the same kind (DPM-Solver++ 2M and "
        "3M, UniPC, DEIS, DDIM; Euler, DPM-Solver++ and UniPC for flow matching), each with all of its spacing options. "
        "`digits` is an unconditional pixel model, `text-to-digits` a latent one under guidance, `flow-digits` a "
        "flow-matching transformer under guidance. On `digits` GS gains less at 8 and 10 evaluations: with 512 samples its "
        "training error goes on falling while the held-out one does not.",
        tuple(
            (f"distillation_quality-{teacher}.png", f"{teacher}: teacher, best of Diffusers and ours at 4 evaluations")
            for teacher in ("digits", "text-to-digits", "flow-digits")
        ),
    ),
    (
        "gas_quality",
        "GS and GAS",
        "What adversarial training changes: the distance to the teacher, and the Frechet distance between features of a small "
        "digits classifier, of 2048 samples and of the 1797 real digits. The teacher's own is the floor.",
        (),
    ),
    (
        "time_to_quality",
        "Time to quality",
        "Gauss-Newton against the published recipe (Adam) at 4 steps, in one run, from the published start and from ours: the "
        "best of several theory solvers, which is closer to the teacher than what the recipe reaches, before any fit.",
        (),
    ),
    (
        "sdm_quality",
        "SDM",
        "Distance to the exact solution of the ODE, without training.",
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
        parts.append(f"## {heading}\n\n`python examples/benchmarks/{name}.py`\n\n{text}\n\n{table}\n")
        for picture, caption in ((f"{name}.png", heading), *pictures):
            parts.append(f"![{caption}](examples/benchmarks/{picture})\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "RESULTS.md").write_text(page(), encoding="utf-8")
