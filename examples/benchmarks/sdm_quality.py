"""Distances of SDM and of fixed solvers to the exact solution of the ODE, for equal numbers of network evaluations.

    python examples/benchmarks/sdm_quality.py

The results are sdm_quality.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT. Plans are
calibrated and evaluated on different samples.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, SchedulerMixin
from report import figure, markdown_table, write

from diffusers_gas import SDMPlan, SDMScheduler, adaptive
from diffusers_gas.calibration import calibrate, run_on_pipeline
from diffusers_gas.comparison import distance_to_teacher, training_free_schedulers
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, SampleInputs
from diffusers_gas.pipelines.teacher import TeacherSamples


HERE = Path(__file__).resolve().parent
BUDGETS = (8, 12, 20, 35)
NUM_SAMPLES, BATCH_SIZE = 256, 128
REFERENCE_STEPS = 256
RIVALS = ("DPM-Solver++ 2M", "UniPC")

# Settings for CIFAR-10 (SDM, arXiv 2602.12624): L2 errors of 0.01 to 0.40 per step, q = 0.25, and tau = 2e-4.
PUBLISHED_TOLERANCE, PUBLISHED_Q, PUBLISHED_TAU = adaptive.Tolerance(0.01, 0.40), 0.25, 2e-4


def karras(base: SDMScheduler, num_steps: int) -> torch.Tensor:
    return base.usual_sigmas(num_steps, base.noise_schedule())


def fine_solution(pipe: DDPMPipeline, base: SDMScheduler, samples: SampleInputs, num_steps: int) -> torch.Tensor:
    sigmas = karras(base, num_steps)
    batches = [samples[start : start + BATCH_SIZE] for start in range(0, len(samples), BATCH_SIZE)]
    solutions = [
        run_on_pipeline(pipe, sigmas, adaptive.heun, **batch.pipeline_arguments(pipe)).sample for batch in batches
    ]
    return torch.cat(solutions)


def with_plan(base: SDMScheduler, plan: SDMPlan) -> SDMScheduler:
    scheduler = SDMScheduler.from_config(base.config)
    scheduler.add_plan(plan)
    return scheduler


def heun_plan(base: SDMScheduler, budget: int) -> SDMPlan:
    """Heun's method on Karras' noise levels. With an even number of evaluations the first step is Euler's."""
    num_steps = budget // 2 + 1
    return SDMPlan(karras(base, num_steps), 2 * num_steps - 1 - budget)


def published_plan(pipe: DDPMPipeline, base: SDMScheduler, budget: int) -> SDMPlan:
    """The published algorithm with its published settings: step search, error profile, resampling, switch at tau."""
    num_steps = budget // 2 + 1
    grid = karras(base, num_steps)
    arguments = SampleInputs.create(0, BATCH_SIZE).pipeline_arguments

    def run(sigmas, method):
        return run_on_pipeline(pipe, sigmas, method, **arguments(pipe))

    search = adaptive.StepSearch(variant="published", max_shrinks=2)
    found = run(grid[:-1], lambda x, s: adaptive.adaptive_schedule(x, s, PUBLISHED_TOLERANCE, search))
    eta = run(found.sigmas, adaptive.eta_profile).eta
    sigmas = adaptive.resample_sigmas(found.sigmas, eta, num_steps, q=PUBLISHED_Q)
    rule = adaptive.CurvatureSwitch(PUBLISHED_TAU)
    switch_index = run(sigmas, lambda x, s: adaptive.adaptive_heun(x, s, rule)).switch_index
    return SDMPlan(sigmas, num_steps - 1 if switch_index is None else min(switch_index, num_steps - 1))


