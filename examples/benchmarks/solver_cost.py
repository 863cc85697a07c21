"""What a solver costs and how good it is, on every shipped model: fits by default settings, and to fewer samples.

    python examples/benchmarks/solver_cost.py
    python examples/benchmarks/solver_cost.py --models digits --steps 4

Every fit is repeated with other samples to learn from. The solvers are judged on samples that no fit has used, by the mean and by
the median of the squared distances to the teacher. A few samples that end at another digit than the teacher's dominate the mean.
Beside them are judged the solvers in examples/solvers, on the same samples. The cost counts all network evaluations: of the fit,
of the choice of its start, and of the teacher's samples, those held out included. Fits are kept in `.solver_cost/`, so that an
interrupted run can be resumed. The results are solver_cost.json, .md and .png beside this file, or in the folder
DIFFUSERS_GAS_BENCHMARK_OUTPUT. The script takes two hours on a CPU core.
"""

import argparse
import json
from collections.abc import Mapping
from statistics import mean
from typing import Any

from report import FOLDER, Teacher, figure, load_teacher, markdown_table, output_folder, write
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, GeneralizedSolver
from diffusers_gas.distillation.distill import NUM_HELD_OUT, distill_solver
from diffusers_gas.distillation.gauss_newton import Problem
from diffusers_gas.pipelines.driving import scheduler_config
from diffusers_gas.pipelines.inputs import EVALUATION_SEED
from diffusers_gas.pipelines.teacher import LAZY_SHARD_SIZE, LazyTeacherSamples, TeacherCache, TeacherSamples
from diffusers_gas.utils.files import write_text


MODELS = ("digits", "text-to-digits", "flow-digits", "moving-digits")
STEP_COUNTS, NUM_JUDGED = (4, 6, 8, 10), 512
# Limits of the number of samples. The first is that of the training script; the others are for the fewest steps only.
LIMITS = (1024, 8, 32)
# First seeds of the samples to learn from, and by how much the seeds of held-out samples differ between repetitions.
SEEDS, HELD_OUT_DIFFERENCE = (0, 10_000, 20_000), 1000
JUDGED_SEED = 2 * EVALUATION_SEED
SHIPPED = "shipped"


def judged(teacher: Teacher, solver: GeneralizedSolver, samples: TeacherSamples) -> dict[str, float]:
    _, distances = Problem(teacher.pipe).losses_of_samples(solver, samples)
    return {"mean": distances.mean().item(), "median": distances.median().item()}


def fit(teacher: Teacher, n: int, limit: int, repetition: int) -> GeneralizedSolver:
    cache = TeacherCache(
        output_folder() / ".teacher_samples",
        teacher.name,
        teacher.scheduler,
        teacher.num_inference_steps,
        LAZY_SHARD_SIZE,
    )
    training = LazyTeacherSamples(cache, teacher.pipe, teacher.inputs(SEEDS[repetition], limit), 64, "Teacher")
    held_out = teacher.inputs(EVALUATION_SEED + HELD_OUT_DIFFERENCE * repetition, NUM_HELD_OUT)
    scheduler = GASScheduler.from_config(scheduler_config(teacher.pipe))
    provenance = {"teacher_num_inference_steps": teacher.num_inference_steps}
    samples = cache.collect(teacher.pipe, held_out, 64, "Held out")
    return distill_solver(teacher.pipe, scheduler, n, training, samples, provenance=provenance).solver


def measure(teacher: Teacher, n: int, limit: int) -> list[dict[str, Any]]:
    """The cost and the distances of the repeated fits; finished ones are read from files."""
    records = []
    for repetition in range(len(SEEDS)):
        path = output_folder() / ".solver_cost" / f"{teacher.name}-{n}-{limit}-{repetition}.json"
        if not path.exists():
            solver = fit(teacher, n, limit, repetition)
            names = ("evaluations", "teacher_images", "num_teacher_samples", "seconds")
            cost = {name: solver.provenance[name] for name in names}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({**cost, **judged(teacher, solver, teacher.samples(JUDGED_SEED, NUM_JUDGED))}))
        records.append(json.loads(path.read_text(encoding="utf-8")))
    return records


def rows_of(name: str, step_counts: list[int]) -> list[dict[str, Any]]:
    teacher = load_teacher(name)
    path = FOLDER.parent / "solvers" / name / "gs"
    shipped = GASScheduler.from_pretrained(path).solvers
    rows = []
    for n in step_counts:
        if n in shipped:
            fits: dict[str, Any] = {SHIPPED: [judged(teacher, shipped[n], teacher.samples(JUDGED_SEED, NUM_JUDGED))]}
            for limit in LIMITS if n == 4 else LIMITS[:1]:
                fits[str(limit)] = measure(teacher, n, limit)
            rows.append({"model": name, "steps": n, "fits": fits})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    header = ["model", "steps", "samples", "evaluations", "images of the teacher"]
    header += ["mean distance (fits)", "median distance (fits)"]
    return markdown_table(header, [line for row in rows for line in lines(row)])


def lines(row: Mapping[str, Any]) -> list[list[str]]:
    found = []
    for limit, records in row["fits"].items():
        cost = ["-", "-", "-"]
        if limit != SHIPPED:
            samples = f"{max(record['num_teacher_samples'] for record in records)}"
            cost = [samples + (" (as needed)" if limit == str(LIMITS[0]) else " (limit)")]
            cost += [f"{mean(record[name] for record in records):.0f}" for name in ("evaluations", "teacher_images")]
        distances = [spread([record[name] for record in records]) for name in ("mean", "median")]
        found.append(
            [row["model"], str(row["steps"]), *(cost if limit != SHIPPED else [SHIPPED, *cost[1:]]), *distances]
        )
    return found


def spread(values: list[float]) -> str:
    texts = [f"{value:.5f}" for value in sorted(values)]
    return texts[0] if len(texts) == 1 else f"{mean(values):.5f} ({texts[0]} to {texts[-1]})"


def draw(rows: list[dict[str, Any]]) -> Any:
    picture, axes = figure(1, 2, size=(10, 3.8))
    for axis, name in zip(axes[0], ("mean", "median")):
        for i, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
            own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["steps"])
            steps = [row["steps"] for row in own]
            axis.plot(steps, [row["fits"][SHIPPED][0][name] for row in own], ":", color=f"C{i}")
            values = [[record[name] for record in row["fits"][str(LIMITS[0])]] for row in own]
            axis.plot(steps, list(map(mean, values)), "o-", color=f"C{i}", label=model)
            axis.vlines(steps, list(map(min, values)), list(map(max, values)), color=f"C{i}")
        axis.set(yscale="log", xlabel="steps", ylabel=f"{name} squared distance; dotted: shipped")
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].legend(fontsize=8)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--steps", type=int, nargs="+", default=STEP_COUNTS)
    args = parser.parse_args()
    rows = [row for model in tqdm(args.models, desc="Models") for row in rows_of(model, sorted(args.steps))]
    write(__file__, rows, table(rows), draw(rows))


if __name__ == "__main__":
    main()
