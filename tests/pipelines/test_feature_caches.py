"""Feature caches of Diffusers (`enable_cache`): what samples uses them, and what explores a network is not misled by them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FluxTransformer2DModel,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
)
from tiny_pipelines import TinyPipeline, build, final_state
from torch import Tensor

from diffusers_gas import GASScheduler, SampleInputs, SDMScheduler, distill
from diffusers_gas.adaptive.solvers import DenoiserRequests
from diffusers_gas.calibration import run_on_pipeline
from diffusers_gas.pipelines.driving import (
    Requests,
    differentiable_rollout,
    drive,
    frozen,
    num_evaluations,
    rollout,
    sensitivities,
    table_of_outputs,
)
from diffusers_gas.pipelines.teacher import TeacherCache, default_teacher
from diffusers_gas.solver_table import History


CACHES: dict[str, Callable[[Any], Any]] = {
    "first-block": lambda pipe: FirstBlockCacheConfig(threshold=0.4),
    "attention-broadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "taylor": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
    ),
}


@pytest.fixture
def tiny() -> TinyPipeline:
    """A pipeline of FLUX with blocks to leave out, whose output depends on them."""
    tiny = build("flux")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {**tiny.pipe.transformer.config, "num_layers": 2, "num_single_layers": 2}
        tiny.pipe.transformer = FluxTransformer2DModel.from_config(config).eval()
        for parameter in tiny.pipe.transformer.parameters():
            parameter.data *= 1.5
    return tiny


@pytest.fixture(params=CACHES)
def cached(request, tiny) -> Iterator[TinyPipeline]:
    tiny.pipe.transformer.enable_cache(CACHES[request.param](tiny.pipe))
    yield tiny
    assert tiny.pipe.transformer.is_cache_enabled


def inputs(tiny: TinyPipeline, num_samples: int) -> SampleInputs:
    return SampleInputs.create(0, num_samples, **tiny.inputs(1))


@pytest.mark.parametrize("kind", [GASScheduler, SDMScheduler])
def test_sampling(kind, cached):
    scheduler, transformer = kind.from_config(cached.pipe.scheduler.config), cached.pipe.transformer
    first, second = (final_state(cached, scheduler, num_inference_steps=8) for _ in range(2))
    assert torch.equal(first, second)
    config = transformer._cache_config
    transformer.disable_cache()
    plain = final_state(cached, scheduler, num_inference_steps=8)
    transformer.enable_cache(config)
    assert 0 < (first - plain).square().mean() < 0.01 * plain.square().mean()


def by_outputs(weights: Tensor, times: Tensor) -> Callable[..., Requests]:
    """Sampling by a table in terms of the network's outputs."""

    def algorithm(noise_schedule: Any, prediction_type: str) -> Requests:
        history, state = History(weights.tolist()), None
        for t in times.tolist():
            sample, output = yield state, t
            state = history.step(sample, output)
        return state

    return algorithm


