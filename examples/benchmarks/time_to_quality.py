"""Time to quality at 4 steps: Gauss-Newton and the published recipe (Adam), each from the published start and from ours.

    python examples/benchmarks/time_to_quality.py

The four fits use the same samples of the shipped teacher and the same held-out samples. Each runs in its own process. The clock
includes the choice of the initial solver. Adam is evaluated every `judged_every` steps; the clock is stopped meanwhile, and these
network evaluations are not counted. Gauss-Newton evaluates each of its iterations to keep the best one and to stop. This is part
of the method, so its time and evaluations count. The comparison thus favors Adam. Peak memory is what a fit adds to a process with
the pipeline and the samples, without the evaluation.

The results are time_to_quality.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT. The script
takes about ten minutes on two CPU cores. An interrupted run keeps its finished fits in `.time_to_quality/` for the next run.
"""

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from report import (
    DEVICE,
    NUM_START_CANDIDATES,
    PeakMemory,
    figure,
    in_own_process,
    load_teacher,
    markdown_table,
    output_folder,
    write,
)
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, GeneralizedSolver
from diffusers_gas.distillation.gauss_newton import (
    NUM_START_SAMPLES,
    Problem,
    best_initial_solver,
    distill_gauss_newton,
)
from diffusers_gas.distillation.gradient_descent import GradientDescent, Recipe
from diffusers_gas.distillation.losses import Loss
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, TRAINING_SEED
from diffusers_gas.utils.files import replacing


@dataclass(frozen=True)
class Setting:
    """The settings of all fits."""

    teacher: str = "digits"
    num_inference_steps: int = 4
    num_teacher_samples: int = 1400
    num_validation_samples: int = 512
    adam_steps: int = 1000
    judged_every: int = 50
    adam_batch_size: int = Recipe.train_batch_size
    gauss_newton_batch_size: int = 128
    max_iterations: int = 60


SETTING = Setting()
METHODS, STARTS = ("Adam", "Gauss-Newton"), ("published start", "our start")


class Fit:
    """One fit: its samples, and its held-out distances over time and network evaluations."""

    def __init__(self, setting: Setting, batch_size: int):
        teacher = load_teacher(setting.teacher, DEVICE)
        self.setting, self.pipe, self.batch_size = setting, teacher.pipe, batch_size
        self.training = teacher.samples(TRAINING_SEED, setting.num_teacher_samples)
        self.validation = teacher.samples(EVALUATION_SEED, setting.num_validation_samples)
        self.problem = Problem(self.pipe, Loss(), batch_size)
        self.points: list[dict[str, float]] = []
        self.memory = PeakMemory(DEVICE)
        self.evaluations, self.seconds, self._since = 0, 0.0, time.monotonic()

    def start(self, origin: str) -> GeneralizedSolver:
        """The initial solver."""
        n, config = self.setting.num_inference_steps, self.pipe.scheduler.config
        if origin == "published start":
            return GASScheduler.from_config(config, solver_order=3, lower_order_final=False).theory_solver(n)
        samples = self.training[:NUM_START_SAMPLES]
        self.evaluations = NUM_START_CANDIDATES * n * len(samples)
        return best_initial_solver(self.pipe, n, samples, batch_size=self.batch_size)

    def judge(self, solver: GeneralizedSolver, evaluations: int) -> None:
        """Adds a point while the clock is stopped."""
        self.seconds += time.monotonic() - self._since
        _, distance = self.problem.losses(solver, self.validation)
        self.add(self.seconds, evaluations, distance)
        self._since = time.monotonic()

    def add(self, seconds: float, evaluations: int, distance: float) -> None:
        evaluations += self.evaluations
        self.points.append({"seconds": seconds, "evaluations": evaluations, "distance": distance})


def adam(origin: str, setting: Setting) -> dict[str, Any]:
    fit = Fit(setting, setting.adam_batch_size)
    solver = fit.start(origin)
    trainer = GradientDescent(
        fit.pipe,
        solver,
        fit.training,
        loss=Loss("l1"),
        recipe=Recipe(max_train_steps=setting.adam_steps, train_batch_size=setting.adam_batch_size),
        accelerator=Accelerator(cpu=DEVICE == "cpu"),
        failure_folder=output_folder(),
    )
    fit.judge(solver, 0)
    for step in tqdm(range(1, setting.adam_steps + 1), desc=f"Adam, {origin}", unit="step"):
        trainer.step()
        if step % setting.judged_every == 0:
            fit.judge(trainer.averaged_solver(), trainer.evaluations)
    return {"points": fit.points, "peak_memory": fit.memory.rise(), "batch_size": fit.batch_size}


