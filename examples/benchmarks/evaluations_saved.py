"""How many network evaluations a distilled solver saves: GS in n against the best of Diffusers in n, 2 n and 3 n.

    python examples/benchmarks/evaluations_saved.py

The model is text-to-emoji, the solvers are those of quality.py. For every number of evaluations, all schedulers of Diffusers with
all their spacing options sample a few noises, the closest of them to the teacher some more, and the best of these all samples. Where
quality.py has screened all of them, its measurements are used.
"""

from dataclasses import asdict
from typing import Any

from fits import FITS, gs
from quality import NUM_SCREENED, PAGE_MODEL, Judge, Row, rivals
from report import figure, load_teacher, markdown_table, write
from tqdm.auto import tqdm

from diffusers_gas.papers.evaluation.measurement import Sampler


STEPS = (4, 5, 6, 8, 10)
# Of all schedulers, NUM_CHOSEN are screened on as many samples as in quality.py.
NUM_FIRST_SCREENED, NUM_CHOSEN = 8, 8
MULTIPLES = (1, 2, 3)


def best_of_diffusers(judge: Judge, evaluations: int) -> Row:
    """The scheduler of Diffusers that is closest to the teacher, evaluated on all samples."""
    candidates = rivals(judge.teacher.pipe, evaluations)
    bar = {"desc": f"{evaluations} evaluations", "unit": "scheduler"}
    if evaluations not in FITS[PAGE_MODEL].steps:
        few = {sampler.name: judge.screen(sampler, NUM_FIRST_SCREENED) for sampler in tqdm(candidates, **bar)}
        candidates = sorted(candidates, key=lambda sampler: few[sampler.name])[:NUM_CHOSEN]
    best = min(tqdm(candidates, **bar), key=lambda sampler: judge.screen(sampler, NUM_SCREENED))
    return judge.judge(best, "best of Diffusers", evaluations)


def measure() -> dict[str, Any]:
    """Rows of GS, and of the best of Diffusers, by numbers of evaluations."""
    judge = Judge(load_teacher(PAGE_MODEL))
    scheduler = gs(PAGE_MODEL)
    ours = {n: asdict(judge.judge(Sampler("GS", scheduler, n), "GS", n)) for n in STEPS}
    counts = sorted({multiple * n for n in STEPS for multiple in MULTIPLES})
    return {
        "model": PAGE_MODEL,
        "num_samples": FITS[PAGE_MODEL].num_judged,
        "GS": ours,
        "Diffusers": {count: asdict(best_of_diffusers(judge, count)) for count in counts},
    }


def table(results: dict[str, Any]) -> str:
    """Distances to the teacher, then Frechet distances, each of GS and of Diffusers at multiples of its evaluations."""
    times = ("as many", "twice as many", "three times as many")

    def values(key: str, digits: int, name: str) -> str:
        lines = []
        for n, ours in results["GS"].items():
            theirs = [results["Diffusers"][multiple * n] for multiple in MULTIPLES]
            cells = [f"{row[key]:.{digits}f} ({row['scheduler']}, {row['steps']})" for row in theirs]
            lines.append([str(n), f"{ours[key]:.{digits}f} ± {ours[f'{key}_error']:.{digits}f}", *cells])
        header = [f"evaluations of GS, {name}", "GS", *(f"best of Diffusers, {word}" for word in times)]
        return markdown_table(header, lines)

    tables = [values("distance", 4, "distance to the teacher"), values("frechet", 2, "Frechet distance")]
    return "\n\n".join([f"**{results['model']}**, {results['num_samples']} samples that no fit has used.", *tables])


def draw(results: dict[str, Any]) -> Any:
    plot, axes = figure(1, 2, (9, 3.6))
    for axis, key, title in zip(axes[0], ("distance", "frechet"), ("distance to the teacher", "Frechet distance")):
        for method, color in (("Diffusers", "black"), ("GS", "C0")):
            rows = results[method].values()
            steps, means, errors = ([row[name] for row in rows] for name in ("steps", key, f"{key}_error"))
            label = f"best of {method}" if method == "Diffusers" else method
            axis.errorbar(steps, means, errors, marker="o", markersize=4, capsize=2, color=color, label=label)
        axis.set(yscale="log", xlabel="network evaluations", title=title)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    return plot


def main() -> None:
    results = measure()
    write(__file__, results, table(results), draw(results))


if __name__ == "__main__":
    main()
