"""The cost of schedulers without the network: steps, `set_timesteps` and copies, of ours and of Diffusers' schedulers.

    python examples/benchmarks/step_cost.py

`GAS (learned)` uses every coefficient, which is the most expensive case: step k sums k + 3 tensors. `GAS (theory)` is an
untrained scheduler. The results are step_cost.json, .md and .png beside this file, or in the folder
DIFFUSERS_GAS_BENCHMARK_OUTPUT. The script takes about three minutes on a CPU core.
"""

import copy
import logging
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from report import add_solver_with_all_coefficients, figure, markdown_table, write
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, SDMScheduler


SHAPES = {
    "pixels, 1x3x32x32": (1, 3, 32, 32),
    "image, 1x4x64x64": (1, 4, 64, 64),
    "large image, 2x4x128x128": (2, 4, 128, 128),
    "video, 1x16x21x60x104": (1, 16, 21, 60, 104),
}
STEP_COUNTS = (4, 8, 16, 32)
TICKS = (0.125, 0.25, 0.5, 1, 2, 4)
DRAWN_STEPS, DRAWN_SHAPE = 8, "large image, 2x4x128x128"
REPETITIONS = 15
REFERENCE = "DPM-Solver++ 2M"


def schedulers() -> dict[str, SchedulerMixin]:
    learned = GASScheduler()
    generator = torch.Generator().manual_seed(0)
    for n in STEP_COUNTS:
        add_solver_with_all_coefficients(learned, n, generator)
    return {
        "GAS (learned)": learned,
        "GAS (theory)": GASScheduler(),
        "SDM": SDMScheduler(),
        "DDIM": DDIMScheduler(),
        REFERENCE: DPMSolverMultistepScheduler(),
        "UniPC": UniPCMultistepScheduler(),
    }


def microseconds_per_step(
    scheduler: SchedulerMixin, num_inference_steps: int, shape: tuple[int, ...], device: str = "cpu"
) -> float:
    """The time of all calls of `step` in one sampling, without the network and without `set_timesteps`."""
    sample, model_output = torch.randn(2, *shape, device=device)
    scheduler.set_timesteps(num_inference_steps, device=device)
    return microseconds(sample_with, scheduler, model_output, sample) / num_inference_steps


def sample_with(scheduler: SchedulerMixin, model_output: torch.Tensor, sample: torch.Tensor) -> None:
    for timestep in scheduler.timesteps:
        sample = scheduler.step(model_output, timestep, sample).prev_sample


def microseconds(function: Callable, *arguments: Any) -> float:
    started = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - started)


def medians(measurement: Callable[[SchedulerMixin], float]) -> dict[str, float]:
    """Times of every scheduler. They are measured in turn, so that other load of the machine affects all of them alike."""
    candidates = schedulers()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(REPETITIONS):
        for name, scheduler in candidates.items():
            times[name].append(measurement(scheduler))
    return {name: statistics.median(values) for name, values in times.items()}


def measure_steps() -> list[dict]:
    rows = []
    cases = [(label, shape, n) for label, shape in SHAPES.items() for n in STEP_COUNTS]
    for label, shape, n in tqdm(cases, desc="Measuring"):
        times = medians(partial(microseconds_per_step, num_inference_steps=n, shape=shape))
        case = {"latents": label, "elements": math.prod(shape), "steps": n}
        rows += [
            {**case, "scheduler": name, "us": us, "relative": us / times[REFERENCE]} for name, us in times.items()
        ]
    return rows


def measure_calls() -> list[dict]:
    """Times of the calls that a server makes once per request: a copy of the scheduler, and `set_timesteps`."""
    calls: dict[str, Callable] = {f"set_timesteps({n})": methodcaller("set_timesteps", n) for n in STEP_COUNTS}
    calls["deepcopy"] = copy.deepcopy
    times = {call: medians(partial(microseconds, function)) for call, function in calls.items()}
    return [{"call": call, "scheduler": name, "us": us} for call, row in times.items() for name, us in row.items()]


def table(steps: list[dict], calls: list[dict]) -> str:
    others = [name for name in dict.fromkeys(row["scheduler"] for row in steps) if name != REFERENCE]
    rows = []
    for label in SHAPES:
        for n in STEP_COUNTS:
            found = {row["scheduler"]: row for row in steps if (row["latents"], row["steps"]) == (label, n)}
            ratios = [f"{found[name]['relative']:.2f}" for name in others]
            rows.append([label, str(n), f"{found[REFERENCE]['us']:.0f} us", *ratios])
    of_steps = markdown_table(["latents", "steps", REFERENCE, *others], rows)
    names = [REFERENCE, *others]
    milliseconds = {(row["call"], row["scheduler"]): f"{row['us'] / 1e3:.2f} ms" for row in calls}
    rows = [
        [f"`{call}`", *(milliseconds[call, name] for name in names)]
        for call in dict.fromkeys(row["call"] for row in calls)
    ]
    return (
        f"The time of a step of {REFERENCE}, and of the others relative to it:\n\n{of_steps}\n\n"
        f"Calls that are made once per call of a pipeline:\n\n{markdown_table(['call', *names], rows)}"
    )


def draw(rows: list[dict]) -> Any:
    picture, axes = figure(1, 2, size=(9, 3.6), sharey=True)
    panels = (
        (axes[0, 0], "elements", lambda row: row["steps"] == DRAWN_STEPS, f"{DRAWN_STEPS} steps"),
        (axes[0, 1], "steps", lambda row: row["latents"] == DRAWN_SHAPE, DRAWN_SHAPE),
    )
    for axis, quantity, shown, title in panels:
        for i, name in enumerate(dict.fromkeys(row["scheduler"] for row in rows)):
            points = [row for row in rows if row["scheduler"] == name and shown(row)]
            style = {"color": "black", "linewidth": 0.8} if name == REFERENCE else {"color": f"C{i}", "marker": "o"}
            axis.plot(
                [row[quantity] for row in points], [row["relative"] for row in points], label=name, zorder=2, **style
            )
        axis.set(xscale="log", yscale="log", title=title, yticks=TICKS, yticklabels=TICKS)
        axis.grid(alpha=0.3)
        axis.minorticks_off()
    axes[0, 0].set(xlabel="elements of the latents", ylabel=f"time of a step / {REFERENCE}'s")
    axes[0, 1].set(xlabel="steps", xticks=STEP_COUNTS, xticklabels=STEP_COUNTS)
    axes[0, 1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture


def main() -> None:
    print(f"Timing scheduler steps for {len(SHAPES)} latent sizes, {torch.get_num_threads()} threads, three minutes.")
    torch.manual_seed(0)
    rows, calls = measure_steps(), measure_calls()
    results = {"threads": torch.get_num_threads(), "rows": rows, "calls": calls}
    write(__file__, results, table(rows, calls), draw(rows))


if __name__ == "__main__":
    logging.getLogger("diffusers_gas").setLevel(logging.ERROR)  # SDM warns about 4 steps
    main()
