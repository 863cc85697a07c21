"""What adversarial training adds: GS, GS trained further without a discriminator, and with one (GAS).

    python examples/benchmarks/adversarial.py

The model is text-to-emoji. The solvers of a seed start from the same fit and share their training samples. Their Frechet distances,
in the features of the model's classifier, are compared on samples that no training has used. Settings that the paper leaves open are
varied one at a time, for the first seed and the fewest evaluations. How much a solver could gain at all shows one that Gauss-Newton
fits to the very features that the Frechet distance compares. Trainings are kept in `.fits/`, so that an interrupted run can be
resumed.
"""

from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from diffusers import SchedulerMixin
from fits import FITS, further_arguments, gas, gauss_newton
from quality import PAGE_MODEL, Judge
from report import figure, load_teacher, markdown_table, write
from torch import Tensor

from diffusers_gas import GASScheduler
from diffusers_gas.distillation.gauss_newton import Problem, distill_gauss_newton
from diffusers_gas.least_squares import Loss
from diffusers_gas.papers.evaluation.measurement import Sampler
from diffusers_gas.pipelines.decoding import StateDecoder
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, TRAINING_SEED


STEPS, NUM_SEEDS = (3, 4, 5), 3
GS, CONTROL, GAS, FEATURES = "GS", "without a discriminator", "GAS", "GS, fitted to the features"
COLOURS = {GS: "C0", CONTROL: "grey", GAS: "C3"}
NO_WARM_UP = {"discriminator_warmup_steps": 0}
# Changes of the arguments of GAS.
VARIANTS: dict[str, dict[str, Any]] = {
    "no warm-up": {**NO_WARM_UP, "max_train_steps": 30},
    "no warm-up, adversarial weight 1, 100 steps": {**NO_WARM_UP, "max_train_steps": 100, "adversarial_weight": 1},
    "the discriminator sees latents": {"discriminator_features": "states", "discriminator_size": None},
    "the discriminator sees 16 x 16 pixels": {"discriminator_size": 16},
    "a discriminator of twice the width": {"discriminator_width": 64},
    "a tenth of the discriminator's learning rate": {"discriminator_learning_rate": 1e-4},
    "a warm-up of 300 steps": {"discriminator_warmup_steps": 300, "max_train_steps": 330},
    "200 steps of the solver, not 30": {"max_train_steps": 260},
}
# For the fit to features.
NUM_TRAINING, NUM_HELD_OUT = 256, 32


def measure() -> dict[str, Any]:
    """Rows of all solvers and variants."""
    judge, fewest = Judge(load_teacher(PAGE_MODEL)), min(STEPS)
    rows = [judge_row(judge, "teacher", judge.many_steps.num_inference_steps, judge.many_steps)]
    for n, seed in product(STEPS, range(NUM_SEEDS)):
        folders = {
            GS: gauss_newton(PAGE_MODEL, [n], seed),
            CONTROL: gas(PAGE_MODEL, [n], seed, discriminator=False),
            GAS: gas(PAGE_MODEL, [n], seed),
        }
        rows += [judge_row(judge, method, n, solver_in(path), seed) for method, path in folders.items()]
    scheduler = fitted_to_features(judge, solver_in(gauss_newton(PAGE_MODEL, [fewest])), fewest)
    rows.append(judge_row(judge, FEATURES, fewest, scheduler))
    variants = [
        judge_row(judge, name, fewest, solver_in(gas(PAGE_MODEL, [fewest], changes=changes)))
        for name, changes in VARIANTS.items()
    ]
    return {
        "model": PAGE_MODEL,
        "num_samples": FITS[PAGE_MODEL].num_judged,
        "settings": " ".join(map(str, further_arguments(PAGE_MODEL))),
        "rows": rows,
        "variants": variants,
    }


def solver_in(folder: Path) -> GASScheduler:
    return GASScheduler.from_pretrained(folder / "scheduler")