def test_neighbours_are_samples_of_their_own(cached):
    n, arguments = 4, cached.inputs(1) | {"generator": torch.Generator()}
    solver = GASScheduler.from_config(cached.pipe.scheduler.config).theory_solver(n, mu=1.0)
    tables, requests = [], []

    def driven(algorithm: Callable[..., Requests]) -> Any:
        arguments["generator"].manual_seed(0)
        return drive(cached.pipe, algorithm, num_inference_steps=n, **arguments)

    def neighbours(from_start: bool) -> Any:
        def algorithm(noise_schedule: Any, prediction_type: str) -> Requests:
            tables.append(table_of_outputs(solver, noise_schedule, prediction_type))
            found = sensitivities(tables[-1], from_start=from_start)
            answer, count = None, 0
            try:
                while True:
                    answer = yield found.send(answer)
                    count += 1
            except StopIteration as stop:
                requests.append(count)
                return stop.value

        return driven(algorithm)

    final, found, mixing = neighbours(from_start=True)
    assert requests == [num_evaluations(n, from_start=True)]
    weights, times = tables[0].weights.detach(), tables[0].evaluation_times.detach()
    torch.testing.assert_close(driven(by_outputs(weights, times)), final)
    arguments["generator"].manual_seed(0)
    torch.testing.assert_close(rollout(cached.pipe, solver, **arguments), final)
    expected = []
    for k in range(n):
        for b in range(k + 2):
            changed = weights.clone()
            changed[k, 1 : b + 2] += found[len(expected)][1] * mixing[: b + 1, b]
            expected.append(driven(by_outputs(changed, times)))
    for k in range(n):
        changed = times.clone()
        changed[k] += found[len(expected)][1]
        expected.append(driven(by_outputs(weights, changed)))
    for (state, _), own in zip(found, expected, strict=True):
        torch.testing.assert_close(state, own, rtol=1e-4, atol=1e-4)
    _, misled, _ = neighbours(from_start=False)
    assert max((state - own).abs().max() for (state, _), own in zip(misled, expected)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("cached", ["attention-broadcast"], indirect=True)
def test_distillation_makes_up_for_the_cache(cached):
    transformer, samples = cached.pipe.transformer, inputs(cached, 8)
    options = {"teacher_num_inference_steps": 20, "max_iterations": 3}
    learned = distill(cached.pipe, 4, inputs=samples, **options)
    record = learned.solvers[4].provenance
    assert record["distance"] < record["initial_distance"]
    config = transformer._cache_config
    transformer.disable_cache()
    of_plain = distill(cached.pipe, 4, inputs=samples, **options)
    fine = final_state(cached, GASScheduler.from_config(cached.pipe.scheduler.config), num_inference_steps=40)
    transformer.enable_cache(config)
    ours, theirs = (
        (final_state(cached, s, num_inference_steps=4) - fine).square().mean() for s in (learned, of_plain)
    )
    assert ours < theirs


def test_teacher_and_exploration_are_without(cached, tmp_path):
    pipe, samples = cached.pipe, inputs(cached, 2)

    def denoised(x: Tensor, levels: Tensor) -> DenoiserRequests[Tensor]:
        found = []
        for sigma in levels[:-1]:
            found.append((yield x, sigma))
        return torch.stack(found)

    def found(folder: Path) -> list[Tensor]:
        teacher = TeacherCache(folder, "flux", default_teacher(pipe), 10).collect(pipe, samples, 2, "Teacher")
        sigmas = torch.tensor([80.0, 10.0, 2.0, 0.5, 0.0], dtype=torch.float64)
        arguments = cached.inputs(1) | {"generator": torch.Generator().manual_seed(0)}
        return [teacher.final, run_on_pipeline(pipe, sigmas, denoised, num_inference_steps=4, **arguments)]

    with_cache, config = found(tmp_path / "cached"), pipe.transformer._cache_config
    pipe.transformer.disable_cache()
    torch.testing.assert_close(with_cache, found(tmp_path / "plain"), rtol=0, atol=0)
    pipe.transformer.enable_cache(config)


def test_gradients_and_aborted_calls(cached):
    pipe, arguments = cached.pipe, cached.inputs(1)
    solver = GASScheduler.from_config(pipe.scheduler.config).theory_solver(4, mu=1.0)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def abort(*_: Any) -> Any:
        raise KeyboardInterrupt

    expected = rollout(pipe, solver, **arguments, generator=generator())
    for _ in range(2):
        final = differentiable_rollout(pipe, solver, **arguments, generator=generator())
        torch.testing.assert_close(final.detach(), expected)
    final.square().mean().backward()
    assert solver.data_coefficients.grad.isfinite().all()
    with pytest.raises(KeyboardInterrupt):
        pipe(**arguments, num_inference_steps=4, callback_on_step_end=abort)
    again = rollout(pipe, solver, **arguments, generator=generator())
    torch.testing.assert_close(again, expected)
    with pytest.raises(ValueError, match="without gradient checkpointing"), frozen(pipe):
        differentiable_rollout(pipe, solver, gradient_checkpointing=True, **arguments)


def test_a_cache_that_cannot_be_switched_off_is_refused(tiny):
    apply_first_block_cache(tiny.pipe.transformer, FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="only those that `enable_cache` of a network"):
        distill(tiny.pipe, 3, inputs=inputs(tiny, 4))
