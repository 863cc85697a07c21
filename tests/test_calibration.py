"""Calibration of `SDMScheduler`: what it finds, on what it may depend, and the script as a user runs it."""

import functools
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from diffusers import DDPMPipeline, EDMEulerScheduler
from scripts import Script, run_script
from tiny_pipelines import build, plugged

from diffusers_gas import GASScheduler, SDMPlan, SDMScheduler, adaptive, calibration
from diffusers_gas.calibration import calibrate, heun_plan, run_on_pipeline
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, SampleInputs


BUDGETS = (8, 11)


@pytest.fixture(autouse=True, scope="module")
def coarse():
    """Less of everything, so that tests are quick."""
    patch = pytest.MonkeyPatch()
    patch.setattr(calibration, "BASE_STEPS", 16)
    patch.setattr(calibration, "REFERENCE_STEPS", 24)
    patch.setattr(calibration, "EXPONENTS", (0.2,))
    patch.setattr(calibration, "LAST_LEVELS", (4.0, 16.0))
    patch.setattr(calibration, "DESCENT_SCALES", ())
    yield
    patch.undo()


@pytest.fixture(scope="module")
def found(digits) -> calibration.Calibration:
    return calibrate(digits, BUDGETS, inputs=SampleInputs.create(0, 12), batch_size=8)


@functools.cache
def exact(pipe: DDPMPipeline, first_seed: int, num_samples: int) -> torch.Tensor:
    """A fine solution, by a route that shares nothing with calibration but the pipeline."""
    fine, inputs = SDMScheduler.from_config(pipe.scheduler.config), SampleInputs.create(first_seed, num_samples)
    return sample_latents(pipe, fine, 99, **inputs.pipeline_arguments(pipe))[1]


def distance(pipe: DDPMPipeline, scheduler: SDMScheduler, budget: int, inputs: SampleInputs) -> float:
    """Mean squared distance to that."""
    _, final = sample_latents(pipe, scheduler, budget, **inputs.pipeline_arguments(pipe))
    return (final - exact(pipe, inputs.seeds[0], len(inputs))).square().mean().item()


@pytest.mark.parametrize("budget", BUDGETS)
def test_plans_fill_the_budget_and_beat_fixed_orders_on_other_samples(digits, found, budget):
    inputs = SampleInputs.create(EVALUATION_SEED, 16)
    base = SDMScheduler.from_config(digits.scheduler.config)

    def karras(num_steps: int):
        return base.usual_sigmas(num_steps, base.noise_schedule())

    distances = {}
    for name, plan in {
        "sdm": found.scheduler.plans[budget],
        "euler": SDMPlan(karras(budget), budget - 1),
        "heun": heun_plan(budget, karras),
    }.items():
        assert plan.num_inference_steps == budget
        scheduler = SDMScheduler.from_config(base.config)
        scheduler.add_plan(plan)
        distances[name] = distance(digits, scheduler, budget, inputs)
    assert distances["sdm"] < 0.6 * min(distances["euler"], distances["heun"])


def test_reported_distances_are_those_of_the_scheduler(digits, found):
    inputs = SampleInputs.create(0, 12)
    for budget, report in found.reports.items():
        # Calibration's own fine solution is a coarse one in these tests.
        assert report.distance == pytest.approx(distance(digits, found.scheduler, budget, inputs), rel=0.4)
        assert report.distance < report.euler_distance and report.distance < report.heun_distance
        n, measured = report.plan.num_steps, report.plan.provenance
        assert [len(measured[name]) for name in ("eta", "karras_eta", "curvature", "karras_sigmas")] == [
            n,
            n,
            n,
            n + 1,
        ]
        assert str(budget) in found.summary()


def test_descent_is_reproducible_and_leaves_the_pipeline_alone(digits, monkeypatch):
    def report() -> calibration.PlanReport:
        return calibrate(digits, [6], inputs=SampleInputs.create(5, 2), solvers=["heun"]).reports[6]

    scheduler, coarse = digits.scheduler, report()
    monkeypatch.setattr(calibration, "DESCENT_SCALES", (1.0,))
    first, second = report(), report()
    assert first.distance < coarse.distance
    assert torch.equal(first.plan.sigmas, second.plan.sigmas) and first.plan.switch_index == second.plan.switch_index
    assert first.plan.solver == "heun" and first.plan.provenance["num_samples"] == 2
    assert digits.scheduler is scheduler


def test_batches_make_no_difference_to_error_profiles(digits):
    sigmas = SDMScheduler.from_config(digits.scheduler.config).published_plan(9).sigmas
    profiles = [calibration._Run(digits, SampleInputs.create(0, 6), size).eta(sigmas) for size in (6, 4, 1)]
    for profile in profiles[1:]:
        torch.testing.assert_close(profile, profiles[0], rtol=1e-3, atol=0)


def test_tolerance_sets_the_length_of_the_measured_schedule(digits):
    lengths = []
    for eta in (0.01, 0.1):
        run = calibration._Run(digits, SampleInputs.create(0, 4), 4)
        run.measure(adaptive.Tolerance(eta, 4 * eta))
        lengths.append(len(run.path))
        assert run.path[0] == pytest.approx(run.high) and run.path[-2] == pytest.approx(run.low)
    assert lengths[0] > 1.3 * lengths[1]


