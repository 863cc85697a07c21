"""Calibration of `SDMScheduler`: the plans that it finds, what they depend on, and the script."""

import copy
import functools
import math

import pytest
import torch
from conftest import ROOT, TEACHER
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
)
from scripts import Script, run_script
from tiny_pipelines import build, plugged

from diffusers_gas import GASScheduler, SDMPlan, SDMScheduler, adaptive, calibration
from diffusers_gas.calibration import calibrate, run_on_pipeline, summary
from diffusers_gas.commands import calibrate as command_line
from diffusers_gas.comparison import training_free_schedulers
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, SampleInputs
from diffusers_gas.pipelines.teacher import CHECKED_STEPS
from diffusers_gas.schedulers.sdm_plan import SOLVERS


BUDGETS = (6, 10)
# Fewer evaluations than by default, so that tests are quick.
FEW = 3500


@pytest.fixture(scope="module")
def found(digits) -> SDMScheduler:
    return calibrate(digits, BUDGETS, inputs=SampleInputs.create(0, 24), batch_size=24, most_evaluations=FEW)


@pytest.fixture
def coarse(monkeypatch):
    """A fine solution of fewer steps, where its accuracy does not matter."""
    monkeypatch.setattr(calibration, "FINE_STEPS", 10)
    monkeypatch.setattr(calibration, "FINENESS", 2)


@functools.cache
def exact(pipe: DDPMPipeline, first_seed: int, num_samples: int) -> torch.Tensor:
    """A fine solution that shares no code with calibration but the pipeline."""
    fine, inputs = SDMScheduler.from_config(pipe.scheduler.config), SampleInputs.create(first_seed, num_samples)
    return sample_latents(pipe, fine, 255, **inputs.pipeline_arguments(pipe))[1]


def distances(pipe: DDPMPipeline, scheduler: SchedulerMixin, budget: int, inputs: SampleInputs) -> torch.Tensor:
    """Squared distance of each sample to the fine solution."""
    _, final = sample_latents(pipe, scheduler, budget, **inputs.pipeline_arguments(pipe))
    return (final - exact(pipe, inputs.seeds[0], len(inputs))).flatten(1).square().mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS)
def test_plans_beat_every_scheduler_of_diffusers_on_other_samples(digits, found, budget):
    inputs = SampleInputs.create(EVALUATION_SEED, 24)
    ours = distances(digits, found, budget, inputs)
    for name, scheduler in training_free_schedulers(digits.scheduler.config).items():
        if name.startswith(("DPM-Solver++ 3M", "UniPC")):
            theirs = distances(digits, scheduler, budget, inputs)
            assert ours.mean() < theirs.mean() and ours.median() < 0.6 * theirs.median(), name


@pytest.mark.slow
def test_reported_distances_are_those_of_the_samples_that_were_not_used_to_choose(digits, found):
    inputs = SampleInputs.create(0, 24)[16:]
    assert list(found.plans) == list(BUDGETS)
    for (budget, plan), row in zip(found.plans.items(), summary(found).splitlines()[2:], strict=True):
        n, measured = plan.num_steps, plan.provenance
        _, final = sample_latents(digits, found, budget, **inputs.pipeline_arguments(digits))
        errors = (final - exact(digits, 0, 24)[16:]).flatten(1).square().mean(1)
        # The reported ones are to a fine solution, which is itself some thousandths away on a sample or two.
        assert measured["distance"] ** 0.5 == pytest.approx(errors.mean().item() ** 0.5, abs=0.003)
        assert measured["median_distance"] == pytest.approx(errors.median().item(), rel=0.3)
        assert measured["distance_error"] == pytest.approx(errors.std().item() / 8**0.5, rel=0.5, abs=1e-4)
        trailing = DPMSolverMultistepScheduler.from_config(digits.scheduler.config, timestep_spacing="trailing")
        _, final = sample_latents(digits, trailing, budget, **inputs.pipeline_arguments(digits))
        plain = (final - exact(digits, 0, 24)[16:]).square().mean().item()
        assert measured["plain_distance"] == pytest.approx(plain, rel=0.1)
        lengths = {name: len(measured[name]) for name in ("eta", "karras_eta", "curvature", "karras_sigmas")}
        assert lengths == {"eta": n, "karras_eta": n, "curvature": n, "karras_sigmas": n + 1}
        numbers = (measured[name] for name in ("distance", "median_distance", "plain_distance"))
        assert row.startswith(f"| {budget} | {plan.solver}")
        assert row.endswith(f"| {' | '.join(f'{number:.2e}' for number in numbers)} | {measured['num_evaluations']} |")


