"""Distance to the exact solution of the ODE at equal numbers of network evaluations: SDM beside fixed solvers.

    python examples/benchmarks/sdm_quality.py

Writes sdm_quality.json, .md and .png beside itself. Plans are calibrated on other samples than they are judged by.
"""

import json
from pathlib import Path

import torch
from diffusers import DDPMPipeline, SchedulerMixin

from diffusers_gas import SDMPlan, SDMScheduler, adaptive
from diffusers_gas.calibration import calibrate, heun_plan, run_on_pipeline
from diffusers_gas.comparison import distance_to_teacher, training_free_schedulers
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, SampleInputs
from diffusers_gas.pipelines.teacher import TeacherSamples


HERE = Path(__file__).resolve().parent
BUDGETS = (8, 12, 20, 35)
NUM_SAMPLES, BATCH_SIZE = 256, 128
REFERENCE_STEPS = 256
RIVALS = ("DPM-Solver++ 2M", "UniPC")

# CIFAR-10 (SDM, arXiv 2602.12624): L2 errors of 0.01 to 0.40 a step, q = 0.25, and tau = 2e-4.
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


def published_plan(pipe: DDPMPipeline, base: SDMScheduler, budget: int) -> SDMPlan:
    """The published steps with the published settings: search, error profile, resampling, switch at tau."""
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
    """Everything that a plan can express, by name and evaluations."""
    plans = {
        "Euler, Karras": {n: SDMPlan(karras(base, n), n - 1) for n in BUDGETS},
        "Heun, Karras": {n: heun_plan(n, lambda steps: karras(base, steps)) for n in BUDGETS},
        "SDM uncalibrated (published tau, Karras)": {n: base.published_plan(n) for n in BUDGETS},
        "SDM published settings": {n: published_plan(pipe, base, n) for n in BUDGETS},
        "SDM calibrated, Heun": calibrate(pipe, BUDGETS, solvers=["heun"]).scheduler.plans,
        "SDM calibrated, either": calibrate(pipe, BUDGETS).scheduler.plans,
    }
    return {name: {n: with_plan(base, plan) for n, plan in found.items()} for name, found in plans.items()}


def best_of_family(pipe: DDPMPipeline, family: str, budget: int, samples: TeacherSamples) -> tuple[float, str]:
    """The closest of a Diffusers scheduler's spacings, chosen on the very samples: more than a user could do."""
    options: dict[str, SchedulerMixin] = training_free_schedulers(pipe.scheduler.config)
    return min(
        (distance_to_teacher(pipe, scheduler, budget, samples, BATCH_SIZE), name)
        for name, scheduler in options.items()
        if name.startswith(family)
    )


def draw(results: dict[str, dict[int, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, distances in results.items():
        style = "-" if name.startswith("SDM cal") else "--"
        axis.plot(list(distances), list(distances.values()), style, marker=".", label=name)
    axis.set(xlabel="network evaluations", ylabel="mean squared distance to the exact solution", yscale="log")
    axis.set(xscale="log", xticks=BUDGETS, xticklabels=BUDGETS)
    axis.minorticks_off()
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


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

    lines = [
        "| | " + " | ".join(f"{n} evaluations" for n in BUDGETS) + " |",
        "| --- |" + " --- |" * len(BUDGETS),
        *("| " + " | ".join([name, *(f"{row[n]:.2e}" for n in BUDGETS)]) + " |" for name, row in results.items()),
    ]
    table = "\n".join(lines)
    print(
        f"Mean squared distance of {NUM_SAMPLES} held-out samples to the exact solution (Heun, {REFERENCE_STEPS} steps, "
        f"itself off by about {uncertainty:.0e}):\n\n{table}"
    )
    record = {"distances": results, "notes": notes, "reference_uncertainty": uncertainty, "num_samples": NUM_SAMPLES}
    (HERE / "sdm_quality.json").write_text(json.dumps(record, indent=2) + "\n")
    (HERE / "sdm_quality.md").write_text(table + "\n")
    draw(results, HERE / "sdm_quality.png")


if __name__ == "__main__":
    main()
