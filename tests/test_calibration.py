"""Calibration of `SDMScheduler`: the plans that it finds, what they depend on, and the script."""

import functools

import pytest
import torch
from conftest import ROOT
from diffusers import DDPMPipeline, EDMEulerScheduler
from scripts import Script, run_script
from tiny_pipelines import build, plugged

from diffusers_gas import GASScheduler, SDMPlan, SDMScheduler, adaptive, calibration
from diffusers_gas.calibration import calibrate, heun_plan, run_on_pipeline, summary
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, SampleInputs


BUDGETS = (8, 11)


@pytest.fixture(autouse=True, scope="module")
def coarse():
    """Smaller measurements and searches, so that tests are quick."""
    patch = pytest.MonkeyPatch()
    patch.setattr(calibration, "BASE_STEPS", 16)
    patch.setattr(calibration, "REFERENCE_STEPS", 24)
    patch.setattr(calibration, "EXPONENTS", (0.2,))
    patch.setattr(calibration, "LAST_LEVELS", (4.0, 16.0))
    patch.setattr(calibration, "DESCENT_SCALES", ())
    yield
    patch.undo()


@pytest.fixture(scope="module")
def found(digits) -> SDMScheduler:
    return calibrate(digits, BUDGETS, inputs=SampleInputs.create(0, 12), batch_size=8)


@functools.cache
def exact(pipe: DDPMPipeline, first_seed: int, num_samples: int) -> torch.Tensor:
    """A fine solution that shares no code with calibration but the pipeline."""
    fine, inputs = SDMScheduler.from_config(pipe.scheduler.config), SampleInputs.create(first_seed, num_samples)
    return sample_latents(pipe, fine, 99, **inputs.pipeline_arguments(pipe))[1]


def distance(pipe: DDPMPipeline, scheduler: SDMScheduler, budget: int, inputs: SampleInputs) -> float:
    """Mean squared distance to the fine solution."""
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
        "sdm": found.plans[budget],
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
    rows = summary(found).splitlines()[2:]
    assert list(found.plans) == list(BUDGETS)
    for (budget, plan), row in zip(found.plans.items(), rows, strict=True):
        n, measured = plan.num_steps, plan.provenance
        # Calibration's own fine solution is a coarse one in these tests.
        assert measured["distance"] == pytest.approx(distance(digits, found, budget, inputs), rel=0.4)
        assert measured["distance"] < min(measured["euler_distance"], measured["heun_distance"])
        lengths = {name: len(measured[name]) for name in ("eta", "karras_eta", "curvature", "karras_sigmas")}
        assert lengths == {"eta": n, "karras_eta": n, "curvature": n, "karras_sigmas": n + 1}
        cost = measured["num_evaluations"] / 12
        assert row.startswith(f"| {budget} | {plan.solver} | {n} |")
        assert row.endswith(
            f"| {measured['distance']:.2e} | {measured['euler_distance']:.2e} | "
            f"{measured['heun_distance']:.2e} | {cost:.0f} |"
        )


def test_the_summary_has_plans_that_nobody_measured():
    scheduler = SDMScheduler()
    scheduler.add_plan(SDMPlan(torch.tensor([9.0, 1.0, 0.0], dtype=torch.float64), 1))
    assert summary(scheduler).splitlines()[2] == "| 2 | heun | 2 | - | 1 | - | - | - | - |"


def test_a_plan_does_not_depend_on_the_other_counts_of_the_call(digits, monkeypatch):
    monkeypatch.setattr(calibration, "EXPONENTS", (0.0, 0.4))
    monkeypatch.setattr(calibration, "LAST_LEVELS", (1.0, 16.0))
    inputs = SampleInputs.create(0, 2)
    together = calibrate(digits, [9, 4, 6], inputs=inputs).plans
    assert list(together) == [4, 6, 9]
    for n in (6, 9):
        (alone,) = calibrate(digits, n, inputs=inputs).plans.values()
        assert together[n] == alone and together[n].provenance == alone.provenance


def test_descent_is_reproducible_and_leaves_the_pipeline_alone(digits, monkeypatch):
    def plan() -> SDMPlan:
        return calibrate(digits, [6], inputs=SampleInputs.create(5, 2), solvers=["heun"]).plans[6]

    scheduler, coarse = digits.scheduler, plan()
    monkeypatch.setattr(calibration, "DESCENT_SCALES", (1.0,))
    first, second = plan(), plan()
    assert first.provenance["distance"] < coarse.provenance["distance"]
    assert first == second
    assert first.solver == "heun" and first.provenance["num_samples"] == 2
    assert digits.scheduler is scheduler


@pytest.mark.parametrize("solver", calibration.SOLVERS)
def test_candidates_are_sampled_as_the_scheduler_samples(digits, solver):
    search = calibration._PlanSearch(digits, SampleInputs.create(0, 3), 3)
    plan = SDMPlan(search.karras(5), 2, solver)
    scheduler = SDMScheduler.from_config(digits.scheduler.config)
    scheduler.add_plan(plan)
    n, arguments = plan.num_inference_steps, search.batches[0].pipeline_arguments(digits)
    assert torch.equal(search.sample(plan)[0], sample_latents(digits, scheduler, n, **arguments)[1])


