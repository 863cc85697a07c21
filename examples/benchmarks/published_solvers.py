"""What solvers that others have published are worth on a model for which they were not found.

    python examples/benchmarks/published_solvers.py

The mean squared distance to the teacher, from the same noise, of each published solver for the noise schedule of a shipped model,
relative to the closest of Diffusers' schedulers. A model that is measured is not measured again. The results are
published_solvers.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT. The script takes some minutes
on a CPU core.
"""

from typing import Any

from report import figure, load_teacher, markdown_table, measure_each, write

from diffusers_gas import GASScheduler
from diffusers_gas.comparison import compare, few_step_rivals
from diffusers_gas.pipelines.inputs import EVALUATION_SEED


# The noise schedules of DiT and PixArt, of Stable Diffusion, and of Stable Diffusion 3.
SOLVERS = {
    "digits": ("neuralsolver-dit",),
    "text-to-digits": ("ays-sd15", "ays-sdxl"),
    "flow-digits": ("neuralsolver-sit", "neuralsolver-flowdcn"),
}
STEP_COUNTS = (5, 6, 8, 10)
NUM_SAMPLES, BATCH_SIZE = 128, 64


def measure(name: str) -> list[dict[str, Any]]:
    teacher = load_teacher(name)
    config = teacher.pipe.scheduler.config
    published = {solver: GASScheduler.from_published(solver, config, STEP_COUNTS) for solver in SOLVERS[name]}
    samples = teacher.samples(2 * EVALUATION_SEED, NUM_SAMPLES, BATCH_SIZE)
    rows = compare(teacher.pipe, published | few_step_rivals(teacher.pipe), STEP_COUNTS, samples, BATCH_SIZE)
    found = []
    for n in STEP_COUNTS:
        distances = {row.scheduler: row.distance for row in rows if row.num_inference_steps == n}
        best = min(distances.keys() - published.keys(), key=distances.__getitem__)
        found += [
            {"steps": n, "solver": solver, "distance": distances[solver], "best": best, "of best": distances[best]}
            for solver in published
        ]
    return found


def relative(row: dict[str, Any]) -> float:
    return row["distance"] / row["of best"]


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = []
    for name, rows in results.items():
        for solver in dict.fromkeys(row["solver"] for row in rows):
            cells = [f"{relative(row):.2f}" for row in rows if row["solver"] == solver]
            lines.append([f"`{solver}` on `{name}`", *cells])
    return markdown_table(["published solver and model", *map(str, STEP_COUNTS)], lines)


def draw(results: dict[str, list[dict[str, Any]]]) -> Any:
    picture, ((axis,),) = figure()
    for name, rows in results.items():
        for solver in dict.fromkeys(row["solver"] for row in rows):
            values = [relative(row) for row in rows if row["solver"] == solver]
            axis.plot(STEP_COUNTS, values, marker="o", label=f"{solver} on {name}")
    axis.axhline(1, color="black", linewidth=1)
    axis.set(xlabel="evaluations", ylabel="distance relative to the best of Diffusers", yscale="log")
    axis.legend(fontsize=8)
    return picture


def main() -> None:
    results = measure_each(__file__, SOLVERS, measure)
    write(__file__, results, table(results), draw(results))


if __name__ == "__main__":
    main()
