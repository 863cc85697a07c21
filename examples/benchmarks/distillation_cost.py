"""The cost of an iteration of Gauss-Newton, and of one gradient, for numbers of steps, samples and processes.

    python examples/benchmarks/distillation_cost.py

An iteration sets up a least-squares problem (the linearization) and then tries one or several steps. In theory, the
linearization for n steps takes n (n + 1) (n + 5) / 6 network evaluations per sample, and a trial takes n. The script counts the
rows that reach the network. It also measures the gradient of the same loss on the same samples by backpropagation through the
rollout ([`GradientDescent`]), with n evaluations forward, and the way back. A fit takes tens of iterations or thousands of
gradients (time_to_quality.py).

Every measurement runs in its own process with one thread, after a first sample has gone through the network. Memory is what the
measurement adds, with batches of `BATCH_SIZE`. Several processes are started by `torchrun`. The results are
distillation_cost.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT. The script takes four
minutes on a CPU core.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DDPMPipeline
from report import PeakMemory, figure, in_own_process, load_teacher, markdown_table, write
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, GeneralizedSolver
from diffusers_gas.distillation.gauss_newton import Problem
from diffusers_gas.distillation.gradient_descent import GradientDescent, Recipe
from diffusers_gas.least_squares import DAMPING_START, Loss
from diffusers_gas.pipelines.driving import num_evaluations
from diffusers_gas.pipelines.inputs import TRAINING_SEED
from diffusers_gas.pipelines.teacher import TeacherSamples


TEACHER = "digits"
STEP_COUNTS, SAMPLES_FOR_STEPS = (2, 4, 6, 8, 10), 64
SAMPLE_COUNTS, STEPS_FOR_SAMPLES = (8, 32, 256), 4
NUM_PROCESSES = 2
BATCH_SIZE = 64


@dataclass(frozen=True)
class Point:
    """A case to measure: method, number of steps, number of samples of all processes, number of processes."""

    method: str
    steps: int
    samples: int
    processes: int = 1
    batch_size: int = BATCH_SIZE


class Rows:
    """Counts network evaluations, which are the rows of all batches."""

    def __init__(self, network: nn.Module):
        self.count = 0
        network.register_forward_pre_hook(self._add)

    def _add(self, network: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.count += len(arguments[0])


class Exchange:
    """A `reduce` for [`Problem`] that counts calls, bytes and seconds."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.calls, self.bytes, self.seconds = 0, 0, 0.0

    def __call__(self, tensor: Tensor) -> Tensor:
        started = time.perf_counter()
        self.calls, self.bytes = self.calls + 1, self.bytes + tensor.numel() * tensor.element_size()
        if self.accelerator.num_processes > 1:
            tensor = self.accelerator.reduce(tensor, "sum")
        self.seconds += time.perf_counter() - started
        return tensor


@contextmanager
def clock(record: dict[str, Any], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    record[name] = time.perf_counter() - started


def measure(point: Point) -> dict[str, Any]:
    """One measurement. All processes return the sums of their counts, and the times of the slowest."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    teacher = load_teacher(TEACHER)
    samples = teacher.samples(TRAINING_SEED, point.samples)[accelerator.process_index :: point.processes]
    solver = GASScheduler.from_config(teacher.pipe.scheduler.config).theory_solver(point.steps)
    Problem(teacher.pipe, Loss(), point.batch_size).losses(solver, samples[:1])
    accelerator.wait_for_everyone()
    function = gauss_newton if point.method == "Gauss-Newton" else backpropagation
    parts = gather_object([function(teacher.pipe, solver, samples, point, accelerator)])
    sums = {name: sum(part[name] for part in parts) for name in parts[0] if name.endswith("evaluations")}
    return {name: max(part[name] for part in parts) for name in parts[0]} | sums


def gauss_newton(
    pipe: DDPMPipeline, solver: GeneralizedSolver, samples: TeacherSamples, point: Point, accelerator: Accelerator
) -> dict[str, Any]:
    record, rows, exchange, memory = {}, Rows(pipe.unet), Exchange(accelerator), PeakMemory()
    problem = Problem(pipe, Loss(), point.batch_size, exchange)
    with clock(record, "trial_seconds"):
        current, _ = problem.losses(solver, samples)
    trial = record["trial_evaluations"] = rows.count
    exchange.calls = exchange.bytes = exchange.seconds = 0
    with clock(record, "seconds"):
        problem.linearize(solver, samples)
    record["evaluations"] = rows.count - trial
    problem.descend(solver, samples, current, DAMPING_START)
    record["trials"] = (rows.count - record["evaluations"]) // trial - 1
    record["unknowns"] = int((problem.normal.diagonal() > 0).sum())
    record |= {f"reduce_{name}": value for name, value in vars(exchange).items() if name != "accelerator"}
    record["peak_memory"] = memory.rise()
    # The part that processes cannot share is the time of an iteration on one sample with a network that costs nothing.
    pipe.unet.forward = lambda sample, *_, **__: SimpleNamespace(sample=sample.sin())
    with clock(record, "fixed_seconds"):
        problem.linearize(solver, samples[:1])
    return record


def backpropagation(
    pipe: DDPMPipeline, solver: GeneralizedSolver, samples: TeacherSamples, point: Point, accelerator: Accelerator
) -> dict[str, Any]:
    record, rows, memory = {}, Rows(pipe.unet), PeakMemory()
    recipe = Recipe(
        train_batch_size=min(point.batch_size, len(samples)),
        gradient_accumulation_steps=math.ceil(len(samples) / point.batch_size),
    )
    settings = {"loss": Loss(), "recipe": recipe, "accelerator": accelerator}
    trainer = GradientDescent(pipe, solver, samples, **settings)
    with clock(record, "seconds"):
        trainer.step()
    return {**record, "evaluations": rows.count, "peak_memory": memory.rise()}


def measure_together(points: list[Point]) -> list[dict[str, Any]]:
    """Measurements with several processes. They have no memory, because a process knows its largest memory only."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            points[0].processes,
        ]
        wanted = json.dumps([asdict(point) for point in points])
        subprocess.run([*map(str, launch), __file__, "--measure", wanted, "--results", str(path)], check=True)
        return [{**record, "peak_memory": None} for record in json.loads(path.read_text())]


