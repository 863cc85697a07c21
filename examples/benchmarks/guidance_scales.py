"""One solver for a range of guidance scales, beside solvers for single scales and Diffusers' schedulers.

    python examples/benchmarks/guidance_scales.py
    python examples/benchmarks/guidance_scales.py --models flow-digits --steps 4

For each model and number of evaluations one solver is distilled for the model's range, and for each scale at which it is judged another
one at this scale alone. Likewise one SDM plan is calibrated with samples of all scales in turn, and one for each scale. They and the
schedulers of `few_step_rivals` sample the same noises, which no fit has used, and are measured by the squared distance to the teacher's
samples of 50 steps. A few samples that end at another image than the teacher's dominate some means, so that there are the medians, too.
Fits and measured rows are kept, so that an interrupted run can be resumed. The results are guidance_scales.json, .md and .png beside
this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT. Those of models and steps that were not asked for stay as they are; to measure
again, delete them and the fits in `.fits`.
"""

import argparse
from dataclasses import replace
from typing import Any

from fits import FITS, cost, of_range, of_scales, scales_of_range, sdm
from of_others import errors, final_states
from quality import BATCH_SIZE, JUDGED_SEED
from report import Settings, figure, load_teacher, markdown_table, measure_each, write

from diffusers_gas.comparison import compare, few_step_rivals


JUDGED = {
    "text-to-emoji": (2.5, 3.5, 5, 6, 7.5, 9),
    "text-to-digits": (1.5, 2.5, 4, 6, 8),
    "flow-digits": (1.5, 2.5, 4, 6, 8),
}
STEPS = (4, 6)
NUM_SAMPLES = 128
RANGE, SINGLE, BEST = "one solver of the range", "solver of this scale", "best of Diffusers"
PLAN, SINGLE_PLAN = "SDM, one plan of the range", "SDM, plan of this scale"
STYLES = {RANGE: {"marker": "o"}, SINGLE: {"linestyle": "--", "marker": "x"}, BEST: {"linestyle": ":", "marker": "."}}


def measure(model: str, num_inference_steps: int, scale: float) -> dict[str, Any]:
    """The distances to the teacher at a guidance scale, and the network evaluations of the fits."""
    n, teacher = num_inference_steps, load_teacher(model)
    fitted = {
        RANGE: of_range(model, n),
        SINGLE: of_scales(model, n, scale),
        PLAN: sdm(model, STEPS, *scales_of_range(model)),
        SINGLE_PLAN: sdm(model, STEPS, scale),
    }
    teacher = replace(teacher, settings=Settings(str(teacher.path), guidance_scale=[scale]))
    samples = teacher.samples(JUDGED_SEED, NUM_SAMPLES)
    ours = {
        name: errors(final_states(teacher.pipe, scheduler, n, samples.inputs, BATCH_SIZE), samples.final)
        for name, scheduler in fitted.items()
    }
    best = compare(teacher.pipe, few_step_rivals(teacher.pipe), [n], samples, BATCH_SIZE)[0]
    return {
        "model": model,
        "steps": n,
        "scale": scale,
        "range": FITS[model].guidance_range,
        "distances": {**{name: row["distance"] for name, row in ours.items()}, BEST: best.distance},
        "medians": {name: row["median"] for name, row in ours.items()},
        "scheduler": best.scheduler,
        "evaluations": {name: cost(fitted[name].solvers[n])["evaluations"] for name in (RANGE, SINGLE)},
    }


def table(rows: list[dict[str, Any]]) -> str:
    header = [
        "model",
        "evaluations",
        "range",
        "guidance scale",
        "distance to the teacher",
        "relative to the solver of this scale",
        "median, relative",
    ]
    header += ["relative to the best of Diffusers", "evaluations of the fit, relative to that of this scale"]
    header += ["SDM, one plan of the range: relative to the plan of this scale", "to the best of Diffusers"]
    lines = []
    for row in rows:
        distances, medians, spent = row["distances"], row["medians"], row["evaluations"]
        low, high = row["range"]
        lines.append(
            [
                *(row["model"], str(row["steps"]), f"{low:g} to {high:g}", f"{row['scale']:g}"),
                f"{distances[RANGE]:.4f}",
                f"{distances[RANGE] / distances[SINGLE]:.2f}",
                f"{medians[RANGE] / medians[SINGLE]:.2f}",
                f"{distances[RANGE] / distances[BEST]:.2f} ({row['scheduler']})",
                f"{spent[RANGE] / spent[SINGLE]:.1f} ({spent[RANGE] / 1000:.0f} thousand)",
                *(f"{distances[PLAN] / distances[other]:.2f}" for other in (SINGLE_PLAN, BEST)),
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
        axis.set_xticks(JUDGED[model], [f"{scale:g}" for scale in JUDGED[model]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("squared distance to the teacher")
    return plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(JUDGED), default=list(JUDGED))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    args = parser.parse_args()
    jobs = {
        f"{model}, {n} evaluations, guidance {scale:g}": (model, n, scale)
        for model in JUDGED
        for n in STEPS
        for scale in JUDGED[model]
    }
    asked = [name for name, (model, n, _) in jobs.items() if model in args.models and n in args.steps]
    found = measure_each(__file__, asked, lambda name: measure(*jobs[name]))
    results = {name: found[name] for name in jobs if name in found}
    rows = list(results.values())
    write(__file__, results, table(rows), draw(rows))


if __name__ == "__main__":
    main()
