"""Distances of SDM and of fixed solvers to the exact solution of the ODE, for equal numbers of network evaluations.

    python examples/benchmarks/sdm_quality.py

Plans are calibrated and evaluated on different samples. Every deterministic scheduler of Diffusers samples the first
`NUM_SCREENED` noises with each of its spacing options; the closest are evaluated on all of them. The best is thus chosen on the
samples of the evaluation, which favors Diffusers.

The results are sdm_quality.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT.
"""

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, SchedulerMixin
from quality import NUM_SCREENED, rivals
from report import figure, markdown_table, write
from tqdm.auto import tqdm

from diffusers_gas import SDMPlan, SDMScheduler, adaptive
from diffusers_gas.calibration import calibrate, run_on_pipeline
from diffusers_gas.comparison import training_free_schedulers
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, SampleInputs


HERE = Path(__file__).resolve().parent
BUDGETS = (8, 12, 20, 35)
NUM_SAMPLES, BATCH_SIZE = 256, 128
REFERENCE_STEPS = 256
# Schedulers of Diffusers that are evaluated on all samples, and those whose Karras spacing has a row of its own.
NUM_JUDGED, FAMILIES = 6, ("DPM-Solver++ 2M", "UniPC")

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
        "SDM as it comes": {n: SDMScheduler.from_config(pipe.scheduler.config).plan_for(n) for n in BUDGETS},
        'SDM uncalibrated, published (`solver="heun"`)': {n: base.plan_for(n) for n in BUDGETS},
        "SDM published settings": {n: published_plan(pipe, base, n) for n in BUDGETS},
        "SDM calibrated, Heun": calibrate(pipe, BUDGETS, solvers=["heun"]).plans,
        "SDM calibrated, either": calibrate(pipe, BUDGETS).plans,
    }
    return {name: {n: with_plan(base, plan) for n, plan in found.items()} for name, found in plans.items()}


class Judge:
    """Squared distances to the exact solution of the same samples for all methods."""

    def __init__(self, pipe: DDPMPipeline, samples: SampleInputs, exact: torch.Tensor):
        self.pipe, self.samples, self.exact = pipe, samples, exact

    def distances(self, scheduler: SchedulerMixin, num_inference_steps: int, num_samples: int) -> torch.Tensor:
        """Those of the first samples, `(num_samples,)`."""
        samples = self.samples[:num_samples]
        finals = samples.in_calls(
            self.pipe,
            BATCH_SIZE,
            lambda arguments: sample_latents(self.pipe, scheduler, num_inference_steps, **arguments)[1],
        )
        return (torch.stack(finals) - self.exact[:num_samples]).flatten(1).square().mean(1).double()

    def row(self, scheduler: SchedulerMixin, num_inference_steps: int, note: str) -> dict[str, Any]:
        """Mean with standard error, and median."""
        found = self.distances(scheduler, num_inference_steps, len(self.samples))
        error = found.std().item() / math.sqrt(len(found))
        return {"distance": found.mean().item(), "error": error, "median": found.median().item(), "note": note}

    def best_of_diffusers(self, budget: int) -> dict[str, Any]:
        screened = [
            (self.distances(rival.scheduler, rival.num_inference_steps, NUM_SCREENED).mean().item(), rival)
            for rival in tqdm(rivals(self.pipe, budget), desc=f"{budget} evaluations, Diffusers", unit="scheduler")
        ]
        closest = sorted((found for found in screened if math.isfinite(found[0])), key=lambda found: found[0])
        rows = [self.row(rival.scheduler, rival.num_inference_steps, rival.name) for _, rival in closest[:NUM_JUDGED]]
        return min(rows, key=lambda row: row["distance"])


def draw(results: dict[str, dict[int, dict[str, Any]]]) -> Any:
    picture, ((axis,),) = figure(size=(7, 4.5))
    for name, rows in results.items():
        style = "-" if name.startswith("SDM cal") else "--"
        axis.plot(list(rows), [row["distance"] for row in rows.values()], style, marker=".", label=name)
    axis.set(xlabel="network evaluations", ylabel="mean squared distance to the exact solution", yscale="log")
    axis.set(xscale="log", xticks=BUDGETS, xticklabels=BUDGETS)
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return picture


def main() -> None:
    pipe = DDPMPipeline.from_pretrained(HERE.parent / "teachers" / "digits")
    pipe.set_progress_bar_config(disable=True)
    base = SDMScheduler.from_config(pipe.scheduler.config, solver="heun")  # the published noise levels
    inputs = SampleInputs.create(EVALUATION_SEED, NUM_SAMPLES)
    exact = fine_solution(pipe, base, inputs, REFERENCE_STEPS)
    half = fine_solution(pipe, base, inputs[:BATCH_SIZE], REFERENCE_STEPS // 2)
    uncertainty = (half - exact[:BATCH_SIZE]).square().mean().item() / 16
    judge = Judge(pipe, inputs, exact)

    results: dict[str, dict[int, dict[str, Any]]] = {}
    for name, schedulers in own_schedulers(pipe, base).items():
        results[name] = {}
        for n, scheduler in schedulers.items():
            (plan,) = scheduler.plans.values()
            spent = plan.num_inference_steps
            note = f"{plan.solver}, {plan.num_steps} steps, switch {plan.switch_index}, {spent} evaluations"
            results[name][n] = judge.row(scheduler, spent, note)
    for family in FAMILIES:
        option = training_free_schedulers(pipe.scheduler.config)[f"{family}, karras sigmas"]
        results[f"{family}, Karras"] = {n: judge.row(option, n, "") for n in BUDGETS}
    results["best of Diffusers"] = {n: judge.best_of_diffusers(n) for n in BUDGETS}

    cells = [
        [name, *("{distance:.2e} ± {error:.0e} ({median:.1e})".format(**rows[n]) for n in BUDGETS)]
        for name, rows in results.items()
    ]
    best = ", ".join(f"{row['note']} at {n}" for n, row in results["best of Diffusers"].items())
    table = markdown_table(["", *(f"{n} evaluations" for n in BUDGETS)], cells)
    text = (
        f"{table}\n\nMean squared distances of {len(inputs)} samples with their standard errors, and the medians in "
        f"parentheses. The exact solution is that of Heun's method in {REFERENCE_STEPS} steps, with an error of about "
        f"{uncertainty:.0e}. The best of Diffusers: {best}."
    )
    record = {"rows": results, "reference_uncertainty": uncertainty, "num_samples": len(inputs)}
    write(__file__, record, text, draw(results))


if __name__ == "__main__":
    main()