def gauss_newton(origin: str, setting: Setting) -> dict[str, Any]:
    fit = Fit(setting, setting.gauss_newton_batch_size)
    solver = fit.start(origin)
    fit.judge(solver, 0)
    before = fit.seconds
    limits = {"batch_size": fit.batch_size, "max_iterations": setting.max_iterations}
    result = distill_gauss_newton(fit.pipe, solver, fit.training, fit.validation, **limits)
    for iteration in result.history:
        fit.add(before + iteration.seconds, iteration.evaluations, iteration.validation_distance)
    return {"points": fit.points, "peak_memory": fit.memory.rise(), "batch_size": fit.batch_size}


def finished(name: str, setting: Setting, folder: Path) -> dict[str, Any]:
    """The result of a fit. It is read if an interrupted benchmark has kept it, and made otherwise."""
    path = folder / f"{name}.json"
    if path.exists():
        record = json.loads(path.read_text())
        if record["setting"] == asdict(setting):
            return record["fit"]
    method, origin = name.split(", ")
    fit = in_own_process(adam if method == "Adam" else gauss_newton, origin, setting)
    with replacing(path) as partial:
        partial.write_text(json.dumps({"setting": asdict(setting), "fit": fit}))
    return fit


def reached(fit: dict[str, Any], target: float) -> dict[str, float] | None:
    """The first point with at most this distance."""
    return next((point for point in fit["points"] if point["distance"] <= target), None)


def table(fits: dict[str, dict], target: float) -> str:
    published = reached(next(iter(fits.values())), target)
    rows = []
    for name, fit in fits.items():
        first, last = reached(fit, target), fit["points"][-1]
        there = ["-", "-", "-"]
        if first is not None:
            faster = f"{published['seconds'] / first['seconds']:.0f}"
            there = [f"{first['seconds']:.1f} s", faster, f"{first['evaluations'] / 1e3:.1f} k"]
        best = min(point["distance"] for point in fit["points"])
        spent = f"{last['seconds']:.0f} s, {last['evaluations'] / 1e3:.0f} k evaluations"
        memory = f"{fit['peak_memory'] / 2**20:.0f} MB ({fit['batch_size']})"
        rows.append([*name.split(", "), f"{best:.5f}", spent, *there, memory])
    header = ["method", "start", "best distance", "total", f"time to {target:.4f}", "times faster"]
    return markdown_table([*header, f"evaluations to {target:.4f}", "peak memory (batch)"], rows)


def draw(fits: dict[str, dict], target: float) -> Any:
    picture, axes = figure(1, 2, size=(10, 3.8), sharey=True)
    for axis, quantity, least in zip(axes[0], ("seconds", "evaluations"), (0.1, 100)):
        for (name, fit), style in zip(fits.items(), ("C0-", "C0--", "C1-", "C1--")):
            spent = [max(point[quantity], least) for point in fit["points"]]
            axis.plot(spent, [point["distance"] for point in fit["points"]], style, marker=".", label=name)
        axis.axhline(target, color="grey", linewidth=0.8, label="the published recipe at its end")
        axis.set(xscale="log", yscale="log", xlabel=quantity)
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("mean squared distance to the teacher")
    axes[0, 1].legend(fontsize=8)
    return picture


def main() -> None:
    setting, folder = SETTING, output_folder() / ".time_to_quality"
    teacher = load_teacher(setting.teacher, DEVICE)
    teacher.samples(TRAINING_SEED, setting.num_teacher_samples)
    teacher.samples(EVALUATION_SEED, setting.num_validation_samples)
    names = [f"{method}, {origin}" for method in METHODS for origin in STARTS]
    fits = {name: finished(name, setting, folder) for name in names}
    target = fits["Adam, published start"]["points"][-1]["distance"]
    results = {
        "target": target,
        "curves": {name: fit["points"] for name, fit in fits.items()},
        "peak_memory": {name: fit["peak_memory"] for name, fit in fits.items()},
        "setting": asdict(setting),
        "threads": torch.get_num_threads(),
        "device": DEVICE,
    }
    write(__file__, results, table(fits, target), draw(fits, target))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
