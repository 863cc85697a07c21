"""Half precision, offloading, device maps, compilation and quantised networks: the schedulers work where pipelines do."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch._dynamo
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.hooks import apply_group_offloading
from fake_accelerator import DEVICE, Accelerator
from tiny_pipelines import (
    TinyPipeline,
    build,
    final_state,
    generators,
    random_states,
    record_steps,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMScheduler
from diffusers_gas.distillation.gauss_newton import Problem, best_initial_solver, distill_gauss_newton
from diffusers_gas.pipelines.driving import differentiable_rollout, frozen
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache
from diffusers_gas.solver_table import weighted_sum


NAMES = ("stable-diffusion", "stable-diffusion-3", "flux", "cogvideox", "ltx-video")

pipeline = functools.cache(build)
both_schedulers = pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])
some_families = pytest.mark.parametrize("name", ["stable-diffusion", "flux"])


def scheduler_for(tiny: TinyPipeline, scheduler_class: type[SchedulerMixin]) -> GASScheduler | SDMScheduler:
    return scheduler_class.from_config(tiny.pipe.scheduler.config)


# Half precision


def in_precision(tiny: TinyPipeline, dtype: torch.dtype, scheduler: SchedulerMixin) -> Tensor:
    """The final state of 8 evaluations from the same noise and embeddings, with the pipeline's networks in `dtype`.

    On an accelerator, where there is one.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tiny.pipe.to(device)
    inputs = {**tiny.inputs(2), "latents": random_states(tiny, 2).half()}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            inputs[name] = value.to(device, dtype if value.is_floating_point() else None)
    if tiny.has_latent_output:
        inputs["output_type"] = "latent"
    return record_steps(tiny, scheduler, num_inference_steps=8, **inputs)[-1].prev_sample


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@both_schedulers
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_within_rounding_of_float32(name, scheduler_class, dtype):
    """Networks and states in half precision: 8 evaluations end within 8 roundings of the largest entry.

    Measured: up to 3.3 for GAS and 4.3 for SDM, as for DPM-Solver++ 2M and Euler (up to 3.3).
    """
    half, full = build(name, dtype), build(name, dtype)
    for component in full.pipe.components.values():
        if isinstance(component, nn.Module):
            nn.Module.to(component, torch.float32)  # the rounded weights
    result = in_precision(half, dtype, scheduler_for(half, scheduler_class))
    expected = in_precision(full, torch.float32, scheduler_for(full, scheduler_class))
    assert result.dtype == (torch.float32 if name == "ltx-video" else dtype)  # LTX keeps its latents in float32
    error = (result.float() - expected).abs().max() / expected.abs().max()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@both_schedulers
