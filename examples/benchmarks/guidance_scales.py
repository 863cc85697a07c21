"""Solvers at other guidance scales than they were made for.

    python examples/benchmarks/guidance_scales.py

The model is text-to-emoji at 4 evaluations. At each scale its teacher of 50 steps, the best of Diffusers and our solvers sample the
same noises, which no fit has used. The solvers are GS distilled at this scale, GS and SDM made at the model's own scale, and GS
distilled at the lowest and the highest scale together. Fits and measurements are kept, so that an interrupted run can be resumed.
"""

from dataclasses import asdict, replace
from typing import Any

from fits import FITS, folder, gauss_newton, sdm, train
from quality import BEST, PAGE_MODEL, Judge, rivals
from report import Settings, figure, load_teacher, markdown_table, write
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, SDMScheduler
from diffusers_gas.papers.evaluation.measurement import Sampler


# The last one is the model's own.
SCALES = (2.5, 5.0, 7.5)
OWN_SCALE, EXTREMES = SCALES[-1], (SCALES[0], SCALES[-1])
STEPS = 4
GS_HERE, GS_OWN, GS_BOTH = "GS of this scale", f"GS of {OWN_SCALE:g}", "GS of {:g} and {:g}".format(*EXTREMES)
SDM_OWN = f"SDM of {OWN_SCALE:g}"
STYLES = {BEST: "black", SDM_OWN: "C2", GS_OWN: "C1", GS_BOTH: "C4", GS_HERE: "C0"}


def distilled(*scales: float) -> GASScheduler:
    """The solver of a scale, or one of several, which the training samples have in turn."""
    if scales == (OWN_SCALE,):
        path = gauss_newton(PAGE_MODEL, [STEPS])
    else:
        path = folder(PAGE_MODEL, "gs-guidance-" + "-".join(f"{scale:g}" for scale in scales))
        train(PAGE_MODEL, path, [STEPS], "--guidance_scale", *scales)
    return GASScheduler.from_pretrained(path / "scheduler")


def calibrated() -> SDMScheduler:
    return SDMScheduler.from_pretrained(sdm(PAGE_MODEL) / "scheduler")


def measure_scale(scale: float) -> list[dict[str, Any]]:
    """Rows of the teacher, the best of Diffusers and our solvers at a guidance scale."""
    teacher = load_teacher(PAGE_MODEL)
    teacher = replace(teacher, settings=Settings(str(teacher.path), guidance_scale=[scale]))
    judge = Judge(teacher)
    bar = tqdm(rivals(teacher.pipe, STEPS), desc=f"guidance {scale:g}, Diffusers", unit="scheduler")
    best = min(bar, key=judge.screen)
    ours = {
        SDM_OWN: calibrated(),
        GS_OWN: distilled(OWN_SCALE),
        GS_BOTH: distilled(*EXTREMES),
        GS_HERE: distilled(scale),
    }
    samplers = {BEST: best, **{name: Sampler(name, scheduler, STEPS) for name, scheduler in ours.items()}}
    rows = [judge.judge(judge.many_steps, "teacher", judge.many_steps.num_inference_steps)]
    rows += [judge.judge(sampler, name, STEPS) for name, sampler in samplers.items()]
    return [asdict(row) for row in rows]


def table(results: dict[str, Any]) -> str:
    header = ["guidance scale", "method", "distance to the teacher", "relative to the best of Diffusers"]
    header += ["Frechet distance", "named as the prompt"]
    lines = []
    for scale, rows in results["rows"].items():
        best = next(row["distance"] for row in rows if row["method"] == BEST)
        for row in rows:
            distances = ["", ""]
            if row["method"] != "teacher":
                distance = f"{row['distance']:.4f} ± {row['distance_error']:.4f}"
                distances = [distance, f"{row['distance'] / best:.2f}"]
            method = f"{row['method']} ({row['scheduler']})" if row["method"] == BEST else row["method"]
            frechet = f"{row['frechet']:.2f} ± {row['frechet_error']:.2f}"
            lines.append([scale, method, *distances, frechet, f"{row['named']:.1%}"])
    text = f"**{results['model']}**, {results['steps']} evaluations, {results['num_samples']} samples that no fit has used."
    return f"{text}\n\n{markdown_table(header, lines)}"


def draw(results: dict[str, Any]) -> Any:
    plot, axes = figure()
    axis = axes[0, 0]
    scales = [float(scale) for scale in results["rows"]]
    for method, color in STYLES.items():
        rows = [row for found in results["rows"].values() for row in found if row["method"] == method]
        distances, errors = ([row[key] for row in rows] for key in ("distance", "distance_error"))
        axis.errorbar(scales, distances, errors, marker="o", markersize=4, capsize=2, label=method, color=color)
    axis.set(yscale="log", xticks=scales, xlabel="guidance scale", ylabel="squared distance to the teacher")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return plot


def main() -> None:
    rows = {f"{scale:g}": measure_scale(scale) for scale in SCALES}
    results = {"model": PAGE_MODEL, "steps": STEPS, "num_samples": FITS[PAGE_MODEL].num_judged, "rows": rows}
    write(__file__, results, table(results), draw(results))


if __name__ == "__main__":
    main()
