"""The pipeline is the model: driven evaluations and differentiable rollouts against the networks called by hand."""

import copy
import functools
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from saved_schedulers import perturbed
from tiny_pipelines import (
    FROM_NOISE,
    TinyPipeline,
    build,
    final_state,
    generators,
    plugged,
    random_states,
    record_steps,
)
from tiny_unets import ddpm_with_a_time_table
from torch import Tensor, nn

from diffusers_gas import GASScheduler, GeneralizedSolver, distill
from diffusers_gas.pipelines.driving import (
    Evaluation,
    differentiable_rollout,
    drive,
    rollout,
    sample_latents,
    scheduler_config,
)
from diffusers_gas.pipelines.teacher import default_teacher


BATCH_SIZE = 2
Network = Callable[[Tensor, float], Tensor]

pipeline = functools.cache(build)


def inputs(tiny: TinyPipeline, **others: Any) -> dict[str, Any]:
    return {**tiny.inputs(BATCH_SIZE), "generator": generators(BATCH_SIZE), **others}


def network_by_hand(tiny: TinyPipeline) -> Network:
    """Calls the network with what the pipeline passes to it, for any state and time, and applies guidance.

    The conditioning is recorded in a plain run with the pipeline's own scheduler.
    """
    calls = []

    def record(network: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append((args, kwargs))

    hook = tiny.denoiser.register_forward_pre_hook(record, with_kwargs=True)
    steps = record_steps(tiny, tiny.pipe.scheduler, BATCH_SIZE, num_inference_steps=4)
    hook.remove()
    calls = calls[: len(calls) // len(steps)]

    @torch.no_grad()
    def network(state: Tensor, timestep: float) -> Tensor:
        outputs = []
        for args, kwargs in calls:
            sample = args[0] if args else kwargs["hidden_states"]
            copies = sample.shape[0] // state.shape[0]
            sample = state.repeat(copies, *[1] * (state.ndim - 1))
            times = args[1] if len(args) > 1 else kwargs["timestep"]
            times = torch.full(times.shape, timestep * tiny.timestep_scale)
            if len(args) > 1:
                args = (sample, times, *args[2:])
            elif args:
                args, kwargs = (sample,), {**kwargs, "timestep": times}
            else:
                kwargs = {**kwargs, "hidden_states": sample, "timestep": times}
            outputs.append(tiny.denoiser(*args, **kwargs)[0])
        output = torch.cat(outputs)
        if tiny.guidance_scale is not None:
            unconditional, conditional = output.chunk(2)
            if tiny.conditional_first:
                unconditional, conditional = conditional, unconditional
            assert not torch.allclose(unconditional, conditional, rtol=0.01)
            output = unconditional + tiny.guidance_scale * (conditional - unconditional)
        return output[:, : state.shape[1]]  # without a learned variance

    return network


def state_of(pipe: Any) -> tuple:
    return pipe.scheduler, dict(pipe.scheduler.config), getattr(pipe, "_progress_bar_config", {})


@pytest.mark.parametrize("name", FROM_NOISE)
def test_driven_evaluation_is_the_network_called_by_hand(name):
    tiny = pipeline(name)
    network = network_by_hand(tiny)
    states = [random_states(tiny, BATCH_SIZE, first_seed=10 * i) for i in range(1, 4)]
    requests = [
        (states[0], 0.3337),
        (states[1], 0.98765),
        (states[2], 0.05),
        (states[1], torch.tensor(0.98765, dtype=torch.float64)),
    ]
    requests = [(None, 0.9), *requests, requests[0]]

    def algorithm(noise_schedule: Any, prediction_type: str) -> Generator[Any, Evaluation, list[Evaluation]]:
        evaluations = []
        for request in requests:
            evaluations.append((yield request))
        return evaluations

    evaluations = drive(tiny.pipe, algorithm, **inputs(tiny))
    for (state, t), evaluation in zip(requests, evaluations):
        if state is not None:
            assert torch.equal(evaluation.sample, state)
        by_hand = network(evaluation.sample[:BATCH_SIZE], tiny.network_time(float(t)))
        actual = evaluation.model_output
        assert actual.shape == evaluation.sample.shape
        for half in actual.split(BATCH_SIZE):  # DiT's pipeline keeps two copies of every sample
            torch.testing.assert_close(half, by_hand, rtol=1e-4, atol=1e-5)
    assert torch.equal(evaluations[1].model_output, evaluations[-1].model_output)
    assert torch.equal(evaluations[2].model_output, evaluations[4].model_output)
    # What is compared depends on the state and on the time.
    assert not torch.allclose(by_hand, network(states[0][:BATCH_SIZE], tiny.network_time(0.5)), rtol=0.01)
    assert not torch.allclose(by_hand, network(states[1][:BATCH_SIZE], tiny.network_time(0.3337)), rtol=0.01)


@pytest.mark.parametrize("name", FROM_NOISE)
def test_driving_starts_at_the_noise_that_the_generators_draw(name):
    tiny = pipeline(name)

    def algorithm(noise_schedule: Any, prediction_type: str) -> Generator[Any, Evaluation, Tensor]:
        evaluation = yield None, 1.0
        return evaluation.sample

    assert torch.equal(drive(tiny.pipe, algorithm, **inputs(tiny)), random_states(tiny, BATCH_SIZE))


@pytest.mark.parametrize("name", FROM_NOISE)
@pytest.mark.parametrize("raises", [False, True])
def test_driving_leaves_the_pipeline_as_it_was(name, raises):
    tiny = pipeline(name)
    tiny.pipe.set_progress_bar_config(desc="own", disable=True)
    before = state_of(tiny.pipe)

    def algorithm(noise_schedule: Any, prediction_type: str) -> Generator[Any, Evaluation, int]:
        evaluation = yield None, 1.0
        evaluation = yield evaluation.sample, 0.5
        if raises:
            raise RuntimeError("of the algorithm")
        return 42

    if raises:
        with pytest.raises(RuntimeError, match="of the algorithm"):
            drive(tiny.pipe, algorithm, **inputs(tiny))
    else:
        assert drive(tiny.pipe, algorithm, **inputs(tiny)) == 42
    after = state_of(tiny.pipe)
    assert after[0] is before[0] and after[1:] == before[1:]
    tiny.pipe.set_progress_bar_config()


@pytest.mark.parametrize("name", FROM_NOISE)
def test_nothing_is_decoded(name, monkeypatch):
    tiny = pipeline(name)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("decoded")

    def algorithm(noise_schedule: Any, prediction_type: str) -> Generator[Any, Evaluation, str]:
        yield None, 1.0
        return "done"

    if tiny.decoder is not None:
        monkeypatch.setattr(tiny.decoder, "decode", fail)
    monkeypatch.setattr(tiny.pipe, "numpy_to_pil", fail)
    with pytest.raises(AssertionError, match="decoded"), plugged(tiny.pipe, tiny.pipe.scheduler):
        tiny.pipe(**inputs(tiny, num_inference_steps=2))
    assert drive(tiny.pipe, algorithm, **inputs(tiny)) == "done"
    differentiable_rollout(tiny.pipe, GeneralizedSolver(2), **inputs(tiny))
    sample_latents(tiny.pipe, tiny.pipe.scheduler, 2, **inputs(tiny))


def first_request_with_a_state(noise_schedule: Any, prediction_type: str) -> Generator[Any, Evaluation, None]:
    yield torch.zeros(BATCH_SIZE, 3, 8, 8), 0.5


def test_the_first_state_is_the_pipelines():
    tiny = pipeline("ddpm")
    with pytest.raises(ValueError, match="first request"):
        drive(tiny.pipe, first_request_with_a_state, **inputs(tiny))


def test_a_pipeline_without_scheduler_is_refused():
    class Pipeline:
        __call__ = torch.no_grad()(lambda self: None)

    for call in (lambda: drive(Pipeline(), None), lambda: differentiable_rollout(Pipeline(), GeneralizedSolver(3))):
        with pytest.raises(ValueError, match="scheduler"):
            call()


@pytest.mark.parametrize("name", FROM_NOISE)
def test_rollout_is_sampling_with_the_solver(name):
    tiny = pipeline(name)
    solver = perturbed(GeneralizedSolver(3), 0.1, offset_scale=0.01)
    scheduler = GASScheduler.from_config(tiny.pipe.scheduler.config)
    scheduler.add_solver(solver)
    rollout = differentiable_rollout(tiny.pipe, solver, **inputs(tiny))
    _, latents = sample_latents(tiny.pipe, scheduler, 3, **inputs(tiny))
    assert rollout.requires_grad
    scale = latents.abs().max().item()
    torch.testing.assert_close(rollout.detach(), latents, rtol=1e-4, atol=1e-5 * scale)


# Wan's pipeline keeps its latents in float32 and LDM's draws them in float32, whatever the dtype of the network.
FLOAT32 = ("wan", "ldm")


@pytest.mark.parametrize("name", FROM_NOISE)
def test_rollout_gradients_agree_with_finite_differences(name):
    precise = name not in FLOAT32
    tiny = build(name, torch.float64 if precise else torch.float32)
    solver = perturbed(GeneralizedSolver(3), 0.1, offset_scale=0.01)

    def loss() -> Tensor:
        state = differentiable_rollout(tiny.pipe, solver, **inputs(tiny))
        weights = torch.randn(state.shape, generator=torch.Generator().manual_seed(1), dtype=state.dtype)
        return (state * weights).mean()

    loss().backward()
    # Networks embed their times, up to 1000, in float32, so that steps in t must stay well above 1e-7.
    for parameter, h, tolerance in [
        (solver.timestep_logits, 5e-4, 2e-3 if precise else 1e-2),
        (solver.timestep_offsets, 1e-4, 5e-3 if precise else 1e-2),
        (solver.state_coefficients, 1e-3, 1e-5 if precise else 2e-3),
        (solver.data_coefficients, 1e-3, 1e-5 if precise else 2e-3),
    ]:
        # A random direction tells every entry from every other.
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=parameter.dtype)
        numerical = central_difference(loss, parameter, direction, h)
        scale = parameter.grad.abs().max()
        assert scale > 0
        assert (numerical - (parameter.grad * direction).sum()).abs() / scale < tolerance


@torch.no_grad()
def central_difference(function: Callable[[], Tensor], parameter: Tensor, direction: Tensor, h: float) -> Tensor:
    """Derivative along a direction, to fourth order in h."""
    start, values = parameter.clone(), []
    for shift in (-2, -1, 1, 2):
        parameter.copy_(start + shift * h * direction)
        values.append(function().detach().double())
    parameter.copy_(start)
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)


