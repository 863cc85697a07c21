"""Time to quality at 4 steps: Gauss-Newton and the published recipe (Adam on L1 or L2), from the published start and from ours.

    python examples/benchmarks/time_to_quality.py

The fits use samples of the shipped teacher with the same seeds. Each runs in its own process. The clock includes the choice of the
initial solver. Every solver is judged on the same samples, which are used for nothing else: Adam's every `judged_every` steps, the
newest parameters and the averaged ones, of which the better count, and Gauss-Newton's new best ones. The clock is stopped
meanwhile, and these network evaluations are not counted. Those with which Gauss-Newton chooses its best solver are part of the
method, and count. The teacher's samples count for neither method: Adam has `num_teacher_samples` of them, Gauss-Newton takes the
first, as many as it needs, and its held-out ones. The published recipe is the better of L1 and L2. Two of its errors are to be
reached: that after its last step, and its least. Peak memory is what a fit adds to a process with the pipeline and the samples.

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
from diffusers_gas.distillation.distill import NUM_HELD_OUT
from diffusers_gas.distillation.gauss_newton import Problem, best_initial_solver, distill_gauss_newton
from diffusers_gas.distillation.gradient_descent import GradientDescent, Recipe
from diffusers_gas.least_squares import Loss, LossKind
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, TRAINING_SEED
from diffusers_gas.utils.files import write_text


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
    gauss_newton_batch_size: int = 64
    max_iterations: int | None = None


SETTING = Setting()
METHODS, STARTS = ("Adam l1", "Adam l2", "Gauss-Newton"), ("published start", "our start")


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
        problem = Problem(self.pipe, batch_size=self.batch_size)
        start = best_initial_solver(problem, n, self.training)
        self.evaluations = problem.evaluations
        return start

    def judge(self, evaluations: int, *solvers: GeneralizedSolver) -> None:
        """Adds a point, the best of some solvers, while the clock is stopped."""
        self.seconds += time.monotonic() - self._since
        distance = min(self.problem.losses(solver, self.validation)[1] for solver in solvers)
        evaluations += self.evaluations
        self.points.append({"seconds": self.seconds, "evaluations": evaluations, "distance": distance})
        self._since = time.monotonic()


def adam(kind: LossKind, origin: str, setting: Setting) -> dict[str, Any]:
    fit = Fit(setting, setting.adam_batch_size)
    solver = fit.start(origin)
    trainer = GradientDescent(
        fit.pipe,
        solver,
        fit.training,
        loss=Loss(kind),
        recipe=Recipe(max_train_steps=setting.adam_steps, train_batch_size=setting.adam_batch_size),
        accelerator=Accelerator(cpu=DEVICE == "cpu"),
    )
    fit.judge(0, solver)
    for step in tqdm(range(1, setting.adam_steps + 1), desc=f"Adam {kind}, {origin}", unit="step"):
        trainer.step()
        if step % setting.judged_every == 0:
            fit.judge(trainer.evaluations, trainer.solver, trainer.averaged_solver())
    return {"points": fit.points, "peak_memory": fit.memory.rise(), "batch_size": fit.batch_size}


def gauss_newton(origin: str, setting: Setting) -> dict[str, Any]:
    fit = Fit(setting, setting.gauss_newton_batch_size)
    solver = fit.start(origin)
    fit.judge(0, solver)
    problem = Problem(fit.pipe, batch_size=fit.batch_size)
    seeds = EVALUATION_SEED + setting.num_validation_samples
    held_out = load_teacher(setting.teacher, DEVICE).samples(seeds, min(NUM_HELD_OUT, setting.num_validation_samples))

    def on_improvement(solver: GeneralizedSolver) -> None:
        fit.judge(problem.evaluations, solver)

    distill_gauss_newton(
        problem,
        solver,
        fit.training,
        held_out,
        max_iterations=setting.max_iterations,
        on_improvement=on_improvement,
    )
    return {"points": fit.points, "peak_memory": fit.memory.rise(), "batch_size": fit.batch_size}


def finished(name: str, setting: Setting, folder: Path) -> dict[str, Any]:
    """The result of a fit. It is read if an interrupted benchmark has kept it, and made otherwise."""
    path = folder / f"{name}.json"
    if path.exists():
        record = json.loads(path.read_text())
        if record["setting"] == asdict(setting):
            return record["fit"]
    method, origin = name.split(", ")
    kind = method.removeprefix("Adam ")
    fit = (
        in_own_process(gauss_newton, origin, setting)
        if kind == method
        else in_own_process(adam, kind, origin, setting)
    )
    write_text(path, json.dumps({"setting": asdict(setting), "fit": fit}))
    return fit


def reached(fit: dict[str, Any], target: float) -> dict[str, float] | None:
    """The first point with at most this distance."""
    return next((point for point in fit["points"] if point["distance"] <= target), None)


def published(fits: dict[str, dict], origin: str = STARTS[0]) -> tuple[str, list[float]]:
    """The better of the losses for the published recipe from a start, and its errors after the last step and at best."""
    names = [f"{method}, {origin}" for method in METHODS[:-1]]
    distances = {name: [point["distance"] for point in fits[name]["points"]] for name in names}
    best = min(names, key=lambda name: min(distances[name]))
    return best, [distances[best][-1], min(distances[best])]


def gain(fits: dict[str, dict], name: str, baseline: str, target: float) -> dict[str, float] | None:
    """How many times less time and evaluations a fit takes to a distance than another one."""
    ours, theirs = reached(fits[name], target), reached(fits[baseline], target)
    if ours is None or theirs is None:
        return None
    return {quantity: theirs[quantity] / ours[quantity] for quantity in ("seconds", "evaluations")}


def table(fits: dict[str, dict], baseline: str, targets: list[float]) -> str:
    rows, targets = [], list(dict.fromkeys(targets))  # the recipe may be best at its end
    for name, fit in fits.items():
        last, there = fit["points"][-1], []
        for target in targets:
            first, times = reached(fit, target), gain(fits, name, baseline, target)
            if first is None or times is None:
                there += ["-", "-"]
                continue
            there += [f"{first['seconds']:.1f} s ({times['seconds']:.1f} x)"]
            there += [f"{first['evaluations'] / 1e3:.1f} k ({times['evaluations']:.1f} x)"]
        best = min(point["distance"] for point in fit["points"])
        spent = f"{last['seconds']:.0f} s, {last['evaluations'] / 1e3:.0f} k evaluations"
        memory = f"{fit['peak_memory'] / 2**20:.0f} MB ({fit['batch_size']})"
        rows.append([*name.split(", "), f"{best:.5f}", spent, *there, memory])
    header = ["method", "start", "best distance", "total"]
    for target in targets:
        header += [f"time to {target:.4f}", f"evaluations to {target:.4f}"]
    return markdown_table([*header, "peak memory (batch)"], rows)


def draw(fits: dict[str, dict], targets: list[float]) -> Any:
    picture, axes = figure(1, 2, size=(10, 3.8), sharey=True)
    for axis, quantity, least in zip(axes[0], ("seconds", "evaluations"), (0.1, 100)):
        for (name, fit), style in zip(fits.items(), ("C0-", "C0--", "C2-", "C2--", "C1-", "C1--")):
            spent = [max(point[quantity], least) for point in fit["points"]]
            axis.plot(spent, [point["distance"] for point in fit["points"]], style, marker=".", label=name)
        for target, label in zip(targets, ("at its end", "at its best")):
            axis.axhline(target, color="grey", linewidth=0.8, label=f"the published recipe {label}")
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
    baseline, targets = published(fits)
    ours, published_start = (f"{METHODS[-1]}, {origin}" for origin in reversed(STARTS))
    results = {
        "targets": targets,
        "baseline": baseline,
        "gains": {
            name: [gain(fits, name, baseline, target) for target in targets] for name in (ours, published_start)
        },
        "curves": {name: fit["points"] for name, fit in fits.items()},
        "peak_memory": {name: fit["peak_memory"] for name, fit in fits.items()},
        "setting": asdict(setting),
        "threads": torch.get_num_threads(),
        "device": DEVICE,
    }
    write(__file__, results, table(fits, baseline, targets), draw(fits, targets))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
