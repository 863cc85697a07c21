"""Distance and Frechet distance at 4, 6 and 8 evaluations: GS by Gauss-Newton and by Adam, and GAS.

    python examples/benchmarks/gas_quality.py

Gauss-Newton's solvers are those of distillation_quality.py, which learn from fewer samples than Adam's. The Frechet distance is
between features of the classifier beside the teacher, of samples and of the 1797 real digits. Solvers are kept in
`.gas_quality/` beside this file: a second run only measures, and an interrupted one goes on. Writes gas_quality.json, .md
and .png; about 30 minutes on a CPU core.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from distillation_quality import distil
from sklearn.datasets import load_digits
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, GeneralizedSolver
from diffusers_gas.distillation.discriminator import R3GANDiscriminator
from diffusers_gas.distillation.gradient_descent import Adversary, GradientDescent, Recipe
from diffusers_gas.distillation.losses import Loss
from diffusers_gas.distillation.teacher import (
    EVALUATION_SEED,
    TRAINING_SEED,
    SampleInputs,
    TeacherCache,
    TeacherSamples,
)
from diffusers_gas.evaluation.classifier import SmallClassifier
from diffusers_gas.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance
from diffusers_gas.oracle import sample_latents


TEACHER = Path(__file__).resolve().parents[1] / "teachers" / "digits"
FOLDER = Path(__file__).with_name(".gas_quality")
STEP_COUNTS = (4, 6, 8)
NUM_TEACHER_SAMPLES, NUM_JUDGED = 1400, 2048
PUBLISHED_STEPS, FURTHER_STEPS = 1000, 400
# A discriminator that starts from nothing learns too slowly at the published 1e-5, which is for a pretrained one.
DISCRIMINATOR_WIDTH, DISCRIMINATOR_LEARNING_RATE = 64, 1e-4
BATCH_SIZE = 128

Fit = Callable[[DDPMPipeline, int, TeacherSamples], GeneralizedSolver]


def gauss_newton(pipe: DDPMPipeline, n: int, training: TeacherSamples) -> GeneralizedSolver:
    """Of distillation_quality.py, which is run unless it has been."""
    return GASScheduler.from_pretrained(distil("digits") / "scheduler").solvers[n]


def adam(pipe: DDPMPipeline, n: int, training: TeacherSamples) -> GeneralizedSolver:
    published = GASScheduler.from_config(pipe.scheduler.config, solver_order=3, lower_order_final=False)
    return descend(pipe, published.theory_solver(n), training, PUBLISHED_STEPS)


def gauss_newton_then_adam(pipe: DDPMPipeline, n: int, training: TeacherSamples) -> GeneralizedSolver:
    return descend(pipe, stored(pipe, "GS, Gauss-Newton").solvers[n], training, FURTHER_STEPS)


def gas(pipe: DDPMPipeline, n: int, training: TeacherSamples) -> GeneralizedSolver:
    set_seed(0)
    discriminator = R3GANDiscriminator.for_samples(tuple(training.final.shape[1:]), width=DISCRIMINATOR_WIDTH)
    adversary = Adversary(discriminator, learning_rate=DISCRIMINATOR_LEARNING_RATE)
    return descend(pipe, stored(pipe, "GS, Gauss-Newton").solvers[n], training, FURTHER_STEPS, adversary)


METHODS: dict[str, Fit] = {
    f"GS, Adam as published, {PUBLISHED_STEPS} steps": adam,
    "GS, Gauss-Newton": gauss_newton,
    "GS, Gauss-Newton, then Adam": gauss_newton_then_adam,
    "GAS, from Gauss-Newton": gas,
}


def descend(
    pipe: DDPMPipeline,
    start: GeneralizedSolver,
    training: TeacherSamples,
    steps: int,
    adversary: Adversary | None = None,
) -> GeneralizedSolver:
    trainer = GradientDescent(
        pipe,
        start,
        training,
        loss=Loss("l1"),
        recipe=Recipe(max_train_steps=steps),
        accelerator=Accelerator(cpu=True),
        adversary=adversary,
        failure_folder=FOLDER,
    )
    label = "Adam" if adversary is None else "GAS"
    for _ in tqdm(range(steps), desc=f"{start.num_inference_steps} steps, {label}", unit="step"):
        trainer.step()
    return trainer.averaged_solver()


def stored(pipe: DDPMPipeline, method: str) -> GASScheduler:
    """The scheduler with the solvers of a method so far."""
    folder = FOLDER / method.replace(" ", "_").replace(",", "")
    exists = (folder / GASScheduler.config_name).exists()
    return GASScheduler.from_pretrained(folder) if exists else GASScheduler.from_config(pipe.scheduler.config)


def fit(pipe: DDPMPipeline, training: TeacherSamples) -> None:
    for method, function in METHODS.items():
        for n in STEP_COUNTS:
            scheduler = stored(pipe, method)
            if n not in scheduler.solvers:
                scheduler.add_solver(function(pipe, n, training))
                scheduler.save_pretrained(FOLDER / method.replace(" ", "_").replace(",", ""))


def judge(
    pipe: DDPMPipeline, classifier: SmallClassifier, schedulers: dict[str, SchedulerMixin], judged: TeacherSamples
) -> list[dict]:
    features = partial(gaussian, classifier)
    real = features(torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1)
    teacher = features(judged.final)
    rows = [{"method": "teacher", "steps": 50, "distance": 0.0, "frechet": frechet_distance(teacher, real)}]
    for n in STEP_COUNTS:
        for method, scheduler in schedulers.items():
            batches = judged.batches(BATCH_SIZE)
            final = torch.cat(
                [sample_latents(pipe, scheduler, n, **batch.inputs.pipeline_arguments(pipe))[1] for batch in batches]
            )
            row = {"method": method, "steps": n, "distance": (final - judged.final).square().mean().item()}
            rows.append({**row, "frechet": frechet_distance(features(final), real)})
    return rows


@torch.no_grad()
def gaussian(classifier: SmallClassifier, samples: torch.Tensor) -> Gaussian:
    """Of the classifier's features of samples in [-1, 1]."""
    return FeatureStatistics.from_features(classifier.features((samples / 2 + 0.5).clamp(0, 1))).gaussian()