@pytest.mark.parametrize("raises", [False, True])
def test_rollout_restores_which_networks_train(raises, monkeypatch):
    tiny = build("stable-diffusion")
    trained, frozen = list(tiny.pipe.unet.parameters()), list(tiny.pipe.vae.parameters())
    tiny.pipe.vae.requires_grad_(False)
    trained[0].requires_grad_(False)
    seen = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(any(parameter.requires_grad for parameter in trained + frozen))
        if raises:
            raise RuntimeError("of the network")
        return own_forward(*args, **kwargs)

    own_forward = tiny.pipe.unet.forward
    monkeypatch.setattr(tiny.pipe.unet, "forward", forward)
    if raises:
        with pytest.raises(RuntimeError, match="of the network"):
            differentiable_rollout(tiny.pipe, GeneralizedSolver(2), **inputs(tiny))
    else:
        differentiable_rollout(tiny.pipe, GeneralizedSolver(2), **inputs(tiny)).sum().backward()
    assert seen and not any(seen)
    assert [parameter.requires_grad for parameter in trained] == [False] + [True] * (len(trained) - 1)
    assert not any(parameter.requires_grad for parameter in frozen)
    assert all(parameter.grad is None for parameter in trained + frozen)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ANY = {
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
# Pipelines that scale their noise and the network's input as the scheduler asks.
SCALING = {**ANY, "euler": EulerDiscreteScheduler, "heun": HeunDiscreteScheduler}
FLOW_STATIC = {
    "euler": functools.partial(FlowMatchEulerDiscreteScheduler, shift=3.0),
    "heun": functools.partial(FlowMatchHeunDiscreteScheduler, shift=3.0),
    "unipc": functools.partial(UniPCMultistepScheduler, **FLOW, flow_shift=3.0),
    "dpmsolver++": functools.partial(DPMSolverMultistepScheduler, **FLOW, flow_shift=3.0),
}
FLOW_DYNAMIC = {
    "euler": functools.partial(FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
    "unipc": functools.partial(UniPCMultistepScheduler, **FLOW, use_dynamic_shifting=True),
}
SCHEDULERS = {
    "stable-diffusion": SCALING,
    "stable-diffusion-xl": SCALING,
    "pixart": SCALING,
    "stable-diffusion-3": FLOW_STATIC,
    "flux": FLOW_DYNAMIC,
    "wan": FLOW_STATIC,
    "dit": ANY,
    "ddpm": ANY,
    "ldm": ANY,
}


def other_scheduler(tiny: TinyPipeline, name: str, scheduler_name: str) -> SchedulerMixin:
    factory = SCHEDULERS[name][scheduler_name]
    if tiny.flow_shift is not None:
        return factory()
    return factory.from_config(tiny.pipe.scheduler.config, clip_sample=False)


@pytest.mark.parametrize(
    ("name", "scheduler_name"), [(name, scheduler) for name, group in SCHEDULERS.items() for scheduler in group]
)
def test_sample_latents_is_the_pipelines_own_sampling(name, scheduler_name):
    tiny = pipeline(name)
    scheduler = other_scheduler(tiny, name, scheduler_name)
    before, timesteps = state_of(tiny.pipe), scheduler.timesteps
    noise, latents = sample_latents(tiny.pipe, scheduler, 4, **inputs(tiny))
    assert state_of(tiny.pipe) == before
    assert scheduler.timesteps is timesteps  # a copy did the work
    torch.testing.assert_close(noise, random_states(tiny, BATCH_SIZE), rtol=1e-6, atol=1e-6)
    assert torch.equal(latents[:BATCH_SIZE], final_state(tiny, scheduler, BATCH_SIZE, num_inference_steps=4))
    if tiny.has_latent_output:
        with plugged(tiny.pipe, scheduler):
            expected = tiny.pipe(**inputs(tiny, num_inference_steps=4, output_type="latent"), return_dict=False)[0]
        assert torch.equal(latents, expected)


class Copies(DDPMPipeline):
    """Samples with a copy of its scheduler beside it, as pipelines do for sound, or with copies alone."""

    alone = False

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=4):
        state = torch.stack([torch.randn(1, 8, 8, generator=g) for g in generator])
        beside = state.flip(0)
        self.scheduler.set_timesteps(num_inference_steps)
        second = copy.deepcopy(self.scheduler)
        for t in self.scheduler.timesteps:
            beside = second.step(self.unet(beside, t).sample, t, beside).prev_sample
            if not self.alone:
                state = self.scheduler.step(self.unet(state, t).sample, t, state).prev_sample
        return ImagePipelineOutput(images=state)


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, GASScheduler])
def test_what_is_recorded_is_the_schedulers_own_sample(digits, scheduler_class):
    pipe = Copies(unet=digits.unet, scheduler=digits.scheduler)
    scheduler = scheduler_class.from_config(digits.scheduler.config)
    noise, final = sample_latents(pipe, scheduler, 4, batch_size=2, generator=generators(2))
    expected = sample_latents(digits, scheduler, 4, batch_size=2, generator=generators(2))
    assert torch.equal(noise, expected[0])
    torch.testing.assert_close(final, expected[1])
    with pytest.raises(ValueError, match="copies of its scheduler"):
        rollout(pipe, GeneralizedSolver(3), batch_size=2, generator=generators(2))