def test_evaluations_are_counted(digits):
    run = calibration._Run(digits, SampleInputs.create(0, 3), 2)
    calls = []
    hook = digits.unet.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    run.measure(None)
    run.report(7, calibration._Setting("heun", 2, 0.25, 4.0))
    hook.remove()
    assert sum(calls) == run.num_evaluations


@pytest.mark.parametrize("name", ["stable-diffusion-3", "flux", "dit"])
def test_other_pipelines(name):
    """Flow matching, with a shift that depends on the resolution, too, and a pipeline that doubles the batch."""
    tiny = build(name)
    scheduler = SDMScheduler.calibrate(tiny.pipe, [7], batch_size=2, inputs=inputs_of(tiny, 2))
    with plugged(tiny.pipe, scheduler):
        arguments = {**tiny.inputs(1), "generator": torch.Generator().manual_seed(0)}
        _, final = sample_latents(tiny.pipe, scheduler, 7, **arguments)
    assert final.isfinite().all()


def inputs_of(tiny, num_samples: int) -> SampleInputs:
    inputs = tiny.inputs(1)
    per_sample = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor | list)}
    common = {name: value for name, value in inputs.items() if name not in per_sample}
    per_sample = {name: value if isinstance(value, torch.Tensor) else value[0] for name, value in per_sample.items()}
    return SampleInputs.create(0, num_samples, [per_sample], **common)


def test_edm_pipelines():
    """The plan of a network with EDM preconditioning, and the very samples that calibration saw."""
    tiny = build("stable-diffusion-xl")
    tiny.pipe.scheduler = EDMEulerScheduler(sigma_max=14.0, sigma_data=1.0)
    inputs = inputs_of(tiny, 2)
    scheduler = SDMScheduler.calibrate(tiny.pipe, [7], inputs=inputs, solvers=["heun"])
    plan = scheduler.plans[7]
    assert plan.sigmas[0] == 14
    arguments = inputs.pipeline_arguments(tiny.pipe)
    weights = adaptive.step_weights(plan.num_steps, plan.switch_index)
    driven = run_on_pipeline(
        tiny.pipe, plan.sigmas, lambda x, sigmas: adaptive.adaptive_heun(x, sigmas, weights), **arguments
    )
    _, final = sample_latents(tiny.pipe, scheduler, 7, **inputs.pipeline_arguments(tiny.pipe))
    torch.testing.assert_close(final, driven.sample, rtol=0, atol=1e-3 * driven.sample.abs().max().item())


def test_an_interrupted_calibration_keeps_the_plans_that_it_saved(digits, tmp_path, monkeypatch):
    setting = calibration._Setting("heun", 3, 0.25, 4.0)
    monkeypatch.setattr(
        calibration._Run, "find_plan", lambda run, n, _: run.report(n, replace(setting, switch_index=3 - n % 2))
    )

    def save(scheduler: SDMScheduler) -> None:
        if len(scheduler.plans) == 2:
            raise KeyboardInterrupt
        scheduler.save_pretrained(tmp_path)

    with pytest.raises(KeyboardInterrupt):
        calibrate(digits, [6, 7], inputs=SampleInputs.create(0, 2), solvers=["heun"], on_plan=save)
    assert list(SDMScheduler.from_pretrained(tmp_path).plans) == [6]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": []}, "num_inference_steps"),
        ({"num_inference_steps": [1]}, "num_inference_steps.*2"),
        ({"solvers": ["rk4"]}, "solvers"),
        ({"solvers": []}, "solvers"),
        ({"inputs": SampleInputs.create(0, 2), "guidance_scale": 2.0}, "guidance_scale.*inputs"),
    ],
)
def test_bad_input(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        calibrate(digits, **arguments)


def test_a_pipeline_without_a_scheduler_is_refused(digits):
    pipe = DDPMPipeline(digits.unet, digits.scheduler)
    pipe.scheduler = None
    with pytest.raises(ValueError, match="scheduler"):
        calibrate(pipe)


# The scripts


def script(name: str, *arguments: str) -> Script:
    return run_script(ROOT / "training" / name, *arguments)


def test_script_and_distillation_from_its_result(tmp_path):
    folder = tmp_path / "sdm"
    arguments = ["--num_inference_steps", "6", "--num_samples", "2", "--solver", "heun", "--output_dir", str(folder)]
    result = script("calibrate_sdm.py", *arguments)
    assert result.returncode == 0, result.stderr
    for expected in ("DDPMPipeline", "0.65 M weights", "sigma", "eta", "curvature", "second order from", "Spent:"):
        assert expected in result.stdout
    assert (folder / "calibration.png").stat().st_size > 20_000
    scheduler = SDMScheduler.from_pretrained(folder / "scheduler")
    assert list(scheduler.plans) == [6]

    small = ["--num_teacher_samples", "16", "--num_validation_samples", "8", "--teacher_num_inference_steps", "8"]
    start = ["--initialize_from", str(folder / "scheduler"), "--max_train_iterations", "0"]
    output = ["--num_inference_steps", "4", "--output_dir", str(tmp_path / "gas")]
    result = script("train_gas.py", *start, *small, *output)
    assert result.returncode == 0, result.stderr
    solver = GASScheduler.from_pretrained(tmp_path / "gas" / "scheduler").solvers[4]
    torch.testing.assert_close(solver.times(), scheduler.initial_solver(4).times())


def test_script_says_what_is_wrong(tmp_path):
    result = script("calibrate_sdm.py", "--num_samples", "0", "--output_dir", str(tmp_path))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "num_samples" in result.stderr
