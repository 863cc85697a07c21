"""Distillation in one call."""

import json
import logging
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny_pipelines import build
from tiny_unets import ddpm_with_a_time_table

from diffusers_gas import GASScheduler, SDMScheduler
from diffusers_gas.comparison import errors_to_teacher
from diffusers_gas.distillation import distill as distillation
from diffusers_gas.distillation.distill import distill
from diffusers_gas.distillation.gauss_newton import Problem
from diffusers_gas.pipelines.driving import num_evaluations
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache, default_teacher


SMALL = {"teacher_num_inference_steps": 10, "max_iterations": 1}


def test_solvers_come_closer_to_the_teacher_and_say_how_close(digits, tmp_path):
    own, saved = digits.scheduler, []
    inputs = SampleInputs.create(0, 20)
    scheduler = distill(
        digits,
        [4, 3],
        inputs=inputs,
        cache_dir=tmp_path,
        on_solver=lambda scheduler: saved.append(sorted(scheduler.solvers)),
        **SMALL,
    )
    assert digits.scheduler is own
    assert isinstance(scheduler, GASScheduler) and saved == [[3], [3, 4]]
    cache = TeacherCache(tmp_path, f"{digits.name_or_path} {digits.dtype}", default_teacher(digits), 10)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    held_out = cache.collect(digits, inputs[16:], 32, "")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files, "the cache is that of the call"
    for n, solver in scheduler.solvers.items():
        record = solver.provenance
        assert record["distance"] == pytest.approx(errors_to_teacher(digits, scheduler, n, held_out, 32)[0], rel=1e-3)
        assert record["distance"] < record["initial_distance"]
        assert (record["teacher"], record["teacher_scheduler"]) == ("digits", "DPMSolverMultistepScheduler")
        assert (record["num_teacher_samples"], record["torch_dtype"]) == (8, "float32")
        # The teacher's samples, one linearization, and one trial at least.
        assert record["evaluations"] >= 10 * (8 + 4) + 8 * (num_evaluations(n) + n) and record["seconds"] > 0
        assert record["teacher_images"] == record["evaluations"] // 10
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert sorted(GASScheduler.from_pretrained(tmp_path / "scheduler").solvers) == [3, 4]


def test_fits_to_a_network_of_whole_times_measure_what_is_sampled():
    pipe = ddpm_with_a_time_table().pipe
    pipe.scheduler = GASScheduler.from_config(pipe.scheduler.config, round_timesteps=True)
    scheduler = distill(pipe, 3, inputs=SampleInputs.create(0, 3), teacher=DDIMScheduler(), **SMALL)
    record = scheduler.solvers[3].provenance
    assert scheduler.config.round_timesteps
    assert record["distance"] == pytest.approx(record["sampled_distance"], rel=1e-5)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place, kept", [("best_initial_solver", [2]), ("check_by_sampling", [2, 3])])
def test_an_interrupt_or_error_before_or_after_a_fit_keeps_the_solvers(digits, monkeypatch, place, kept, ending):
    function, calls, saved = getattr(distillation, place), [], []

    class Interrupted(DDIMScheduler):
        def step(self, *arguments, **keywords):
            raise ending

    def interrupted(*arguments):
        calls.append(place)
        if len(calls) > 1:
            raise ending
        return function(*arguments)

    monkeypatch.setattr(distillation, place, interrupted)
    call = {
        "inputs": SampleInputs.create(0, 2),
        "on_solver": lambda scheduler: saved.append(list(scheduler.solvers)),
        **SMALL,
    }
    assert sorted(distill(digits, [2, 3, 4], **call).solvers) == kept == saved[-1]
    with pytest.raises(ending):
        distill(digits, 3, teacher=Interrupted(), **call)


@pytest.mark.parametrize("broken, kept", [(2, []), (3, [2])])
def test_an_error_within_a_fit_leaves_no_unfinished_solver(digits, monkeypatch, broken, kept):
    calls, saved, descend = [], [], Problem.descend

    def failing(problem, solver, *arguments):
        calls.append(solver.num_inference_steps)
        if calls.count(broken) > 4:  # after a better solver than the first was found
            raise RuntimeError("out of memory")
        return descend(problem, solver, *arguments)

    monkeypatch.setattr(Problem, "descend", failing)
    call = {"inputs": SampleInputs.create(0, 20), **SMALL, "max_iterations": 6}
    with nullcontext() if kept else pytest.raises(RuntimeError, match="out of memory"):
        found = distill(digits, [2, 3], on_solver=lambda scheduler: saved.append(list(scheduler.solvers)), **call)
        assert list(found.solvers) == kept
    assert saved == ([kept, kept] if kept else [])