def test_a_pipeline_that_samples_with_copies_alone_cannot_be_recorded(digits):
    pipe = Copies(unet=digits.unet, scheduler=digits.scheduler)
    pipe.alone = True
    with pytest.raises(ValueError, match="copies of its scheduler"):
        sample_latents(
            pipe, DDIMScheduler.from_config(digits.scheduler.config), 4, batch_size=2, generator=generators(2)
        )


@pytest.mark.parametrize("kind", ["training", "channels", "adapter"])
def test_a_network_that_is_random_is_refused(kind):
    """An adapter that is added to a network in evaluation mode is in training mode."""
    pipe = build("stable-diffusion").pipe
    call = {"prompt_embeds": torch.ones(1, 5, 16), "negative_prompt_embeds": torch.zeros(1, 5, 16)}
    pipe.unet.train()
    sample_latents(pipe, pipe.scheduler, 2, **call)  # without dropout it is not random
    if kind == "training":
        next(part for part in pipe.unet.modules() if isinstance(part, torch.nn.Dropout)).p = 0.1
    elif kind == "channels":
        pipe.unet.mid_block.add_module("of_channels", torch.nn.Dropout2d(0.1))
    else:
        peft = pytest.importorskip("peft")
        pipe.unet.eval().add_adapter(peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["to_q"]), "style")
    for run in (lambda: sample_latents(pipe, pipe.scheduler, 2, **call), lambda: distill(pipe, 2, **call)):
        with pytest.raises(ValueError, match="The UNet2DConditionModel drops random activations"):
            run()
    pipe.unet.eval()
    sample_latents(pipe, pipe.scheduler, 2, **call)


