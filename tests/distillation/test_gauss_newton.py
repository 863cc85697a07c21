"""Gauss-Newton distillation on the shipped teacher."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler, ImagePipelineOutput
from tiny_pipelines import build
from torch.nn.utils import parameters_to_vector

from diffusers_gas import GASScheduler
from diffusers_gas.distillation.gauss_newton import (
    LINEARIZED,
    TRANSPORTED,
    Problem,
    best_initial_solver,
    distill_gauss_newton,
    most_evaluations,
)
from diffusers_gas.generalized_solver import GeneralizedSolver
from diffusers_gas.least_squares import Loss
from diffusers_gas.pipelines import driving
from diffusers_gas.pipelines.driving import differentiable_rollout, num_evaluations, sample_latents, scheduler_config
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache, TeacherSamples


@pytest.fixture(scope="module")
def samples(digits, tmp_path_factory) -> tuple[TeacherSamples, TeacherSamples]:
    scheduler = GASScheduler.from_config(digits.scheduler.config)
    cache = TeacherCache(tmp_path_factory.mktemp("teacher"), "digits", scheduler, 25)
    training = cache.collect(digits, SampleInputs.create(0, 64), 64, "")
    return training, cache.collect(digits, SampleInputs.create(50_000, 64), 64, "")


@pytest.fixture
def theory(digits) -> GASScheduler:
    return GASScheduler.from_config(digits.scheduler.config, t_start=0.8)


@pytest.fixture
def perturbed(theory) -> GeneralizedSolver:
    """A 3-step solver in which every parameter has some effect."""
    solver = theory.theory_solver(3)
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return solver


def test_rollout_is_what_the_scheduler_samples(digits, perturbed, samples):
    batch = samples[0][:4]
    scheduler = GASScheduler.from_config(digits.scheduler.config)
    scheduler.add_solver(perturbed)
    _, expected = sample_latents(digits, scheduler, 3, **batch.inputs.pipeline_arguments(digits))
    loss, distance = Problem(digits, Loss(), 4).losses(perturbed, batch)
    assert loss == distance == pytest.approx((expected - batch.final).square().mean().item(), rel=1e-4)


def test_linearization_is_the_gradient_by_automatic_differentiation(digits, perturbed, samples, monkeypatch):
    monkeypatch.setitem(driving.STATE_DIFFERENCE, torch.float32, 5e-4)
    monkeypatch.setattr(driving, "TIME_DIFFERENCE", 5e-5)
    batch = samples[0][:4]
    problem = Problem(digits, Loss(), 2)
    problem.linearize(perturbed, batch)

    final = differentiable_rollout(digits, perturbed, **batch.inputs.pipeline_arguments(digits))
    (0.5 * (final - batch.final).square().mean()).backward()
    gradients = {name: parameter.grad.flatten() for name, parameter in perturbed.named_parameters()}
    sizes = [gradient.numel() for gradient in gradients.values()]
    for (name, expected), actual in zip(gradients.items(), problem.gradient.split(sizes)):
        assert (actual - expected).norm() < 0.05 * expected.norm(), name


def test_evaluations_are_counted(digits, perturbed, samples):
    calls = []
    handle = digits.unet.register_forward_hook(lambda *_: calls.append(1))
    problem = Problem(digits, Loss(), 2)
    problem.linearize(perturbed, samples[0][:2])
    handle.remove()
    assert len(calls) == num_evaluations(3) == problem.evaluations / 2


def test_a_step_keeps_offsets_that_a_file_may_hold(digits, perturbed, samples, monkeypatch):
    """Where a network hardly depends on time, its loss says nothing against an offset of many times."""
    problem = Problem(digits)
    monkeypatch.setattr(problem, "losses_of_samples", lambda _, batch: (torch.zeros(len(batch)),) * 2)
    start = parameters_to_vector(perturbed.parameters()).detach()
    problem.normal, gradient = torch.eye(len(start), dtype=torch.float64), torch.full_like(start, -5)
    problem.gradient = gradient
    problem.descend(perturbed, samples[0][:2], 1.0, 1e-6)
    assert perturbed.timestep_offsets.tolist() == [1, 1, 1] and (perturbed.data_coefficients > 4).any()
    GeneralizedSolver.from_tensors(perturbed.state_dict(), **perturbed.config())
    moved = parameters_to_vector(perturbed.parameters()) - start
    torch.testing.assert_close(problem.gradient, gradient + TRANSPORTED * moved)


def test_a_reachable_teacher_is_recovered(digits, perturbed, samples, theory):
    scheduler = GASScheduler.from_config(digits.scheduler.config)
    scheduler.add_solver(perturbed)

    def retaught(batch: TeacherSamples) -> TeacherSamples:
        _, final = sample_latents(digits, scheduler, 3, **batch.inputs.pipeline_arguments(digits))
        return TeacherSamples(batch.inputs, batch.noise, final)

    training, validation = retaught(samples[0][:16]), retaught(samples[1][:8])
    result = distill_gauss_newton(Problem(digits), theory.theory_solver(3), training, validation, max_iterations=8)
    assert result.distance < 1e-2 * result.initial_distance


@pytest.mark.parametrize(
    "loss",
    [
        Loss("l2"),
        Loss("l1"),
        Loss("mixed"),
        Loss(features=lambda x: torch.nn.functional.avg_pool2d(x, 2)),
    ],
)
def test_distillation_improves_held_out_samples(digits, samples, theory, loss):
    start = theory.theory_solver(2)
    before = copy.deepcopy(start.state_dict())
    improvements, history = [], []
    problem, samples = Problem(digits, loss), (samples[0], samples[1][:32])
    result = distill_gauss_newton(
        problem,
        start,
        *samples,
        max_iterations=8,
        on_improvement=improvements.append,
        on_judgement=history.append,
        teacher_num_inference_steps=25,
    )
    assert problem.losses(result.solver, samples[1])[0] < 0.85 * problem.losses(start, samples[1])[0]
    assert problem.losses(result.solver, samples[1])[1] == pytest.approx(result.distance)
    assert improvements[-1] is result.solver
    assert [(numbers["num_samples"], numbers["damping"] > 0) for numbers in history] == [(32, True), (32, True)]
    assert result.evaluations > history[-1]["evaluations"] - 1 > 25 * (32 + 32) + 8 * 8 * num_evaluations(2)
    assert all(torch.equal(before[name], value) for name, value in start.state_dict().items())


def test_an_interrupt_keeps_the_best_solver(digits, samples, theory):
    def interrupt(solver: GeneralizedSolver) -> None:
        raise KeyboardInterrupt

    result = distill_gauss_newton(Problem(digits), theory.theory_solver(2), *samples, on_improvement=interrupt)
    assert result.distance < result.initial_distance
    assert Problem(digits, Loss(), 64).losses(result.solver, samples[1])[1] == pytest.approx(result.distance)


@pytest.mark.parametrize(
    "limit, iterations, stops",
    [({"max_iterations": 8}, (6, 2), (4, 6, 7)), ({"max_evaluations": 1560}, (2, 5), (2, 4))],  # with none to spare
)
def test_an_interrupted_fit_ends_as_the_uninterrupted_one(digits, samples, theory, limit, iterations, stops):
    """Within a phase, before and after a judgement, at the end of the first phase, and in the second."""
    start, settings = theory.theory_solver(2), {**limit, "teacher_num_inference_steps": 25, "detail": True}
    samples = [batch[:16] for batch in samples]
    states: dict = {}
    keep = {"on_state": lambda iteration, state: states.update({iteration: copy.deepcopy(state)})}
    assert distill_gauss_newton(
        Problem(digits), start, *samples, interrupted=lambda: True, **keep, **settings
    ).interrupted
    assert list(states) == [1]
    stopped = states.pop(1)
    expected = distill_gauss_newton(Problem(digits), start, *samples, **keep, **settings)
    assert [state["phase"] for state in states.values()] == [0] * iterations[0] + [1] * iterations[1]
    for state in (stopped, *(states[stop] for stop in stops)):
        found = distill_gauss_newton(Problem(digits), start, *samples, state=state, **settings)
        for name, value in expected.solver.state_dict().items():
            assert torch.equal(found.solver.state_dict()[name], value), name
        for name in ("initial_distance", "num_samples", "recent_gain", "evaluations"):
            assert getattr(found, name) == getattr(expected, name)
        assert found.seconds > state["seconds"] > 0


def test_normal_equations_of_shares_add_up(digits, perturbed, samples):
    batch = samples[0][:4]
    whole, total = Problem(digits, Loss(), 4), None
    whole.linearize(perturbed, batch)
    for share in (batch[:2], batch[2:]):
        problem = Problem(digits, Loss(), 4)  # its basis is that of its own first batch
        problem.linearize(perturbed, share)
        parts = torch.cat([problem.normal, problem.gradient[None]])
        total = parts if total is None else total + parts
    expected = torch.cat([whole.normal, whole.gradient[None]])
    assert (total / 2 - expected).norm() < 0.05 * expected.norm()
    assert (total[-1] / 2 - whole.gradient).norm() < 0.05 * whole.gradient.norm()


def test_samples_are_read_as_they_are_needed(digits, samples, theory):
    class Recorded:
        read = 0

        def __len__(self) -> int:
            return len(samples[0])

        def __getitem__(self, index: slice) -> TeacherSamples:
            self.read = max(self.read, index.stop)
            return samples[0][index]

    training = Recorded()
    result = distill_gauss_newton(Problem(digits), theory.theory_solver(3), training, samples[1], max_iterations=2)
    assert training.read == result.num_samples == 2 * LINEARIZED


def test_the_expected_cost_is_that_of_a_fit(digits, samples, theory):
    problem, limits, samples = Problem(digits), {"max_iterations": 4}, (samples[0], samples[1][:16])
    start = best_initial_solver(problem, 3, samples[0])
    common = {"teacher_num_inference_steps": 25, **limits}
    result = distill_gauss_newton(problem, start, *samples, **common)
    expected = most_evaluations(3, 25, len(samples[0]), len(samples[1]), **limits)
    assert expected / 2 < result.evaluations <= expected


def test_a_fit_stays_within_its_evaluations_and_says_what_more_would_bring(digits, samples, theory):
    few = samples[0], samples[1][:16]
    common: dict = {"teacher_num_inference_steps": 25, "max_evaluations": 2500}
    result = distill_gauss_newton(Problem(digits), theory.theory_solver(2), *few, **common)
    most = most_evaluations(2, 25, len(few[0]), len(few[1]), max_evaluations=2500)
    assert 0.8 * most < result.evaluations <= most == 2500
    assert result.recent_gain is not None and f"{result.recent_gain:.1%}" in result.ending
    start = theory.theory_solver(3)
    nothing = distill_gauss_newton(Problem(digits), start, *few, max_evaluations=10)
    assert all(map(torch.equal, start.parameters(), nothing.solver.parameters()))


def test_a_fit_ends_when_it_has_converged(digits, samples, theory):
    """To a teacher of its own kind, of which it finds the exact solver."""
    scheduler = GASScheduler.from_config(digits.scheduler.config)
    scheduler.add_solver(theory.theory_solver(1))

    def retaught(batch: TeacherSamples) -> TeacherSamples:
        _, final = sample_latents(digits, scheduler, 1, **batch.inputs.pipeline_arguments(digits))
        return TeacherSamples(batch.inputs, batch.noise, final)

    training, validation = (retaught(batch[:8]) for batch in samples)
    result = distill_gauss_newton(Problem(digits), theory.theory_solver(1), training, validation, detail=True)
    assert result.recent_gain is None and result.ending == "converged."
    assert result.evaluations < most_evaluations(1, 0, 8, 8) / 2


def test_the_second_phase_restores_detail(digits, samples, theory):
    """From where the first has ended, at little cost in squared distance."""
    states: dict = {}
    keep = {"on_state": lambda iteration, state: states.update({state["phase"]: copy.deepcopy(state["solver"])})}
    start, absolute, problem = theory.theory_solver(2), Problem(digits, Loss("l1")), Problem(digits)
    samples = samples[0], samples[1][:32]
    result = distill_gauss_newton(problem, start, *samples, detail=True, max_iterations=24, **keep)
    assert problem.loss == Loss() and 0 < problem.evaluations <= result.evaluations
    start.load_state_dict(states[0])
    before, after = (absolute.losses(solver, samples[1]) for solver in (start, result.solver))
    assert after[0] < 0.95 * before[0] and after[1] < 1.15 * before[1]


def test_samples_that_end_elsewhere_do_not_lead_the_fit(digits, samples, theory):
    """A fit ends nearly where it does with the right ones if one in four teacher samples is of another seed."""
    final = samples[0].final.clone()
    final[::4] = final[::4].roll(1, 0)
    problem, results, samples = Problem(digits), [], (samples[0], samples[1][:32])
    for training in (samples[0], replace(samples[0], final=final)):
        fitted = distill_gauss_newton(Problem(digits), theory.theory_solver(3), training, samples[1], max_iterations=4)
        results.append(problem.losses_of_samples(fitted.solver, samples[1])[0].log().mean().exp().item())
    start = problem.losses_of_samples(theory.theory_solver(3), samples[1])[0].log().mean().exp().item()
    assert results[1] < 1.1 * results[0] < 0.6 * start


def test_improvements_exceed_their_error(digits):
    """One sample that ends elsewhere does not hide that all others improve."""
    problem, before = Problem(digits), torch.full((32,), 1e-2, dtype=torch.float64)
    others = before / 2
    others[0] = 0.5
    assert problem.is_better(others, before)
    assert not problem.is_better(before, others)


@pytest.mark.parametrize("family", ["dit", "flux", "stable-diffusion", "stable-diffusion-3"])
def test_every_kind_of_pipeline_can_be_distilled(family, tmp_path):
    tiny = build(family)
    arguments = tiny.inputs(1)
    counts = ("batch_size", "num_images_per_prompt")
    entry = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor | list)}
    entry = {name: value[0] if isinstance(value, list) else value for name, value in entry.items()}
    common = {name: value for name, value in arguments.items() if name not in (*entry, *counts)}
    inputs = SampleInputs.create(0, 4, [entry], **common)
    teacher = TeacherCache(tmp_path, family, tiny.pipe.scheduler, 8)
    samples = teacher.collect(tiny.pipe, inputs, 2, "")
    assert len(samples.final) == 4
    problem = Problem(tiny.pipe, batch_size=2)
    start = best_initial_solver(problem, 3, samples)
    result = distill_gauss_newton(problem, start, samples, samples, max_iterations=2)
    assert result.distance < result.initial_distance


def test_shares_of_processes_add_up(digits, perturbed, samples):
    whole, shares = Problem(digits, Loss(), 4), []
    for share in (samples[0][:2], samples[0][2:4]):
        parts = []

        def record(tensor: torch.Tensor, parts=parts) -> torch.Tensor:
            parts.append(tensor)
            return tensor

        problem = Problem(digits, Loss(), 4, record)
        problem.losses(perturbed, share)
        shares.append(parts)
    loss, distance = whole.losses(perturbed, samples[0][:4])
    count, *sums = shares[0][-1] + shares[1][-1]  # the first that is summed is the number of processes
    assert [total / count for total in sums] == pytest.approx([loss, distance])


def test_start_is_the_closest_candidate(digits, samples, perturbed):
    problem, few = Problem(digits), samples[0][:LINEARIZED]
    start = best_initial_solver(problem, 3, samples[0], [perturbed])
    plain = GASScheduler.from_config(digits.scheduler.config).theory_solver(3)
    loss = problem.losses(start, few)[0]
    assert loss <= min(problem.losses(plain, few)[0], problem.losses(perturbed, few)[0])


def test_candidates_are_of_the_noise_schedule_that_was_set_later(digits, samples, monkeypatch):
    scheduler, tried = DPMSolverMultistepScheduler.from_config(digits.scheduler.config), []
    scheduler.config.beta_end = 0.01
    monkeypatch.setattr(digits, "scheduler", scheduler)
    problem = Problem(digits)

    def losses_of_samples(candidate, samples):
        tried.append(candidate)
        return torch.ones(len(samples)), None

    monkeypatch.setattr(problem, "losses_of_samples", losses_of_samples)
    best_initial_solver(problem, 3, samples[0])
    expected = GASScheduler.from_config(scheduler_config(digits), use_karras_sigmas=True).theory_solver(3)
    assert expected.content() in [candidate.content() for candidate in tried]


def test_one_more_step_keeps_the_distribution_of_times(perturbed):
    more = perturbed.with_one_more_step()
    assert more.num_inference_steps == 4
    times, more_times = perturbed.times(), more.times()
    assert more_times[[0, -1]].tolist() == pytest.approx(times[[0, -1]].tolist())
    between = (more_times[1:-1] <= times[:-1]) & (more_times[1:-1] >= times[1:])
    assert between.all()


def test_half_precision_networks_can_be_distilled(samples, theory, digits):
    half = DDPMPipeline(copy.deepcopy(digits.unet).to(torch.bfloat16), digits.scheduler)
    result = distill_gauss_newton(Problem(half), theory.theory_solver(3), *samples, max_iterations=4)
    assert result.distance < 0.9 * result.initial_distance


class Careless(DDPMPipeline):
    """Writes into its own tensors, before and after it hands them on, as some video pipelines do.

    It also shifts the noise level by the number of steps.
    """

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=50):
        state = torch.stack([torch.randn(1, 8, 8, generator=g) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            output = self.unet(state, t).sample / (1 + 1 / num_inference_steps)
            following = self.scheduler.step(output, t, state).prev_sample
            output.fill_(torch.nan)
            state.copy_(following)
            following.fill_(torch.nan)
        return ImagePipelineOutput(images=state)


def test_what_is_fitted_is_what_is_sampled_by_a_careless_pipeline(digits, perturbed, samples):
    pipe = Careless(unet=digits.unet, scheduler=digits.scheduler)
    batch = samples[0][:4]
    scheduler = GASScheduler.from_config(digits.scheduler.config)
    scheduler.add_solver(perturbed)
    arguments = batch.inputs.pipeline_arguments(pipe)
    noise, expected = sample_latents(pipe, scheduler, 3, **arguments)
    assert torch.equal(noise, batch.noise) and expected.isfinite().all()
    problem = Problem(pipe, Loss(), 4)
    assert problem.losses(perturbed, batch)[1] == pytest.approx(
        (expected - batch.final).square().mean().item(), rel=1e-4
    )
    problem.linearize(perturbed, batch)
    assert problem.normal.isfinite().all() and problem.gradient.norm() > 0
    _, improved = Problem(pipe, Loss(), 4).losses(
        distill_gauss_newton(Problem(pipe), perturbed, batch, batch, max_iterations=2).solver, batch
    )
    assert improved < problem.losses(perturbed, batch)[1]


def test_a_fit_that_has_read_all_samples_goes_on_in_more_processes(digits, samples, theory):
    """Of 16 samples each of 3 has 5, and not a third of 16, rounded up."""
    states, start, validation = [], theory.theory_solver(2), samples[1][:4]
    keep = {"on_state": lambda _, state: states.append(copy.deepcopy(state)), "detail": True}
    distill_gauss_newton(Problem(digits), start, samples[0][:16], validation, max_iterations=4, **keep)
    assert (states[-1]["phase"], states[-1]["num_samples"]) == (1, 16)
    problem, settings = Problem(digits, reduce=lambda tensor: 3 * tensor), {"state": states[-1], "detail": True}
    result = distill_gauss_newton(problem, start, samples[0][:5], validation, max_iterations=6, **settings)
    assert result.num_samples == 15


def test_calls_that_run_out_of_memory_do_not_count(digits, perturbed, samples):
    """In one process more often than in another; the processes of a fit end together, by their counts."""

    def features(states: torch.Tensor) -> torch.Tensor:
        if len(states) > 2:
            raise torch.OutOfMemoryError
        return states

    counts = []
    for loss in (Loss(), Loss(features=features)):
        problem = Problem(digits, loss, 4)
        problem.linearize(perturbed, samples[0][:4])
        problem.losses(perturbed, samples[0][:4])
        counts.append(problem.evaluations)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("overflowing", [{1}, {2, 3}, {1, 2, 3, 4}])
def test_a_network_that_overflows_costs_the_iteration_only(digits, samples, theory, monkeypatch, overflowing):
    """In one sample of a batch, as networks do in half precision, while derivatives are taken. If it always does, nothing is fitted."""
    equations, iterations = Problem._equations, iter(range(1, 9))

    def overflow(module, args, output):
        output[0][0] = torch.nan

    def sometimes_overflowing(problem, *args):
        if next(iterations) not in overflowing:
            return equations(problem, *args)
        with digits.unet.register_forward_hook(overflow):
            return equations(problem, *args)

    monkeypatch.setattr(Problem, "_equations", sometimes_overflowing)
    training, validation = samples[0][:16], samples[1][:8]
    always = len(overflowing) == 4
    with pytest.raises(ValueError, match="samples are not finite") if always else nullcontext():
        result = distill_gauss_newton(Problem(digits), theory.theory_solver(2), training, validation, max_iterations=4)
        assert result.distance < 0.9 * result.initial_distance