def own_schedulers(pipe: DDPMPipeline, base: SDMScheduler) -> dict[str, dict[int, SDMScheduler]]:
    """Schedulers with a plan, by method and number of evaluations."""
    plans = {
        "Euler, Karras": {n: SDMPlan(karras(base, n), n - 1) for n in BUDGETS},
        "Heun, Karras": {n: heun_plan(base, n) for n in BUDGETS},
        "SDM uncalibrated (published tau, Karras)": {n: base.published_plan(n) for n in BUDGETS},
        "SDM published settings": {n: published_plan(pipe, base, n) for n in BUDGETS},
        "SDM calibrated, Heun": calibrate(pipe, BUDGETS, solvers=["heun"]).plans,
        "SDM calibrated, either": calibrate(pipe, BUDGETS).plans,
    }
    return {name: {n: with_plan(base, plan) for n, plan in found.items()} for name, found in plans.items()}


def best_of_family(pipe: DDPMPipeline, family: str, budget: int, samples: TeacherSamples) -> tuple[float, str]:
    """The best spacing of a Diffusers scheduler. It is chosen on the samples of the evaluation, which favors Diffusers."""
    options: dict[str, SchedulerMixin] = training_free_schedulers(pipe.scheduler.config)
    return min(
        (distance_to_teacher(pipe, scheduler, budget, samples, BATCH_SIZE), name)
        for name, scheduler in options.items()
        if name.startswith(family)
    )


def draw(results: dict[str, dict[int, float]]) -> Any:
    picture, ((axis,),) = figure(size=(7, 4.5))
    for name, distances in results.items():
        style = "-" if name.startswith("SDM cal") else "--"
        axis.plot(list(distances), list(distances.values()), style, marker=".", label=name)
    axis.set(xlabel="network evaluations", ylabel="mean squared distance to the exact solution", yscale="log")
    axis.set(xscale="log", xticks=BUDGETS, xticklabels=BUDGETS)
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return picture


def main() -> None:
    pipe = DDPMPipeline.from_pretrained(HERE.parent / "teachers" / "digits")
    pipe.set_progress_bar_config(disable=True)
    base = SDMScheduler.from_config(pipe.scheduler.config)
    inputs = SampleInputs.create(EVALUATION_SEED, NUM_SAMPLES)
    exact = fine_solution(pipe, base, inputs, REFERENCE_STEPS)
    half = fine_solution(pipe, base, inputs[:BATCH_SIZE], REFERENCE_STEPS // 2)
    uncertainty = (half - exact[:BATCH_SIZE]).square().mean().item() / 16
    samples = TeacherSamples(inputs, exact, exact)

    results: dict[str, dict[int, float]] = {}
    notes: dict[str, dict[int, str]] = {}
    for name, schedulers in own_schedulers(pipe, base).items():
        results[name], notes[name] = {}, {}
        for n, scheduler in schedulers.items():
            (plan,) = scheduler.plans.values()
            spent = plan.num_inference_steps
            results[name][n] = distance_to_teacher(pipe, scheduler, spent, samples, BATCH_SIZE)
            notes[name][n] = f"{plan.solver}, {plan.num_steps} steps, switch {plan.switch_index}, {spent} evaluations"
    for family in RIVALS:
        best = {n: best_of_family(pipe, family, n, samples) for n in BUDGETS}
        results[f"{family}, best spacing"] = {n: distance for n, (distance, _) in best.items()}
        notes[f"{family}, best spacing"] = {n: name for n, (_, name) in best.items()}
        karras_option = training_free_schedulers(pipe.scheduler.config)[f"{family}, karras sigmas"]
        results[f"{family}, Karras"] = {
            n: distance_to_teacher(pipe, karras_option, n, samples, BATCH_SIZE) for n in BUDGETS
        }

    rows = [[name, *(f"{row[n]:.2e}" for n in BUDGETS)] for name, row in results.items()]
    table = markdown_table(["", *(f"{n} evaluations" for n in BUDGETS)], rows)
    print(
        f"Mean squared distance of {NUM_SAMPLES} held-out samples to the exact solution (Heun, {REFERENCE_STEPS} steps, with an "
        f"error of about {uncertainty:.0e})"
    )
    record = {"distances": results, "notes": notes, "reference_uncertainty": uncertainty, "num_samples": NUM_SAMPLES}
    write(__file__, record, table, draw(results))


if __name__ == "__main__":
    main()
