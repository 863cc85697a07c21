"""What a solver costs and how good it is, on the models of digits: fits by default settings.

    python examples/benchmarks/solver_cost.py
    python examples/benchmarks/solver_cost.py --models digits --steps 4

The fit of 4 steps is repeated with other samples to learn from. The solvers are judged on samples that no fit has used, by the mean and by the
median of the squared distances to the teacher. A few samples that end at another digit than the teacher's dominate the mean.
The cost counts all network evaluations: of the fit, of the choice of its start, and of the teacher's samples, those held out included.
Fits are made by fits.py and kept, so that an interrupted run can be resumed; those that quality.py has made are not made again. The results
are solver_cost.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT.
"""

import argparse
from statistics import mean
from typing import Any

from fits import cost, gauss_newton
from report import Teacher, figure, load_teacher, markdown_table, write
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, GeneralizedSolver
from diffusers_gas.distillation.gauss_newton import Problem
from diffusers_gas.pipelines.inputs import EVALUATION_SEED
from diffusers_gas.pipelines.teacher import TeacherSamples


MODELS = ("digits", "text-to-digits", "flow-digits")
NUM_JUDGED = 512
# Numbers of fits, by steps.
NUM_FITS = {4: 2, 6: 1, 8: 1, 10: 1}
JUDGED_SEED = 2 * EVALUATION_SEED


def judged(teacher: Teacher, solver: GeneralizedSolver, samples: TeacherSamples) -> dict[str, float]:
    _, distances = Problem(teacher.pipe).losses_of_samples(solver, samples)
    return {"mean": distances.mean().item(), "median": distances.median().item()}


def rows_of(name: str, step_counts: list[int]) -> list[dict[str, Any]]:
    """The cost and the distances of all fits of a model. Missing ones are made."""
    teacher = load_teacher(name)
    samples = teacher.samples(JUDGED_SEED, NUM_JUDGED)
    rows = []
    for n in step_counts:
        fits = []
        for repeat in range(NUM_FITS[n]):
            scheduler = GASScheduler.from_pretrained(gauss_newton(teacher.name, [n], repeat) / "scheduler")
            fits.append(cost(scheduler.solvers[n]) | judged(teacher, scheduler.solvers[n], samples))
        rows.append({"model": name, "steps": n, "fits": fits})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    header = ["model", "steps", "samples taken", "evaluations", "images of the teacher"]
    lines = []
    for row in rows:
        fits = row["fits"]
        taken = sorted({fit["num_teacher_samples"] for fit in fits})
        costs = [f"{mean(fit[name] for fit in fits):.0f}" for name in ("evaluations", "teacher_images")]
        distances = [spread([fit[name] for fit in fits]) for name in ("mean", "median")]
        lines.append([row["model"], str(row["steps"]), " to ".join(map(str, taken)), *costs, *distances])
    return markdown_table([*header, "mean distance (fits)", "median distance (fits)"], lines)


def spread(values: list[float]) -> str:
    texts = [f"{value:.5f}" for value in sorted(values)]
    return texts[0] if len(texts) == 1 else f"{mean(values):.5f} ({texts[0]} to {texts[-1]})"


def draw(rows: list[dict[str, Any]]) -> Any:
    picture, axes = figure(1, 2, size=(10, 3.8))
    for axis, name in zip(axes[0], ("mean", "median")):
        for i, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
            own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["steps"])
            steps = [row["steps"] for row in own]
            values = [[fit[name] for fit in row["fits"]] for row in own]
            axis.plot(steps, list(map(mean, values)), "o-", color=f"C{i}", label=model)
            axis.vlines(steps, list(map(min, values)), list(map(max, values)), color=f"C{i}")
        axis.set(yscale="log", xlabel="steps", ylabel=f"{name} squared distance")
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend(fontsize=8)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--steps", type=int, nargs="+", choices=list(NUM_FITS), default=list(NUM_FITS))
    args = parser.parse_args()
    rows = [row for model in tqdm(args.models, desc="Models") for row in rows_of(model, sorted(args.steps))]
    write(__file__, rows, table(rows), draw(rows))


if __name__ == "__main__":
    main()
