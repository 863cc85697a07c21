"""What one scheduler step costs beside the network: GASScheduler against Diffusers' schedulers, in one run.

    python examples/benchmarks/step_cost.py

Prints a table and writes step_cost.json, step_cost.md and step_cost.png beside this file. `GAS (learned)` has every
coefficient in use, the dearest case; `GAS (theory)` is an untrained scheduler.
"""

import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler


SHAPES = {
    "image, 1x4x64x64": (1, 4, 64, 64),
    "large image, 2x4x128x128": (2, 4, 128, 128),
    "video, 1x16x21x60x104": (1, 16, 21, 60, 104),
}
STEP_COUNTS = (4, 8)
REPETITIONS = 15
REFERENCE = "DPM-Solver++ 2M"


def schedulers() -> dict[str, SchedulerMixin]:
    learned = GASScheduler()
    generator = torch.Generator().manual_seed(0)
    for n in STEP_COUNTS:
        solver = learned.theory_solver(n)
        with torch.no_grad():
            for parameter in solver.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        learned.add_solver(solver)
    return {
        "GAS (learned)": learned,
        "GAS (theory)": GASScheduler(),
        "DDIM": DDIMScheduler(),
        REFERENCE: DPMSolverMultistepScheduler(),
        "UniPC": UniPCMultistepScheduler(),
    }


def seconds_per_step(scheduler: SchedulerMixin, num_inference_steps: int, shape: tuple[int, ...]) -> float:
    """Time of the step calls of one sampling, without the network and without `set_timesteps`."""
    sample, model_output = torch.randn(2, *shape)
    scheduler.set_timesteps(num_inference_steps)
    started = time.perf_counter()
    for timestep in scheduler.timesteps:
        sample = scheduler.step(model_output, timestep, sample).prev_sample
    return (time.perf_counter() - started) / num_inference_steps


def measure() -> list[dict]:
    rows = []
    cases = [(label, shape, n) for label, shape in SHAPES.items() for n in STEP_COUNTS]
    for label, shape, n in tqdm(cases, desc="Measuring"):
        candidates = schedulers()
        times = {name: [] for name in candidates}
        for _ in range(REPETITIONS):  # in turn, so that what else the machine does hits all alike
            for name, scheduler in candidates.items():
                times[name].append(seconds_per_step(scheduler, n, shape))
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows += [
            {"latents": label, "steps": n, "scheduler": name, "us": 1e6 * t, "relative": t / medians[REFERENCE]}
            for name, t in medians.items()
        ]
    return rows


def table(rows: list[dict]) -> str:
    lines = [f"| latents | steps | scheduler | time per step | relative to {REFERENCE} |", "| --- " * 5 + "|"]
    for row in rows:
        lines.append(
            f"| {row['latents']} | {row['steps']} | {row['scheduler']} | {row['us']:.0f} us | {row['relative']:.2f} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SHAPES), figsize=(12, 3.2), sharey=True, layout="constrained")
    for axis, label in zip(axes, SHAPES):
        shown = [row for row in rows if row["latents"] == label and row["steps"] == STEP_COUNTS[-1]]
        axis.barh([row["scheduler"] for row in shown], [row["relative"] for row in shown])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(label, fontsize=9)
    figure.supxlabel(f"time per step relative to {REFERENCE}, {STEP_COUNTS[-1]} steps")
    figure.savefig(path, dpi=120)


def main() -> None:
    print(f"Timing scheduler steps for {len(SHAPES)} latent sizes, {torch.get_num_threads()} threads, about a minute.")
    torch.manual_seed(0)
    rows = measure()
    print(table(rows))
    path = Path(__file__).with_suffix("")
    path.with_suffix(".json").write_text(
        json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=2) + "\n"
    )
    path.with_suffix(".md").write_text(table(rows) + "\n")
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