def test_the_history_is_kept_in_float32(scheduler_class, dtype):
    """Half-precision states lose a rounding a step; sums over the history lose none in addition."""
    scheduler = scheduler_class(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    finals = []
    for precision in (dtype, torch.float64):
        scheduler.set_timesteps(8)
        state = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(precision)
        for t in scheduler.timesteps:
            output = torch.sin(state.double()) + 0.3 * state.double()
            state = scheduler.step(output.to(precision), t, state).prev_sample
        finals.append(state.double())
    error = (finals[0] - finals[1]).abs().max() / finals[1].abs().max()
    assert error < 8 * torch.finfo(dtype).eps


# Offloading and device maps


@both_schedulers
@some_families
def test_model_offloading(name, scheduler_class):
    """With Accelerate's hooks, and the CPU for both devices; sampling and gradients go through them."""
    tiny = build(name)
    scheduler = scheduler_for(tiny, scheduler_class)
    expected = final_state(tiny, scheduler, num_inference_steps=4)
    tiny.pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(tiny.denoiser, "_hf_hook")
    assert torch.equal(final_state(tiny, scheduler, num_inference_steps=4), expected)
    assert torch.equal(final_state(tiny, scheduler, num_inference_steps=4), expected)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_with_model_offloading(gradient_checkpointing):
    gradients = []
    for offload in (False, True):
        tiny, solver = build("stable-diffusion"), GeneralizedSolver(3)
        if offload:
            tiny.pipe.enable_model_cpu_offload(device="cpu")
        inputs = {**tiny.inputs(1), "generator": generators(1)}
        with frozen(tiny.pipe):
            final = differentiable_rollout(tiny.pipe, solver, gradient_checkpointing=gradient_checkpointing, **inputs)
            final.square().mean().backward()
        gradients.append(solver.data_coefficients.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


@both_schedulers
@some_families
def test_group_offloading(name, scheduler_class):
    """Layer by layer, as `enable_sequential_cpu_offload` does where there is an accelerator."""
    tiny = build(name)
    scheduler = scheduler_for(tiny, scheduler_class)
    expected = final_state(tiny, scheduler, num_inference_steps=4)
    devices = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    apply_group_offloading(tiny.denoiser, **devices, offload_type="leaf_level")
    assert torch.equal(final_state(tiny, scheduler, num_inference_steps=4), expected)


@pytest.mark.parametrize(
    "offload",
    [
        "enable_model_cpu_offload",
        pytest.param(
            "enable_sequential_cpu_offload",
            marks=pytest.mark.skipif(
                not torch.accelerator.is_available(),
                reason="Accelerate's placeholders of weights are on the device that stands for an accelerator",
            ),
        ),
    ],
)
@both_schedulers
@some_families
def test_offloading_from_an_accelerator(name, scheduler_class, offload):
    tiny = build(name)
    scheduler = scheduler_for(tiny, scheduler_class)
    expected = final_state(tiny, scheduler, num_inference_steps=4)
    device = torch.accelerator.current_accelerator() or DEVICE
    with Accelerator() if device == DEVICE else nullcontext():
        getattr(tiny.pipe, offload)(device=device)
        final = final_state(tiny, scheduler, num_inference_steps=4)
        assert final.device.type == device.type
        torch.testing.assert_close(final.cpu(), expected, rtol=0, atol=1e-2 * expected.abs().max().item())


# On an accelerator


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {"sigma_data": 0.5}],
    ids=["betas", "flow matching", "EDM"],
)
@pytest.mark.parametrize("make", [GASScheduler, SDMScheduler, functools.partial(SDMScheduler, solver="unipc")])
@pytest.mark.parametrize("device", [DEVICE, *([torch.device("cuda")] if torch.cuda.is_available() else [])], ids=str)
def test_a_sampling_does_not_wait_for_the_device(device, make, settings):
    """No step transfers anything or reads a value of the device, and nothing is in float64 there."""
    scheduler = make(**settings)
    with Accelerator() if device == DEVICE else nullcontext() as accelerator:
        scheduler.set_timesteps(8, device=device)
        state = torch.randn(2, 3, 4, 4, device=device)
        with watched(accelerator):
            for t in scheduler.timesteps:
                model_input = scheduler.scale_model_input(state, t)
                state = scheduler.step(model_input.sin(), t, state).prev_sample
        assert state.device.type == device.type and state.cpu().isfinite().all()


@contextmanager
def watched(accelerator: Accelerator | None) -> Iterator[None]:
    """Inside, nothing is exchanged with an emulated accelerator, or a GPU is not waited for."""
    if accelerator is not None:
        accelerator.events.clear()
        yield
        assert not +accelerator.events
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("made_inside", [False, True])
@both_schedulers
def test_an_accelerator_is_the_default_device(scheduler_class, made_inside):
    """Also for times that stay on the host, as no device was passed."""
    scheduler = scheduler_class()
    with Accelerator(), torch.device(DEVICE):
        scheduler = scheduler_class() if made_inside else scheduler
        scheduler.set_timesteps(6)
        state = torch.randn(2, 3, 4, 4)
        for t in scheduler.timesteps:
            state = scheduler.step(scheduler.scale_model_input(state, t).sin(), t, state).prev_sample
        noised = scheduler.add_noise(state, torch.randn_like(state), scheduler.timesteps[[1, 3]])
        assert state.device == noised.device == DEVICE


def test_gradients_are_not_in_float64_on_the_device():
    weights = GeneralizedSolver(2).data_coefficients + 0.5
    with Accelerator() as accelerator:
        states = torch.randn(2, 1, 3, 4, 4, device=DEVICE)
        weighted_sum(weights.flatten(), states).square().sum().backward()
        assert accelerator.events["float64"] == 0


