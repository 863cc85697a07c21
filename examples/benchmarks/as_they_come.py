"""Both schedulers as they come, without training or calibration, against Diffusers' from the same config.

    python examples/benchmarks/as_they_come.py

For each shipped model, at 5 to 50 evaluations: mean squared distance of `SDMScheduler.from_config` and `GASScheduler.from_config` to
the teacher in 100 steps, relative to the closest of the scheduler that the model came with and DPM-Solver++ 2M of the same config,
also with trailing spacing.
The teacher of flow matching is Euler's method. Its own error in 100 steps is near that of the others in 50, and Euler's method in 50
steps shares it, so that these models are also compared with 400 steps. Errors are by the jackknife over the samples. A model that is
measured is not measured again.

The results are as_they_come.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from report import Teacher, figure, load_teacher, markdown_table, measure_each, write
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, SDMScheduler
from diffusers_gas.comparison import training_free_schedulers
from diffusers_gas.noise_schedules import FlowMatchSchedule
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.inputs import EVALUATION_SEED


MODELS = ("digits", "text-to-digits", "flow-digits", "moving-digits", "text-to-emoji")
EVALUATIONS = (5, 6, 7, 8, 9, 10, 12, 15, 20, 35, 50)
OURS = {"SDM": SDMScheduler, "GAS": GASScheduler}
# The networks of the last model are the slowest.
NUM_SAMPLES = dict.fromkeys(MODELS, 128) | {"text-to-emoji": 32}
BATCH_SIZE = 32
TEACHER_STEPS, FINE_STEPS = 100, 400


def final_states(teacher: Teacher, scheduler: SchedulerMixin, num_inference_steps: int) -> Tensor:
    finals = teacher.inputs(EVALUATION_SEED, NUM_SAMPLES[teacher.name]).in_calls(
        teacher.pipe,
        BATCH_SIZE,
        lambda arguments: sample_latents(teacher.pipe, scheduler, num_inference_steps, **arguments)[1],
    )
    return torch.stack(finals).flatten(1).double()


def ratio(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Ratio of two means over the same samples, and its standard error by the jackknife."""
    n, found = len(ours), (ours.sum() / theirs.sum()).item()
    without = (ours.sum() - ours) / (theirs.sum() - theirs)
    return found, math.sqrt((n - 1) / n * (without - without.mean()).square().sum().item())


def measure(name: str) -> list[dict[str, Any]]:
    teacher = load_teacher(name)
    config = teacher.pipe.scheduler.config
    flow = isinstance(SDMScheduler.from_config(config).noise_schedule(mu=1.0), FlowMatchSchedule)
    references = {
        steps: replace(teacher, num_inference_steps=steps)
        .samples(EVALUATION_SEED, NUM_SAMPLES[name], BATCH_SIZE)
        .final.flatten(1)
        .double()
        for steps in ([TEACHER_STEPS, FINE_STEPS] if flow else [TEACHER_STEPS])
    }
    theirs = {"the model's own": teacher.pipe.scheduler}
    if flow:
        theirs["DPM-Solver++ 2M"] = training_free_schedulers(config)["DPM-Solver++ 2M"]
    else:
        theirs["DPM-Solver++ 2M"] = DPMSolverMultistepScheduler.from_config(config)
        theirs["DPM-Solver++ 2M, trailing"] = training_free_schedulers(config)["DPM-Solver++ 2M, trailing"]
    rows = []
    for n in tqdm(EVALUATIONS, desc=name, unit="count"):
        samplers = theirs | {method: kind.from_config(config) for method, kind in OURS.items()}
        finals = {method: final_states(teacher, scheduler, n) for method, scheduler in samplers.items()}
        for steps, reference in references.items():
            found = {method: (final - reference).square().mean(1) for method, final in finals.items()}
            best = min(theirs, key=lambda method: found[method].mean().item())
            row = {"evaluations": n, "teacher_steps": steps, "best": best}
            row |= {"distances": {method: values.mean().item() for method, values in found.items()}}
            rows.append(row | {method: ratio(found[method], found[best]) for method in OURS})
    return rows


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = []
    for name, rows in results.items():
        for steps in dict.fromkeys(row["teacher_steps"] for row in rows):
            shown = [row for row in rows if row["teacher_steps"] == steps]
            for method in OURS:
                cells = ["{:.2f} ± {:.2f}".format(*row[method]) for row in shown]
                lines.append([f"{name}, {steps} steps", method, *cells])
    counts = [str(n) for n in EVALUATIONS]
    return markdown_table(["model and reference", "", *counts], lines)


def draw(results: dict[str, list[dict[str, Any]]]) -> Any:
    picture, ((*axes,),) = figure(1, len(OURS), size=(10, 4), sharey=True)
    for axis, method in zip(axes, OURS):
        for i, (name, rows) in enumerate(results.items()):
            steps = max(row["teacher_steps"] for row in rows)
            shown = [row for row in rows if row["teacher_steps"] == steps]
            values = [row[method][0] for row in shown]
            axis.plot([row["evaluations"] for row in shown], values, f"C{i}.-", label=name)
        axis.axhline(1, color="black", linewidth=1)
        axis.set(
            title=f"{method}Scheduler.from_config", xlabel="network evaluations", xscale="log", xticks=EVALUATIONS
        )
        axis.set_xticklabels(EVALUATIONS, fontsize=7)
        axis.minorticks_off()
    axes[0].set(ylabel="distance relative to the closer of\nthe model's own scheduler and DPM-Solver++ 2M", ylim=0)
    axes[0].legend(fontsize=8)
    return picture


def main() -> None:
    results = measure_each(__file__, MODELS, measure)
    write(__file__, results, table(results), draw(results))


if __name__ == "__main__":
    main()