def test_one_number_of_steps(digits):
    scheduler = distill(digits, 3, inputs=SampleInputs.create(0, 2), **SMALL)
    assert list(scheduler.solvers) == [3]


def test_fits_start_from_a_scheduler_or_the_solver_of_one_step_less(digits, monkeypatch):
    """Without iterations a fit is its start."""
    given = GASScheduler.from_config(digits.scheduler.config)
    for n in (3, 5):
        given.add_solver(given.theory_solver(n))
    for parameter in given.solvers[5].parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    settings = {"inputs": SampleInputs.create(0, 5), "teacher_num_inference_steps": 10, "max_iterations": 0}
    found = distill(digits, [3, 5], initialize_from=given, **settings)
    for n, solver in given.solvers.items():
        assert all(map(torch.equal, solver.parameters(), found.solvers[n].parameters()))
    calls = []
    with pytest.raises(ValueError, match=r"has solvers for \[3, 5\] steps, none for 4"):
        distill(digits, [3, 4], initialize_from=given, on_solver=calls.append, **settings)
    assert not calls  # it is refused before any fit

    sdm = SDMScheduler.from_config(digits.scheduler.config)
    found, expected = distill(digits, 4, initialize_from=sdm, **settings).solvers[4], sdm.initial_solver(4)
    noise_schedule = given.noise_schedule()
    torch.testing.assert_close(found.table(noise_schedule).times, expected.table(noise_schedule).times)

    candidates = []
    monkeypatch.setattr(
        distillation,
        "best_initial_solver",
        lambda problem, n, samples, further_candidates: (
            candidates.append((n, len(further_candidates))) or given.theory_solver(n)
        ),
    )
    distill(digits, [3, 4, 6], **settings)
    assert candidates == [(3, 0), (4, 1), (6, 0)]


def test_guidance_is_recorded():
    pipe = build("stable-diffusion").pipe
    prompts = [{"prompt_embeds": torch.zeros(1, 4, 8)}]
    one = SampleInputs.create(0, 4, prompts, guidance_scale=3.0, cross_attention_kwargs={"scale": 1.0})
    assert one.record(pipe) == {"guidance_scale": 3.0}
    several = SampleInputs.create(0, 4, prompts, guidance_scale=[3.0, 5.0], height=8)
    assert several.record(pipe) == {"guidance_scale": [3.0, 5.0], "height": 8}
    assert SampleInputs.create(0, 1, prompts).record(pipe) == {"guidance_scale": 7.5}


def test_a_list_of_prompts_and_numbers_of_numpy(monkeypatch):
    """As the pipeline takes prompts; the record can be saved."""
    pipe, prompts, seen = build("stable-diffusion").pipe, torch.randn(2, 4, 16), []
    own = pipe.unet.forward

    def forward(*args, **kwargs):
        seen.append(kwargs["encoder_hidden_states"])
        return own(*args, **kwargs)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    numbers = {
        "teacher_num_inference_steps": torch.tensor([1]),
        "max_iterations": np.int64(0),
        "batch_size": np.int64(32),
    }
    (solver,) = distill(pipe, np.array([1]), prompt_embeds=prompts, guidance_scale=1.0, **numbers).solvers.values()
    in_turn = prompts.repeat(max(map(len, seen)), 1, 1)
    assert all(torch.equal(seen_prompts, in_turn[: len(seen_prompts)]) for seen_prompts in seen)
    assert solver.num_inference_steps == 1 and json.loads(json.dumps(solver.provenance))