@both_schedulers
def test_device_maps(scheduler_class, tmp_path, digits):
    scheduler = scheduler_class.from_config(digits.scheduler.config)
    type(digits)(digits.unet, scheduler).save_pretrained(tmp_path)
    mapped = DiffusionPipeline.from_pretrained(tmp_path, device_map="cpu")
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    images = []
    for pipe in (mapped, plain):
        assert type(pipe.scheduler) is scheduler_class
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(batch_size=2, generator=generators(2), num_inference_steps=6, output_type="np").images)
    assert (images[0] == images[1]).all()


@both_schedulers
def test_times_follow_the_pipeline_to_its_device(scheduler_class):
    scheduler = scheduler_class()
    scheduler.set_timesteps(8, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    assert scheduler.sigmas.device.type == "cpu"  # as in Diffusers: read by the host only


# Compilation


@pytest.fixture
def compiled_graphs():
    """How many graphs have been compiled so far, as a function; starts and ends with none."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["ddpm", "flux"])
def test_a_compiled_network_is_compiled_once(name, compiled_graphs):
    """For all steps, all calls, all step counts and both schedulers; `"eager"` traces and guards, but builds no kernels."""
    tiny = build(name)
    schedulers = [scheduler_for(tiny, scheduler_class) for scheduler_class in (GASScheduler, SDMScheduler)]
    expected = [final_state(tiny, scheduler, num_inference_steps=6) for scheduler in schedulers]
    tiny.denoiser.compile(backend="eager", fullgraph=True)
    for scheduler, final in zip(schedulers * 2, expected * 2):
        result = final_state(tiny, scheduler, num_inference_steps=6)
        limit = 1e-5 * final.abs().max().item()
        torch.testing.assert_close(result, final, rtol=0, atol=limit)
        final_state(tiny, scheduler, num_inference_steps=8)
        assert compiled_graphs() == 1


@pytest.mark.skipif(
    torch.__version__ < "2.8", reason="this PyTorch loses `self` of methods that stay outside of graphs"
)
@both_schedulers
def test_a_compiled_loop_does_not_compile_steps_anew(scheduler_class, compiled_graphs):
    """A step stays outside of compiled graphs: its weights are other numbers every time, and a sum gains nothing."""
    scheduler = scheduler_class()

    def loop(state: Tensor, network: nn.Module) -> Tensor:
        for t in scheduler.timesteps:
            state = scheduler.step(network(state), t, state, return_dict=False)[0]
        return state

    network, graphs = nn.Tanh(), []
    compiled_loop = torch.compile(loop, backend="eager")
    compiled_step = torch.compile(scheduler.step, backend="eager")
    state = torch.randn(1, 4, 8, 8)
    for _ in range(3):
        scheduler.set_timesteps(8)
        expected = loop(state, network)
        scheduler.set_timesteps(8)
        torch.testing.assert_close(compiled_loop(state, network), expected)
        graphs.append(compiled_graphs())
    assert graphs[1] == graphs[2]
    scheduler.set_timesteps(8)
    before = compiled_graphs()
    for t in scheduler.timesteps:
        state = compiled_step(network(state), t, state).prev_sample
    assert compiled_graphs() == before
    assert torch.equal(state, expected)


# Quantised networks


class QuantizedLinear(nn.Module):
    """Eight-bit weights with a scale for every output, and no gradients."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.scale, self.bias = nn.Parameter(scale), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantize_eight_bit(network: nn.Module) -> None:
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, QuantizedLinear(module))


def store_in_float8(network: nn.Module) -> None:
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


@pytest.mark.parametrize("quantize", [quantize_eight_bit, store_in_float8])
@some_families
def test_quantised_networks_are_distilled(name, quantize, tmp_path):
    tiny, exact = build(name), pipeline(name)
    quantize(tiny.denoiser)
    scheduler = scheduler_for(tiny, GASScheduler)
    final, unquantised = (final_state(pipe, scheduler, num_inference_steps=4) for pipe in (tiny, exact))
    assert final.isfinite().all() and not torch.equal(final, unquantised)
    assert final_state(tiny, scheduler_for(tiny, SDMScheduler), num_inference_steps=8).isfinite().all()
    samples = TeacherCache(tmp_path, name, scheduler, 8).collect(
        tiny.pipe, SampleInputs.create(0, 1, **tiny.inputs(1)), 1, ""
    )
    problem = Problem(tiny.pipe)
    start = best_initial_solver(problem, 3, samples)
    result = distill_gauss_newton(problem, start, samples, samples, max_iterations=1)
    assert result.distance < result.initial_distance