def test_a_shift_that_was_set_later_is_the_one_that_is_driven():
    """Neither way changes the items of the config."""
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own.set_shift(9.0)
    ours = GASScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    ours.config.flow_shift = 9.0
    for scheduler in (own, ours):
        config = scheduler_config(SimpleNamespace(scheduler=scheduler))
        assert config["shift"] == 9.0 and GASScheduler.from_config(config).config.flow_shift == 9.0
        assert default_teacher(SimpleNamespace(scheduler=scheduler)).shift == 9.0


def test_networks_that_look_whole_times_up_are_driven_as_they_are_sampled():
    tiny = ddpm_with_a_time_table()
    tiny.pipe.scheduler = GASScheduler.from_config(tiny.pipe.scheduler.config, round_timesteps=True)
    solver = perturbed(tiny.pipe.scheduler.theory_solver(4))
    own = tiny.pipe.scheduler
    own.add_solver(solver)
    _, expected = sample_latents(tiny.pipe, own, 4, **inputs(tiny))
    driven = rollout(tiny.pipe, solver, **inputs(tiny))
    differentiable = differentiable_rollout(tiny.pipe, solver, **inputs(tiny))
    torch.testing.assert_close(driven, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(differentiable, expected, rtol=1e-5, atol=1e-5)
    differentiable.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in solver.parameters())

    def near(state: Tensor, t: float) -> Generator[Any, Evaluation, Tensor]:
        yield None, 1.0
        return (yield state, t).model_output

    state = random_states(tiny, BATCH_SIZE)
    told = [drive(tiny.pipe, lambda *_, t=t: near(state, t), **inputs(tiny)) for t in (0.5, 0.5004, 0.7)]
    assert torch.equal(told[0], told[1]) and not torch.equal(told[0], told[2])