def test_a_pipeline_with_prompts_and_a_teacher_of_ones_own():
    tiny = build("stable-diffusion-3")
    embeds = {name: value[:1] for name, value in tiny.inputs(1).items() if isinstance(value, torch.Tensor)}
    arguments = {name: value for name, value in tiny.inputs(1).items() if name not in embeds}
    inputs = SampleInputs.create(0, 5, [embeds], **arguments)
    teacher = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler = distill(tiny.pipe, [3], inputs=inputs, teacher=teacher, batch_size=4, **SMALL)
    record = scheduler.solvers[3].provenance
    assert record["teacher_scheduler"] == "UniPCMultistepScheduler"
    assert record["pipeline_arguments"]["guidance_scale"] == tiny.guidance_scale
    assert record["distance"] < record["initial_distance"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("stable-diffusion", DPMSolverMultistepScheduler),
        ("stable-diffusion-3", FlowMatchEulerDiscreteScheduler),
        ("stable-audio", EDMDPMSolverMultistepScheduler),
    ],
)
def test_default_teachers(name, expected):
    assert isinstance(default_teacher(build(name).pipe), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": []}, "num_inference_steps"),
        ({"num_inference_steps": [0, 4]}, "num_inference_steps.*0"),
        ({"num_inference_steps": 0}, "num_inference_steps.*0"),
        ({"inputs": SampleInputs.create(0, 1)}, "at least 2 samples"),
        ({"inputs": SampleInputs.create(0, 4), "guidance_scale": 2.0}, "guidance_scale.*inputs"),
    ],
)
def test_bad_input(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        distill(digits, **arguments)


class Picky(DDPMPipeline):
    """Refuses schedulers by the name of their class, as some pipelines do, but not at first."""

    refuses = False

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=50):
        state = torch.stack([torch.randn(1, 8, 8, generator=g) for g in generator])
        if type(self.scheduler) is GASScheduler:
            if self.refuses:
                raise ValueError("GASScheduler is not supported.")
            self.refuses = True
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            state = self.scheduler.step(self.unet(state, t).sample, t, state).prev_sample


class Fickle(DDPMPipeline):
    """Treats a scheduler that nobody drives in another way, but not at first."""

    error = 0.0

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=50):
        state = torch.stack([torch.randn(1, 8, 8, generator=g) for g in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        is_plain = type(self.scheduler) is GASScheduler
        error, self.error = self.error * is_plain, self.error or 0.3 * is_plain
        for t in self.scheduler.timesteps:
            state = self.scheduler.step(self.unet(state, t).sample + error, t, state).prev_sample


@pytest.mark.parametrize("pipeline_class", [DDPMPipeline, Fickle])
def test_a_finished_fit_is_checked_by_sampling_once(digits, pipeline_class, caplog):
    root = logging.getLogger("diffusers_gas")
    root.addHandler(caplog.handler)
    pipe = pipeline_class(unet=digits.unet, scheduler=digits.scheduler)
    scheduler = distill(pipe, 3, inputs=SampleInputs.create(0, 10), **SMALL)
    root.removeHandler(caplog.handler)
    record = scheduler.solvers[3].provenance
    if pipeline_class is Fickle:
        assert record["sampled_distance"] > 2 * record["distance"]
        assert "Fickle does not sample what was fitted: the distance to the teacher is" in caplog.text
    else:
        assert record["sampled_distance"] == pytest.approx(record["distance"], rel=1e-3)
        assert "does not sample" not in caplog.text


def test_a_fit_is_not_lost_if_the_plain_pipeline_cannot_sample_it(digits, caplog):
    root, kept = logging.getLogger("diffusers_gas"), []
    root.addHandler(caplog.handler)
    pipe = Picky(unet=digits.unet, scheduler=digits.scheduler)
    teacher = DPMSolverMultistepScheduler.from_config(digits.scheduler.config)
    inputs = SampleInputs.create(0, 10)
    scheduler = distill(pipe, 3, inputs=inputs, teacher=teacher, on_solver=kept.append, **SMALL)
    root.removeHandler(caplog.handler)
    assert kept == [scheduler] and scheduler.solvers[3].provenance["sampled_distance"] is None
    assert "Picky could not sample with the fitted solver (ValueError" in caplog.text


def test_arguments_are_checked_before_any_sample(digits):
    with pytest.raises(ValueError, match="DDPMPipeline has no argument `guidance_scale`"):
        distill(digits, 3, guidance_scale=4.0)


def test_a_limit_without_room_for_an_iteration_is_refused(digits, monkeypatch):
    monkeypatch.setattr(distillation.TeacherCache, "collect", lambda *_: pytest.fail("the teacher was sampled"))
    with pytest.raises(ValueError, match=r"1000 network evaluations are too few for a fit of 3 steps .* need \d{4}"):
        distill(digits, [3, 4], max_evaluations=1000)