def test_the_summary_has_plans_that_nobody_measured():
    scheduler = SDMScheduler()
    scheduler.add_plan(SDMPlan(torch.tensor([9.0, 1.0, 0.0], dtype=torch.float64), 1))
    assert summary(scheduler).splitlines()[2] == "| 2 | heun | 2 | - | 1 | - | - | - | - |"


@pytest.mark.slow
def test_a_plan_depends_on_nothing_but_its_settings(digits, found):
    """It does not depend on the other counts of the call. The pipeline is left alone."""
    scheduler, (_, n) = digits.scheduler, BUDGETS
    alone = calibrate(digits, n, inputs=SampleInputs.create(0, 24), batch_size=24, most_evaluations=FEW).plans
    assert digits.scheduler is scheduler
    assert alone[n] == found.plans[n] and alone[n].provenance == found.plans[n].provenance


@pytest.mark.parametrize("scales, distance", [((2.0, 4.0, 8.0), 1.0), ((4.0, 4.0, 4.0), 14 / 3)])
def test_samples_of_several_guidance_scales_count_alike(digits, monkeypatch, scales, distance):
    """Guidance multiplies errors. What is reported are distances in the units of the samples."""
    errors = torch.tensor([[2.0], [4.0], [8.0]])
    inputs = SampleInputs([0, 1, 2], [{"guidance_scale": scale} for scale in scales], {})
    search = calibration._PlanSearch(digits, inputs, 4)
    search.target = torch.zeros(3, 1)
    monkeypatch.setattr(search, "sample", lambda plan, positions: errors[positions.start : positions.stop])
    plan = search.scheduler.plan_for(6)
    assert search.closest([plan], 3)[0][0] == pytest.approx(distance)
    assert torch.equal(search.deviations(plan, range(3)), errors.double())


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_or_error_keeps_the_plans_that_nobody_else_has(digits, monkeypatch, ending):
    def find_plan(search, n, solvers, budget):
        if n == 8:
            raise ending
        return search.scheduler.plan_for(n)

    monkeypatch.setattr(calibration._PlanSearch, "find_plan", find_plan)
    assert list(calibrate(digits, [6, 8, 9], inputs=SampleInputs.create(0, 2)).plans) == [6]
    for arguments in ({"num_inference_steps": 8}, {"num_inference_steps": [6, 8], "on_plan": lambda scheduler: None}):
        with pytest.raises(ending):
            calibrate(digits, inputs=SampleInputs.create(0, 2), **arguments)


@pytest.mark.slow
def test_an_interrupted_calibration_goes_on_from_its_saved_plans(digits, tmp_path, coarse):
    arguments = {"inputs": SampleInputs.create(0, 3), "solvers": ["unipc"], "most_evaluations": 160}

    def save(scheduler: SDMScheduler) -> None:
        if len(scheduler.plans) == 2:
            raise KeyboardInterrupt
        scheduler.save_pretrained(tmp_path)

    with pytest.raises(KeyboardInterrupt):
        calibrate(digits, [6, 7], on_plan=save, **arguments)
    saved = SDMScheduler.from_pretrained(tmp_path)
    assert list(saved.plans) == [6]
    new: list[int] = []
    resumed = calibrate(
        digits, [6, 7], resume_from=saved, on_plan=lambda scheduler: new.append(len(scheduler.plans)), **arguments
    )
    assert new == [2] and resumed.plans[6] == saved.plans[6]
    assert resumed.plans == calibrate(digits, [6, 7], **arguments).plans
    # Plans of other settings, or of another network, are made anew.
    other = calibrate(digits, 6, resume_from=saved, **arguments | {"inputs": SampleInputs.create(1, 3)})
    assert other.plans[6].provenance["seeds"] == [1, 3]
    changed = copy.deepcopy(digits)
    with torch.no_grad():
        changed.unet.conv_out.weight.mul_(1.01)
    for pipe, new in ((changed, True), (digits, False)):
        plan = calibrate(pipe, 6, resume_from=saved, **arguments).plans[6]
        assert (plan.provenance["distance"] != saved.plans[6].provenance["distance"]) == new


