"""One solver for a range of guidance scales, beside solvers for single scales and Diffusers' schedulers.

    python examples/benchmarks/guidance_scales.py
    python examples/benchmarks/guidance_scales.py --models flow-digits --steps 4

For each model and number of evaluations one solver is distilled at `NUM_SCALES` scales of the model's range, and for each scale at
which it is judged another one at this scale alone. They and the schedulers of `few_step_rivals` sample the same noises, which no fit
has used, and are measured by the mean squared distance to the teacher's samples of 50 steps. Fits and measured rows are kept, so that
an interrupted run can be resumed. The results are guidance_scales.json, .md and .png beside this file, or in the folder
DIFFUSERS_GAS_BENCHMARK_OUTPUT. Those of models and steps that were not asked for stay as they are; to measure again, delete them and
the fits in `.fits`.
"""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fits import cost, folder, train
from quality import BATCH_SIZE, JUDGED_SEED
from report import Settings, figure, load_teacher, markdown_table, output_path, read, write, write_results
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler
from diffusers_gas.comparison import compare, few_step_rivals


@dataclass(frozen=True)
class Range:
    """The lowest and the highest guidance scale of a model's solver, and those at which it is judged."""

    low: float
    high: float
    judged: tuple[float, ...]


RANGES = {
    "text-to-emoji": Range(2, 10, (2.5, 5, 7.5)),
    "text-to-digits": Range(1.5, 8, (1.5, 2.5, 4, 6, 8)),
    "flow-digits": Range(1.5, 8, (1.5, 2.5, 4, 6, 8)),
}
STEPS = (4, 6)
NUM_SCALES, NUM_SAMPLES = 5, 128
RANGE, SINGLE, BEST = "one solver of the range", "solver of this scale", "best of Diffusers"
STYLES = {RANGE: {"marker": "o"}, SINGLE: {"linestyle": "--", "marker": "x"}, BEST: {"linestyle": ":", "marker": "."}}


def distilled(model: str, num_inference_steps: int, *scales: float) -> GASScheduler:
    """A solver for a scale or for the range of several ones. That of an earlier run is read."""
    path = folder(model, "gs-guidance-" + "-".join(f"{scale:g}" for scale in scales))
    train(model, path, [num_inference_steps], "--guidance_scale", *scales)
    return GASScheduler.from_pretrained(path / "scheduler")


def measure(model: str, num_inference_steps: int, scale: float, num_samples: int) -> dict[str, Any]:
    """The distances to the teacher at a guidance scale, and the network evaluations of the fits."""
    asked, n = RANGES[model], num_inference_steps
    scales = np.geomspace(asked.low, asked.high, NUM_SCALES).round(2).tolist()
    fitted = {RANGE: distilled(model, n, *scales), SINGLE: distilled(model, n, scale)}
    teacher = load_teacher(model)
    teacher = replace(teacher, settings=Settings(str(teacher.path), guidance_scale=[scale]))
    samples = teacher.samples(JUDGED_SEED, num_samples)
    ours = {row.scheduler: row.distance for row in compare(teacher.pipe, fitted, [n], samples, BATCH_SIZE)}
    best = compare(teacher.pipe, few_step_rivals(teacher.pipe), [n], samples, BATCH_SIZE)[0]
    return {
        "model": model,
        "steps": n,
        "scale": scale,
        "num_samples": num_samples,
        "range": [asked.low, asked.high],
        "distances": {**ours, BEST: best.distance},
        "scheduler": best.scheduler,
        "evaluations": {name: cost(scheduler.solvers[n])["evaluations"] for name, scheduler in fitted.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    header = [
        "model",
        "evaluations",
        "range",
        "guidance scale",
        "distance to the teacher",
        "relative to the solver of this scale",
    ]
    header += ["relative to the best of Diffusers", "evaluations of the fit, relative to that of this scale"]
    lines = []
    for row in rows:
        distances, spent = row["distances"], row["evaluations"]
        low, high = row["range"]
        lines.append(
            [
                *(row["model"], str(row["steps"]), f"{low:g} to {high:g}", f"{row['scale']:g}"),
                f"{distances[RANGE]:.4f}",
                f"{distances[RANGE] / distances[SINGLE]:.2f}",
                f"{distances[RANGE] / distances[BEST]:.2f} ({row['scheduler']})",
                f"{spent[RANGE] / spent[SINGLE]:.1f} ({spent[RANGE] / 1000:.0f} thousand)",
            ]
        )
    return markdown_table(header, lines)


def draw(rows: list[dict[str, Any]]) -> Any:
    """Distances over the guidance scale: a panel for each model, a colour for each number of evaluations."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    plot, axes = figure(1, len(models), (0.6 + 4.2 * len(models), 3.8))
    for axis, model in zip(axes[0], models):
        of_model = [row for row in rows if row["model"] == model]
        for i, n in enumerate(sorted({row["steps"] for row in of_model})):
            some = [row for row in of_model if row["steps"] == n]
            for name, style in STYLES.items():
                scales, distances = zip(*((row["scale"], row["distances"][name]) for row in some))
                axis.plot(scales, distances, color=f"C{i}", label=f"{name}, {n} evaluations", **style)
        axis.set(title=model, xlabel="guidance scale", xscale="log", yscale="log")
        axis.set_xticks(RANGES[model].judged, [f"{scale:g}" for scale in RANGES[model].judged])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("squared distance to the teacher")
    return plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(RANGES), default=list(RANGES))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--num_samples", type=int, default=NUM_SAMPLES)
    args = parser.parse_args()
    earlier = read("guidance_scales") if output_path(__file__, ".json").exists() else []
    rows = {(row["model"], row["steps"], row["scale"]): row for row in earlier}
    for key in tqdm([(m, n, s) for m in args.models for n in args.steps for s in RANGES[m].judged], unit="scale"):
        if key not in rows or rows[key]["num_samples"] != args.num_samples:
            rows[key] = measure(*key, args.num_samples)
            write_results(__file__, list(rows.values()))
    found = sorted(rows.values(), key=lambda row: (list(RANGES).index(row["model"]), row["steps"], row["scale"]))
    write(__file__, found, table(found), draw(found))


if __name__ == "__main__":
    main()
