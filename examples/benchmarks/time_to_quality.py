"""Time to quality at 4 steps: Gauss-Newton against the published recipe (Adam), each from the published start and from ours.

    python examples/benchmarks/time_to_quality.py

All four fit a solver to the same samples of the shipped teacher and are judged on the same held-out ones; the clock stands
still while they are judged. Writes time_to_quality.json, .md and .png beside this file; about ten minutes on two CPU cores.
"""

import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, GeneralizedSolver
from diffusers_gas.distillation.gauss_newton import Problem, best_initial_solver, distill_gauss_newton
from diffusers_gas.distillation.gradient_descent import GradientDescent, Recipe
from diffusers_gas.distillation.losses import Loss
from diffusers_gas.distillation.teacher import (
    EVALUATION_SEED,
    TRAINING_SEED,
    SampleInputs,
    TeacherCache,
    TeacherSamples,
)


TEACHER = Path(__file__).resolve().parents[1] / "teachers" / "digits"
NUM_INFERENCE_STEPS = 4
NUM_TEACHER_SAMPLES, NUM_VALIDATION_SAMPLES = 1400, 512
ADAM_STEPS, JUDGED_EVERY = 1000, 50
BATCH_SIZE = 128


class Curve:
    """Held-out distances of a fit against its own time and network evaluations (per sample counted one by one)."""

    def __init__(self, pipe: DDPMPipeline, validation: TeacherSamples):
        self.problem, self.validation = Problem(pipe, Loss(), BATCH_SIZE), validation
        self.points: list[dict[str, float]] = []
        self.seconds, self._since = 0.0, time.monotonic()

    def judge(self, solver: GeneralizedSolver, evaluations: int) -> None:
        self.seconds += time.monotonic() - self._since
        _, distance = self.problem.losses(solver, self.validation)
        self.points.append({"seconds": self.seconds, "evaluations": evaluations, "distance": distance})
        self._since = time.monotonic()

    def time_to(self, distance: float) -> float:
        """When it first was at most this far; infinity if never."""
        return next((point["seconds"] for point in self.points if point["distance"] <= distance), float("inf"))


def published_solver(pipe: DDPMPipeline) -> GeneralizedSolver:
    published = GASScheduler.from_config(pipe.scheduler.config, solver_order=3, lower_order_final=False)
    return published.theory_solver(NUM_INFERENCE_STEPS)


def start(pipe: DDPMPipeline, training: TeacherSamples, ours: bool) -> tuple[GeneralizedSolver, int]:
    """A solver to start from, and the evaluations that the choice took."""
    if not ours:
        return published_solver(pipe), 0
    samples = training[:BATCH_SIZE]
    candidates = 6
    return (
        best_initial_solver(pipe, NUM_INFERENCE_STEPS, samples, batch_size=BATCH_SIZE),
        candidates * NUM_INFERENCE_STEPS * len(samples),
    )


def gauss_newton(pipe: DDPMPipeline, training: TeacherSamples, validation: TeacherSamples, ours: bool) -> Curve:
    curve = Curve(pipe, validation)
    solver, chosen = start(pipe, training, ours)
    curve.judge(solver, chosen)
    result = distill_gauss_newton(pipe, solver, training, validation, batch_size=BATCH_SIZE)
    # It judges every iteration itself, on its own clock: what that takes counts against it here.
    offset = curve.seconds
    for iteration in result.history:
        curve.points.append(
            {
                "seconds": offset + iteration.seconds,
                "evaluations": chosen + iteration.evaluations,
                "distance": iteration.validation_distance,
            }
        )
    return curve


def adam(pipe: DDPMPipeline, training: TeacherSamples, validation: TeacherSamples, ours: bool) -> Curve:
    curve = Curve(pipe, validation)
    solver, chosen = start(pipe, training, ours)
    trainer = GradientDescent(
        pipe,
        solver,
        training,
        loss=Loss("l1"),
        recipe=Recipe(max_train_steps=ADAM_STEPS),
        accelerator=Accelerator(cpu=True),
        failure_folder=Path.cwd(),
    )
    curve.judge(solver, chosen)
    for step in tqdm(range(1, ADAM_STEPS + 1), desc="Adam", unit="step"):
        trainer.step()
        if step % JUDGED_EVERY == 0:
            curve.judge(trainer.averaged_solver(), chosen + trainer.evaluations)
    return curve


def table(curves: dict[str, Curve], target: float) -> str:
    published = next(iter(curves.values())).time_to(target)
    lines = [
        f"| method | start | distance at the end | after | time to {target:.4f} | times faster |",
        "| --- " * 6 + "|",
    ]
    for name, curve in curves.items():
        reached = curve.time_to(target)
        best = min(point["distance"] for point in curve.points)
        last = curve.points[-1]
        method, origin = name.split(", ")
        speed = f"{published / reached:.0f}" if reached < float("inf") else "-"
        lines.append(
            f"| {method} | {origin} | {best:.5f} | {last['seconds']:.0f} s, {last['evaluations'] / 1e3:.0f} k evaluations "
            f"| {reached:.1f} s | {speed} |"
        )
    return "\n".join(lines)


def draw(curves: dict[str, Curve], target: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("C0-", "C0--", "C1--", "C1-")):
        seconds = [max(point["seconds"], 0.1) for point in curve.points]
        axis.plot(seconds, [point["distance"] for point in curve.points], style, marker=".", label=name)
    axis.axhline(target, color="grey", linewidth=0.8, label="the published recipe after 1000 steps")
    axis.set(xscale="log", yscale="log", xlabel="seconds", ylabel="mean squared distance to the teacher")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def main() -> None:
    pipe = DDPMPipeline.from_pretrained(TEACHER)
    pipe.set_progress_bar_config(disable=True)
    teacher = DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", algorithm_type="dpmsolver++", solver_order=2
    )
    path = Path(__file__).with_suffix("")
    cache = TeacherCache(path.parent / ".teacher_samples", "digits", teacher, 50)
    training, validation = (
        cache.collect(pipe, SampleInputs.create(seed, count), BATCH_SIZE, "Teacher")
        for seed, count in ((TRAINING_SEED, NUM_TEACHER_SAMPLES), (EVALUATION_SEED, NUM_VALIDATION_SAMPLES))
    )
    torch.manual_seed(0)
    curves = {
        "Adam, published start": adam(pipe, training, validation, ours=False),
        "Adam, our start": adam(pipe, training, validation, ours=True),
        "Gauss-Newton, published start": gauss_newton(pipe, training, validation, ours=False),
        "Gauss-Newton, our start": gauss_newton(pipe, training, validation, ours=True),
    }
    target = curves["Adam, published start"].points[-1]["distance"]
    print(f"\n{NUM_INFERENCE_STEPS} steps, {len(validation)} held-out samples:\n\n{table(curves, target)}")
    results = {"target": target, "curves": {name: curve.points for name, curve in curves.items()}}
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(curves, target) + "\n")
    draw(curves, target, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