def test_plans_that_are_not_asked_for_stay(tmp_path, coarse, monkeypatch):
    """Also in the folder of the command, where they would be lost."""
    monkeypatch.setattr(command_line, "draw_scheduler", lambda *arguments: None)
    command = ["--pretrained_model_name_or_path", TEACHER, "--output_dir", tmp_path, "--solver", "unipc"]
    command += ["--num_samples", 3, "--most_evaluations", 160, "--num_inference_steps"]
    for n in (6, 7):
        command_line.main([*map(str, command), str(n)])
    saved = SDMScheduler.from_pretrained(tmp_path / "scheduler")
    assert list(saved.plans) == [6, 7]
    with pytest.raises(ValueError, match="plan for 6 evaluations differs in num_samples, seeds, fingerprint"):
        command_line.main([*map(str, command), "7", "--num_samples", "4"])
    assert SDMScheduler.from_pretrained(tmp_path / "scheduler").plans == saved.plans


@pytest.mark.parametrize("name", ["dit", "stable-diffusion"])
def test_every_sample_is_compared_with_its_own_fine_solution(name):
    """Also if the pipeline doubles the batch, and if samples of other guidance are made by other calls."""
    tiny = build(name)
    inputs = inputs_of(tiny, 4)
    if name == "stable-diffusion":
        common = {name: value for name, value in inputs.common.items() if name != "guidance_scale"}
        own = [{**entries, "guidance_scale": 2.0 + 4 * (i % 2)} for i, entries in enumerate(inputs.per_sample)]
        inputs = SampleInputs(inputs.seeds, own, common)
    searches = [calibration._PlanSearch(tiny.pipe, inputs, batch_size, fine_steps=10) for batch_size in (1, 3)]
    plan = SDMPlan(searches[0].scheduler.usual_sigmas(5, searches[0].noise_schedule), 2, "unipc")
    deviations = []
    for search in searches:
        search.measure()
        deviations.append([search.deviations(plan, positions) for positions in (range(4), range(1, 3))])
        torch.testing.assert_close(deviations[-1][0][1:3], deviations[-1][1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(deviations[0][0], deviations[1][0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_plans_come_close_to_a_teacher(digits, coarse):
    """Plans for a teacher that is far from the solution of the ODE come closer to it than plans for the solution."""
    teacher = DDIMScheduler.from_config(digits.scheduler.config, timestep_spacing="trailing")
    inputs = SampleInputs.create(0, 12)
    arguments = {"inputs": inputs, "most_evaluations": 1400}
    plans = [
        calibrate(digits, 6, teacher=scheduler, teacher_num_inference_steps=10, **arguments)
        for scheduler in (teacher, None)
    ]

    def distance(plans: SDMScheduler, samples: SampleInputs) -> float:
        finals = [
            sample_latents(digits, scheduler, n, **samples.pipeline_arguments(digits))[1]
            for scheduler, n in ((plans, 6), (teacher, 10))
        ]
        return (finals[0] - finals[1]).square().mean().item()

    ours, for_solution = (distance(found, SampleInputs.create(EVALUATION_SEED, 24)) for found in plans)
    assert ours < 0.5 * for_solution
    record = plans[0].plans[6].provenance
    assert record["num_evaluations"] <= 1400
    assert (record["teacher_scheduler"], record["teacher_num_inference_steps"]) == ("DDIMScheduler", 10)
    assert record["distance"] == pytest.approx(distance(plans[0], inputs[8:]), rel=1e-3)
    # Without the teacher, or with another, a plan is made anew.
    for others in ({}, {"teacher": teacher, "teacher_num_inference_steps": 9}):
        again = calibrate(digits, 6, resume_from=plans[0], **others, **arguments)
        assert again.plans[6].provenance["distance"] != record["distance"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_candidates_are_sampled_as_the_scheduler_samples(digits, solver):
    search = calibration._PlanSearch(digits, SampleInputs.create(0, 3), 2)
    plan = SDMPlan(search.scheduler.usual_sigmas(5, search.noise_schedule), 2, solver)
    scheduler = SDMScheduler.from_config(digits.scheduler.config)
    scheduler.add_plan(plan)
    n, arguments = plan.num_inference_steps, SampleInputs.create(0, 3).pipeline_arguments(digits)
    expected = sample_latents(digits, scheduler, n, **arguments)[1]
    torch.testing.assert_close(search.sample(plan, range(3)), expected, rtol=0, atol=1e-4)


def test_bounds_are_those_of_an_error_profile(digits):
    """On the fine solution's own levels, against the errors that `eta_profile` measures along Euler's trajectory."""
    search = calibration._PlanSearch(digits, SampleInputs.create(0, 6), 6)
    search.measure()
    sigmas = torch.cat([search.levels, torch.zeros(1, dtype=torch.float64)])
    arguments, measure = SampleInputs.create(0, 6).pipeline_arguments(digits), adaptive.ErrorMeasure("rms")
    profile = run_on_pipeline(
        digits, sigmas, lambda x, levels: adaptive.eta_profile(x, levels, measure=measure), **arguments
    )
    bounds = search.step_errors(sigmas)
    assert bounds[-1] == 0
    torch.testing.assert_close(bounds[:-1], profile.eta[:-1], rtol=0.25, atol=0)
    pairs = sigmas[:-1:2]  # the bound grows with the square of the step
    assert (search.step_errors(pairs) > 2 * bounds[: 2 * len(pairs) - 2 : 2]).all()


def test_every_spacing_fills_its_range(digits):
    search = calibration._PlanSearch(digits, SampleInputs.create(0, 3), 3)
    search.measure()
    spacings = search.spacings()
    assert {"trailing", "leading", "karras", "exponential", "bound^0.25 from 16"} <= set(spacings)
    for name, spacing in spacings.items():
        levels = spacing(9)
        assert levels.shape == (9,) and (levels.diff() < 0).all(), name
        assert search.low * (1 - 1e-9) <= levels[-1] and levels[0] <= search.high * (1 + 1e-9), name
        assert ("from 16" in name) == (levels[0].item() == pytest.approx(16)), name


def test_descent_brings_a_plan_closer(digits):
    search = calibration._PlanSearch(digits, SampleInputs.create(0, 9), 9)
    search.measure()
    plan = calibration._fixed_plan(6, search.spacings()["exponential"], "unipc", "exponential")
    after, moved = search.descend(plan, 6, 20)
    distances = [search.deviations(plan, range(6)).square().mean().sqrt().item() for plan in (plan, moved)]
    assert distances[1] < 0.6 * distances[0]
    assert distances[1] == pytest.approx(after)


@pytest.mark.slow
def test_few_evaluations_under_much_guidance(coarse):
    """Higher orders overshoot there. Plans are of first order then, and closer than DDIM with any spacing."""
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "examples" / "teachers" / "text-to-emoji")
    pipe.set_progress_bar_config(disable=True)
    prompts = [{"prompt": prompt} for prompt in ("red apple", "police car", "rocket", "thinking face")]
    inputs = [SampleInputs.create(seed, 6, prompts, guidance_scale=7.5) for seed in (0, EVALUATION_SEED)]
    teacher, n = pipe.scheduler, 5
    plan = calibrate(pipe, n, inputs=inputs[0], teacher=teacher, teacher_num_inference_steps=20, most_evaluations=700)
    many, ours = (finals(pipe, inputs[1], *arguments) for arguments in ((teacher, 20), (plan, n)))
    for spacing in ("linspace", "leading", "trailing"):
        ddim = DDIMScheduler.from_config(teacher.config, timestep_spacing=spacing, clip_sample=False)
        theirs = finals(pipe, inputs[1], ddim, n)
        assert (ours - many).square().mean() < (theirs - many).square().mean(), spacing


def finals(pipe: StableDiffusionPipeline, inputs: SampleInputs, scheduler: SchedulerMixin, steps: int) -> torch.Tensor:
    return sample_latents(pipe, scheduler, steps, **inputs.pipeline_arguments(pipe))[1]


def test_one_sample_that_ends_elsewhere_does_not_decide_between_candidates(digits, monkeypatch):
    search = calibration._PlanSearch(digits, SampleInputs.create(0, 6), 6)
    plans = [SDMPlan(search.scheduler.usual_sigmas(n, search.noise_schedule), 1, "unipc") for n in (4, 5, 6)]
    errors = dict(zip(plans, ([0.3, 0.3, 0.3, 0.3], [0.1, 0.1, 0.1, 0.7], [math.nan, 0.1, 0.1, 0.1])))
    monkeypatch.setattr(search, "deviations", lambda plan, positions: torch.tensor(errors[plan])[:, None])
    ranked = search.closest(plans, 4)
    assert [plan for _, plan in ranked] == [plans[1], plans[0], plans[2]]
    assert [distance for distance, _ in ranked] == pytest.approx([0.25, 0.3, math.inf])


@pytest.mark.parametrize("num_inference_steps", [18, 70, 256])
def test_the_budget_is_for_several_plans_on_several_samples(digits, monkeypatch, num_inference_steps):
    """Of many evaluations, too, and towards a finer solution than they are."""

    class Known(Exception):
        pass

    def closest(self, plans, num_samples):
        assert len(plans) > 8 and num_samples == 4 and self.fine_steps == 3 * num_inference_steps
        raise Known

    monkeypatch.setattr(calibration._PlanSearch, "closest", closest)
    monkeypatch.setattr(calibration._PlanSearch, "measure", pretend_to_measure)
    with pytest.raises(Known):
        calibrate(digits, num_inference_steps)


def pretend_to_measure(search):
    search.num_evaluations += search.num_shared_evaluations
    search.target, search.shift = torch.zeros(24, 1), 1.0
    search.levels = adaptive.sigma_grid(search.fine_steps, search.low, search.high, "loglinear")
    search.slope = torch.ones(search.fine_steps - 1, dtype=torch.float64)


@pytest.mark.parametrize("num_samples, further", [(5, 0), (5, 21), (5, 180), (2, 0), (2, 14)])
def test_evaluations_are_counted_and_limited(digits, coarse, num_samples, further):
    """Also by the least limit that is accepted: it leaves room for little of the search."""
    calls: list[int] = []
    most_evaluations = (calibration.FINENESS * 7 + 2 * 7) * num_samples + further
    options = {"inputs": SampleInputs.create(0, num_samples), "batch_size": 3}
    with pytest.raises(ValueError, match="`most_evaluations` must be at least"):
        calibrate(digits, 7, most_evaluations=most_evaluations - further - 1, **options)
    hook = digits.unet.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    (plan,) = calibrate(digits, 7, most_evaluations=most_evaluations, **options).plans.values()
    hook.remove()
    checked = 2 * CHECKED_STEPS
    assert 0.7 * most_evaluations < sum(calls) - checked == plan.provenance["num_evaluations"] <= most_evaluations


@pytest.mark.parametrize("name", ["stable-diffusion-3", "flux", "dit"])
def test_other_pipelines(name, coarse):
    """Flow matching, also with a shift that depends on the resolution, and a pipeline that doubles the batch."""
    tiny = build(name)
    scheduler = calibrate(tiny.pipe, 5, batch_size=2, inputs=inputs_of(tiny, 3), most_evaluations=100)
    with plugged(tiny.pipe, scheduler):
        arguments = {**tiny.inputs(1), "generator": torch.Generator().manual_seed(0)}
        _, final = sample_latents(tiny.pipe, scheduler, 5, **arguments)
    assert final.isfinite().all()


def inputs_of(tiny, num_samples: int) -> SampleInputs:
    inputs = tiny.inputs(1)
    per_sample = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor | list)}
    common = {name: value for name, value in inputs.items() if name not in per_sample}
    per_sample = {name: value if isinstance(value, torch.Tensor) else value[0] for name, value in per_sample.items()}
    return SampleInputs.create(0, num_samples, [per_sample], **common)


def test_edm_pipelines(coarse):
    """The plan of a network with EDM preconditioning. Its samples are those of the same method in `adaptive/`."""
    tiny = build("stable-diffusion-xl")
    tiny.pipe.scheduler = EDMEulerScheduler(sigma_max=14.0, sigma_data=1.0)
    inputs = inputs_of(tiny, 2)
    scheduler = calibrate(tiny.pipe, 7, inputs=inputs, solvers=["heun"], most_evaluations=160)
    plan = scheduler.plans[7]
    assert plan.sigmas[0] == 14
    arguments = inputs.pipeline_arguments(tiny.pipe)
    weights = adaptive.step_weights(plan.num_steps, plan.switch_index)
    driven = run_on_pipeline(
        tiny.pipe, plan.sigmas, lambda x, sigmas: adaptive.adaptive_heun(x, sigmas, weights), **arguments
    )
    _, final = sample_latents(tiny.pipe, scheduler, 7, **inputs.pipeline_arguments(tiny.pipe))
    torch.testing.assert_close(final, driven.sample, rtol=0, atol=1e-3 * driven.sample.abs().max().item())


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
        ({"inputs": SampleInputs.create(0, 1)}, "2 samples"),
        ({"most_evaluations": 1000}, "at least 1776"),
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


@pytest.mark.parametrize("target", ["ode", "teacher", "plans", "report"])
def test_samples_that_are_not_finite_are_refused(digits, coarse, monkeypatch, target):
    """One in the target, one that every plan samples, or one to report on. A plan was chosen nevertheless, and its distance recorded as NaN."""
    teacher = DDIMScheduler.from_config(digits.scheduler.config) if target == "teacher" else None
    overflowing = target in ("ode", "teacher")

    def overflow(module, args, output):
        if (overflowing and target != "report") or (target == "report" and len(output[0]) == 2):
            output[0][-1:] = torch.nan

    def spacings(measurement):
        nonlocal overflowing
        overflowing = True
        return own_spacings(measurement)

    own_spacings = calibration._PlanSearch.spacings
    monkeypatch.setattr(calibration._PlanSearch, "spacings", spacings)
    options = {"inputs": SampleInputs.create(0, 6), "teacher": teacher, "teacher_num_inference_steps": 8}
    with digits.unet.register_forward_hook(overflow), pytest.raises(ValueError, match="samples are not finite"):
        calibrate(digits, 6, most_evaluations=1000, **options)


# The scripts


def script(name: str, *arguments: str) -> Script:
    return run_script(ROOT / "training" / name, *arguments)


@pytest.mark.slow
def test_script_and_distillation_from_its_result(tmp_path):
    folder = tmp_path / "sdm"
    arguments = [
        "--num_inference_steps",
        "6",
        "--num_samples",
        "3",
        "--most_evaluations",
        "400",
        "--output_dir",
        str(folder),
    ]
    result = script("calibrate_sdm.py", *arguments)
    assert result.returncode == 0, result.stderr
    for expected in ("DDPMPipeline", "0.65 M weights", "sigma", "eta", "curvature", "order from", "| cost |", "Price"):
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
