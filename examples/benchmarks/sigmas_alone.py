"""What is lost if a tool takes only the noise levels of a learned solver, and steps with a solver of its own.

    python examples/benchmarks/sigmas_alone.py

The mean squared distance to the teacher, from the same noise, of the learned solver, of DPM-Solver++ 2M and Euler (DDIM) on its
noise levels, and of both on evenly spaced times. No fit has used the samples. The solvers are those in examples/solvers. The
results are sigmas_alone.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT. The script takes a few
minutes on a CPU core.
"""

from typing import Any

from report import figure, load_teacher, markdown_table, write

from diffusers_gas import GASScheduler, GeneralizedSolver
from diffusers_gas.comparison import errors_to_teacher
from diffusers_gas.pipelines.inputs import EVALUATION_SEED


MODELS = ("digits", "text-to-digits", "flow-digits")
STEP_COUNTS = (4, 6, 8)
NUM_SAMPLES, BATCH_SIZE = 128, 64
THEORY = {"DPM-Solver++ 2M": 2, "Euler": 1}
GS = "GS"


def schedulers(
    learned: GASScheduler, num_inference_steps: int, guidance_scale: float | None
) -> dict[str, GASScheduler]:
    """The learned solver, and the theory's solvers on its times at a guidance scale and on evenly spaced ones."""
    solver, found = learned.solvers[num_inference_steps].at(guidance_scale), {GS: learned}
    for name, order in THEORY.items():
        evenly = GASScheduler.from_config(dict(learned.config), solver_order=order, t_start=solver.t_start)
        on_its_times = GASScheduler.from_config(dict(learned.config))
        on_its_times.add_solver(
            GeneralizedSolver(
                num_inference_steps,
                theory_order=order,
                t_start=solver.t_start,
                t_end=solver.t_end,
                times=solver.times().detach(),
            )
        )
        found |= {f"{name}, its noise levels": on_its_times, f"{name}, even times": evenly}
    return found


def measure(name: str) -> list[dict[str, Any]]:
    teacher = load_teacher(name)
    learned = GASScheduler.from_pretrained(teacher.path.parents[1] / "solvers" / name / "gs")
    samples = teacher.samples(2 * EVALUATION_SEED, NUM_SAMPLES, BATCH_SIZE)
    return [
        {
            "model": name,
            "steps": n,
            "scheduler": scheduler_name,
            "distance": errors_to_teacher(teacher.pipe, scheduler, n, samples, BATCH_SIZE)[0],
        }
        for n in STEP_COUNTS
        for scheduler_name, scheduler in schedulers(learned, n, samples.inputs.value("guidance_scale")).items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Distances; in parentheses, as multiples of the learned solver's."""
    found = {(row["model"], row["steps"], row["scheduler"]): row["distance"] for row in rows}
    names = list(dict.fromkeys(row["scheduler"] for row in rows))
    lines = []
    for model, n in dict.fromkeys((row["model"], row["steps"]) for row in rows):
        best = found[model, n, GS]
        cells = [f"{found[model, n, name]:.3g} ({found[model, n, name] / best:.2g})" for name in names]
        lines.append([f"`{model}`", str(n), *cells])
    return markdown_table(["model", "evaluations", *names], lines)


def draw(rows: list[dict[str, Any]]) -> Any:
    models = list(dict.fromkeys(row["model"] for row in rows))
    picture, axes = figure(1, len(models), size=(3.2 * len(models), 3.8))
    for axis, model in zip(axes[0], models):
        for name in dict.fromkeys(row["scheduler"] for row in rows):
            points = [row for row in rows if (row["model"], row["scheduler"]) == (model, name)]
            style = {"color": "C0"} if name == GS else {"color": "C1" if "its" in name else "grey"}
            axis.plot(
                [row["steps"] for row in points],
                [row["distance"] for row in points],
                marker="o",
                linestyle=":" if name.startswith("Euler") else "-",
                label=name,
                **style,
            )
        axis.set(title=model, xlabel="evaluations", yscale="log", xticks=list(STEP_COUNTS))
    axes[0, 0].set_ylabel("mean squared distance to the teacher")
    picture.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return picture


def main() -> None:
    rows = [row for name in MODELS for row in measure(name)]
    write(__file__, rows, table(rows), draw(rows))


if __name__ == "__main__":
    main()