def test_batches_make_no_difference_to_error_profiles(digits):
    sigmas = SDMScheduler.from_config(digits.scheduler.config).published_plan(9).sigmas
    profiles = [calibration._PlanSearch(digits, SampleInputs.create(0, 6), size).eta(sigmas) for size in (6, 4, 1)]
    for profile in profiles[1:]:
        torch.testing.assert_close(profile, profiles[0], rtol=1e-3, atol=0)


def test_tolerance_sets_the_length_of_the_measured_schedule(digits):
    lengths = []
    for eta in (0.01, 0.1):
        search = calibration._PlanSearch(digits, SampleInputs.create(0, 4), 4)
        search.measure(adaptive.Tolerance(eta, 4 * eta))
        lengths.append(len(search.path))
        assert search.path[0] == pytest.approx(search.high) and search.path[-2] == pytest.approx(search.low)
    assert lengths[0] > 1.3 * lengths[1]


def test_evaluations_are_counted(digits):
    search = calibration._PlanSearch(digits, SampleInputs.create(0, 3), 2)
    calls = []
    hook = digits.unet.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    search.measure(None)
    measured = search.num_evaluations
    plan = search.find_plan(7, ["heun"])
    hook.remove()
    assert sum(calls) == search.num_evaluations == plan.provenance["num_evaluations"] > measured > 0


@pytest.mark.parametrize("name", ["stable-diffusion-3", "flux", "dit"])
def test_other_pipelines(name):
    """Flow matching, also with a shift that depends on the resolution, and a pipeline that doubles the batch."""
    tiny = build(name)
    scheduler = calibrate(tiny.pipe, 7, batch_size=2, inputs=inputs_of(tiny, 2))
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
    """The plan of a network with EDM preconditioning. Its samples are those of the same method in `adaptive/`."""
    tiny = build("stable-diffusion-xl")
    tiny.pipe.scheduler = EDMEulerScheduler(sigma_max=14.0, sigma_data=1.0)
    inputs = inputs_of(tiny, 2)
    scheduler = calibrate(tiny.pipe, 7, inputs=inputs, solvers=["heun"])
    plan = scheduler.plans[7]
    assert plan.sigmas[0] == 14
    arguments = inputs.pipeline_arguments(tiny.pipe)
    weights = adaptive.step_weights(plan.num_steps, plan.switch_index)
    driven = run_on_pipeline(
        tiny.pipe, plan.sigmas, lambda x, sigmas: adaptive.adaptive_heun(x, sigmas, weights), **arguments
    )
    _, final = sample_latents(tiny.pipe, scheduler, 7, **inputs.pipeline_arguments(tiny.pipe))
    torch.testing.assert_close(final, driven.sample, rtol=0, atol=1e-3 * driven.sample.abs().max().item())


def test_an_interrupted_calibration_keeps_its_saved_plans(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "LAST_LEVELS", (4.0,))

    def save(scheduler: SDMScheduler) -> None:
        if len(scheduler.plans) == 2:
            raise KeyboardInterrupt
        scheduler.save_pretrained(tmp_path)

    with pytest.raises(KeyboardInterrupt):
        calibrate(digits, [6, 7], inputs=SampleInputs.create(0, 2), solvers=["heun"], on_plan=save)
    assert list(SDMScheduler.from_pretrained(tmp_path).plans) == [6]


def test_a_method_may_begin_anywhere(digits):
    """A method's first request need not be the pipeline's own noise, e.g. if the noise is churned first."""
    asked = []

    def twice_elsewhere(x, levels):
        first = yield 0.5 * x, levels[1]
        second = yield 0.5 * x, levels[1]
        third = yield x, levels[0]
        return first, second, third

    def at_once(x, levels):
        first = yield x, levels[0]
        return first

    sigmas = torch.tensor([20.0, 10.0, 0.0], dtype=torch.float64)
    arguments = SampleInputs.create(0, 2).pipeline_arguments
    hook = digits.unet.register_forward_hook(lambda *_: asked.append(1))
    first, second, third = run_on_pipeline(digits, sigmas, twice_elsewhere, **arguments(digits))
    own = run_on_pipeline(digits, sigmas, at_once, **arguments(digits))
    hook.remove()
    assert len(asked) == 4 + 1
    assert torch.equal(first, second) and not torch.allclose(first, own, atol=1e-2)
    torch.testing.assert_close(third, own, rtol=0, atol=1e-3)


def test_a_pipeline_that_starts_from_an_image_is_refused():
    tiny = build("stable-diffusion-img2img")
    with pytest.raises(ValueError, match="text-to-image"):
        calibrate(tiny.pipe, 7, batch_size=2, inputs=inputs_of(tiny, 2))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": []}, "num_inference_steps"),
        ({"num_inference_steps": [1]}, "num_inference_steps.*2"),
        ({"num_inference_steps": 1}, "num_inference_steps.*2"),
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
    for expected in ("DDPMPipeline", "0.65 M weights", "sigma", "eta", "curvature", "second order from", "| cost |"):
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