def judge_row(judge: Judge, method: str, n: int, scheduler: SchedulerMixin | Sampler, seed: int = 0) -> dict[str, Any]:
    sampler = scheduler if isinstance(scheduler, Sampler) else Sampler(method, scheduler, n)
    return {"seed": seed, **asdict(judge.judge(sampler, method, n))}


def fitted_to_features(judge: Judge, start: GASScheduler, n: int) -> GASScheduler:
    """Gauss-Newton from GS's solver on the distance between features of the classifier."""
    teacher = judge.teacher
    training, held_out = teacher.samples(TRAINING_SEED, NUM_TRAINING), teacher.samples(EVALUATION_SEED, NUM_HELD_OUT)
    decode = StateDecoder(teacher.pipe, **training.inputs[:1].pipeline_arguments(teacher.pipe))

    def features(states: Tensor) -> Tensor:
        return judge.classifier.features((decode(states) / 2 + 0.5).clamp(0, 1))

    problem = Problem(teacher.pipe, Loss(features=features))
    scheduler = GASScheduler.from_config(teacher.pipe.scheduler.config)
    scheduler.add_solver(distill_gauss_newton(problem, start.solvers[n], training, held_out).solver)
    return scheduler


def spread(values: list[float], digits: int) -> str:
    """The mean of the seeds, and their standard deviation where there are several."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def gains(results: dict[str, Any], method: str, reference: str, n: int) -> list[float]:
    """By how much the Frechet distance of a method is below that of another, for each seed."""
    found = {(row["method"], row["seed"]): row["frechet"] for row in results["rows"] if row["steps"] == n}
    seeds = [seed for name, seed in found if name == method]
    return [found[reference, seed] - found[method, seed] for seed in seeds]


def table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    header = ["evaluations", "method", "Frechet distance", "less than GS", "less than without a discriminator"]
    header += ["distance to the teacher", "named as the prompt"]
    lines = []
    for n, method in dict.fromkeys((row["steps"], row["method"]) for row in rows):
        own = [row for row in rows if (row["steps"], row["method"]) == (n, method)]
        less = [spread(gains(results, method, other, n), 2) if method == GAS else "" for other in (GS, CONTROL)]
        values = [spread([row[key] for row in own], digits) for key, digits in (("frechet", 2), ("distance", 4))]
        named = f"{mean(row['named'] for row in own):.1%}"
        lines.append([str(n), method, values[0], *less, values[1], named])
    (first,) = (row for row in rows if (row["method"], row["steps"], row["seed"]) == (GAS, min(STEPS), 0))
    varied = [{**first, "method": "as above"}, *results["variants"]]
    variants = [[row["method"], f"{row['frechet']:.2f}", f"{row['distance']:.4f}"] for row in varied]
    return "\n\n".join(
        [
            f"**{results['model']}**, {results['num_samples']} samples that no training has used. Means of {NUM_SEEDS} seeds and "
            f"their standard deviations, where one is given. Settings of GAS: `{results['settings']}`.",
            markdown_table(header, sorted(lines, key=lambda line: int(line[0]) % 50)),
            f"GAS at {min(STEPS)} evaluations with one setting changed, first seed:",
            markdown_table(["setting", "Frechet distance", "distance to the teacher"], variants),
        ]
    )


def draw(results: dict[str, Any]) -> Any:
    plot, axes = figure()
    axis = axes[0, 0]
    for i, (method, colour) in enumerate(COLOURS.items()):
        own = [row for row in results["rows"] if row["method"] == method]
        places = [row["steps"] + 0.12 * (i - 1) for row in own]
        axis.plot(places, [row["frechet"] for row in own], "o", color=colour, label=method)
    axis.axhline(results["rows"][0]["frechet"], color="grey", linewidth=0.8, label="teacher")
    axis.set(xticks=STEPS, xlabel="network evaluations", ylabel="Frechet distance to the teacher", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return plot


def main() -> None:
    results = measure()
    write(__file__, results, table(results), draw(results))


if __name__ == "__main__":
    main()