def measure_in_this_process(wanted: str, path: Path) -> None:
    """Runs in the processes that `measure_together` launches."""
    results = [measure(Point(**point)) for point in json.loads(wanted)]
    if Accelerator(cpu=True).is_main_process:
        path.write_text(json.dumps(results))


def points_of(processes: int) -> list[Point]:
    sweep = [(STEPS_FOR_SAMPLES, samples) for samples in SAMPLE_COUNTS]
    if processes == 1:
        sweep = [*((steps, SAMPLES_FOR_STEPS) for steps in STEP_COUNTS), *sweep]
    return [
        Point(method, steps, samples, processes, BATCH_SIZE)
        for steps, samples in dict.fromkeys(sweep)
        for method in ("Gauss-Newton", "backpropagation")
    ]


def table(rows: list[dict]) -> str:
    header = [
        "steps",
        "samples",
        "processes",
        "unknowns",
        "evaluations per sample (formula)",
        "per trial",
        "linearization",
    ]
    header += ["trial", "memory", "gradient: evaluations", "time", "memory of the gradient"]
    # The two methods of a case stand in one row.
    cells = [table_row(ours, other) for ours, other in zip(rows[::2], rows[1::2])]
    return markdown_table(header, cells)


def table_row(ours: dict, gradient: dict) -> list[str]:
    samples = ours["samples"]
    memory = [
        "-" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**20:.0f} MB" for row in (ours, gradient)
    ]
    return [
        *(str(ours[name]) for name in ("steps", "samples", "processes", "unknowns")),
        f"{ours['evaluations'] / samples:g} ({num_evaluations(ours['steps'])})",
        f"{ours['trial_evaluations'] / samples:g}",
        *(f"{ours[name]:.2f} s" for name in ("seconds", "trial_seconds")),
        memory[0],
        f"{gradient['evaluations'] / samples:g}",
        f"{gradient['seconds']:.2f} s",
        memory[1],
    ]


def draw(rows: list[dict]) -> Any:
    picture, axes = figure(1, 3, size=(12, 3.6))
    evaluations, seconds, memory = axes[0]
    styles = {"Gauss-Newton": ("C1", "Gauss-Newton's linearisation"), "backpropagation": ("C0", "a gradient")}
    for method, (color, label) in styles.items():
        of_method = [row for row in rows if row["method"] == method]
        by_steps = [row for row in of_method if row["samples"] == SAMPLES_FOR_STEPS and row["processes"] == 1]
        counts = [row["evaluations"] / row["samples"] for row in by_steps]
        evaluations.plot([row["steps"] for row in by_steps], counts, "o", color=color, label=f"{label}, counted")
        megabytes = [row["peak_memory"] / 2**20 for row in by_steps]
        memory.plot([row["steps"] for row in by_steps], megabytes, "o-", color=color, label=label)
        for processes, line in ((1, "-"), (NUM_PROCESSES, "--")):
            shown = [row for row in of_method if row["steps"] == STEPS_FOR_SAMPLES and row["processes"] == processes]
            shown = sorted((row for row in shown if row["samples"] in SAMPLE_COUNTS), key=lambda row: row["samples"])
            times = [row["seconds"] for row in shown]
            name = f"{label}, {processes} process{'es' * (processes > 1)}"
            seconds.plot([row["samples"] for row in shown], times, f"o{line}", color=color, label=name)
    steps = range(min(STEP_COUNTS), max(STEP_COUNTS) + 1)
    formula = [n * (n + 1) * (n + 5) / 6 for n in steps]
    evaluations.plot(steps, formula, color="C1", linewidth=0.8, label="n (n + 1) (n + 5) / 6")
    evaluations.plot(steps, steps, color="C0", linewidth=0.8, label="n")
    evaluations.set(xlabel="steps n", ylabel="network evaluations per sample")
    seconds.set(xlabel=f"samples, {STEPS_FOR_SAMPLES} steps", ylabel="seconds")
    memory.set(xlabel=f"steps, batches of {BATCH_SIZE} samples", ylabel="peak memory, MB", ylim=(0, None))
    for axis, ticks in ((evaluations, STEP_COUNTS), (seconds, SAMPLE_COUNTS), (memory, STEP_COUNTS)):
        axis.set(xscale="log", yscale="linear" if axis is memory else "log")
        axis.set_xticks(ticks, ticks)
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3, which="both")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # for the processes that it launches
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        return measure_in_this_process(args.measure, args.results)
    load_teacher(TEACHER).samples(TRAINING_SEED, max(*SAMPLE_COUNTS, SAMPLES_FOR_STEPS))
    alone, together = points_of(1), points_of(NUM_PROCESSES)
    records = [in_own_process(measure, point) for point in tqdm(alone, desc="Measuring", unit="point")]
    records += measure_together(together)
    rows = [asdict(point) | record for point, record in zip([*alone, *together], records)]
    write(__file__, rows, table(rows), draw(rows))


if __name__ == "__main__":
    main()