def table(rows: list[dict]) -> str:
    lines = ["| steps | method | distance to the teacher | Frechet distance to real digits |", "| --- " * 4 + "|"]
    lines += [f"| {row['steps']} | {row['method']} | {row['distance']:.5f} | {row['frechet']:.2f} |" for row in rows]
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, quantity, label in zip(
        axes, ("distance", "frechet"), ("mean squared distance to the teacher", "Frechet distance to real digits")
    ):
        for method in dict.fromkeys(row["method"] for row in rows[1:]):
            values = [row[quantity] for row in rows if row["method"] == method]
            axis.plot(STEP_COUNTS, values, marker="o", label=method)
        axis.set(yscale="log", xticks=STEP_COUNTS, xlabel="network evaluations", ylabel=label)
        axis.grid(alpha=0.3, which="both")
    axes[1].axhline(rows[0]["frechet"], color="grey", linewidth=0.8, label="teacher, 50 evaluations")
    axes[1].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    pipe = DDPMPipeline.from_pretrained(TEACHER)
    pipe.set_progress_bar_config(disable=True)
    teacher = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", algorithm_type="dpmsolver++", solver_order=2
    )
    cache = TeacherCache(FOLDER.with_name(".teacher_samples"), "digits", teacher, 50)
    training, judged = (
        cache.collect(pipe, SampleInputs.create(seed, count), BATCH_SIZE, "Teacher")
        for seed, count in ((TRAINING_SEED, NUM_TEACHER_SAMPLES), (EVALUATION_SEED, NUM_JUDGED))
    )
    fit(pipe, training)
    schedulers = {
        "UniPC, leading": UniPCMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading"),
        **{method: stored(pipe, method) for method in METHODS},
    }
    rows = judge(pipe, SmallClassifier.from_pretrained(TEACHER / "classifier"), schedulers, judged)
    print(f"\n{len(judged)} held-out samples:\n\n{table(rows)}")
    path = Path(__file__).with_suffix("")
    path.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(rows) + "\n")
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
