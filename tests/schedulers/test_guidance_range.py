"""Sampling with one solver for a range of guidance scales."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from saved_schedulers import load_sampler
from tiny_components import TinyPipeline
from tiny_pipelines import build, final_state

from diffusers_gas import GASScheduler, GeneralizedSolver
from diffusers_gas.guided_solver import GuidedSolver
from diffusers_gas.presentation import figures
from diffusers_gas.presentation.description import describe
from diffusers_gas.presentation.model_card import write_model_card


STEPS, SCALES = 4, (2.0, 5.0, 10.0)


@pytest.fixture(scope="module")
def tiny():
    return build("stable-diffusion")


def ranged(tiny: TinyPipeline, argument: str = "guidance_scale") -> GASScheduler:
    """A scheduler with a solver for a range of scales."""
    scheduler = GASScheduler.from_config(tiny.pipe.scheduler.config)
    theory = scheduler.theory_solver(STEPS, mu=1.0)
    solver = GuidedSolver.through(theory, SCALES, argument, 3.0)
    solver.provenance = {"pipeline_arguments": {argument: list(SCALES)}}
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    scheduler.add_solver(solver)
    return scheduler


def plain(scheduler: GASScheduler, solver: GeneralizedSolver) -> GASScheduler:
    """A fresh scheduler with one solver."""
    other = GASScheduler.from_config(dict(scheduler.config))
    other.add_solver(solver)
    solver.provenance = {}
    return other


def switched(solver: GuidedSolver, before: float, after: float, k: int) -> GeneralizedSolver:
    """The solver of a scale with the coefficients of another from step k on."""
    other = copy.deepcopy(solver.at(before))
    with torch.no_grad():
        for name in ("state_coefficients", "data_coefficients"):
            getattr(other, name)[k:] = getattr(solver.at(after), name)[k:]
    return other


@pytest.mark.parametrize(
    "name, argument",
    [
        ("stable-diffusion", "guidance_scale"),
        ("stable-diffusion-3-img2img", "guidance_scale"),
        ("flux", "guidance_scale"),
        ("qwen-image", "true_cfg_scale"),
        ("wan", "guidance_scale"),
    ],
)
def test_the_scale_is_that_of_the_call(name, argument, warnings):
    tiny = build(name)
    scheduler = ranged(tiny, argument)
    inputs = {"num_inference_steps": STEPS, "batch_size": 1}
    for scale in (2.0, 7.0, 2.0, torch.tensor(3.5), 12.0, np.float32(1.5)):  # out of the range at last
        expected = final_state(
            tiny, plain(scheduler, scheduler.solvers[STEPS].at(float(scale))), **inputs, **{argument: scale}
        )
        assert torch.equal(final_state(tiny, scheduler, **inputs, **{argument: scale}), expected)
    (warning,) = warnings
    assert warning.startswith(
        f"This solver is for `{argument}` from 2 to 10 and is used with 12: it samples as for 10."
    )


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-3-img2img"])
def test_a_callback_changes_the_scale(name):
    """The steps after it have the coefficients of the new scale, and the next sampling knows nothing of it."""
    tiny = build(name)
    scheduler, begin = ranged(tiny), STEPS // 2 if "img2img" in name else 0

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0 if begin + step == STEPS - 2 else pipe._guidance_scale
        return {}

    changing = {"num_inference_steps": STEPS, "guidance_scale": 8.0, "callback_on_step_end": callback}
    staying = {"num_inference_steps": STEPS, "guidance_scale": 8.0}
    solver = scheduler.solvers[STEPS]
    for _ in range(2):
        found = final_state(tiny, scheduler, **changing)
        other = plain(scheduler, switched(solver, 8.0, 3.0, STEPS - 1))
        assert torch.allclose(found, final_state(tiny, other, **changing), rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, final_state(tiny, plain(scheduler, solver.at(8.0)), **changing))
        found = final_state(tiny, scheduler, **staying)
        assert torch.equal(found, final_state(tiny, plain(scheduler, solver.at(8.0)), **staying))


def test_a_pipeline_that_embeds_the_scale_keeps_it():
    """Its callbacks cannot change what the network is told."""
    tiny = build("flux")
    scheduler = ranged(tiny)

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 9.0
        return {}

    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
    assert torch.equal(
        final_state(tiny, scheduler, callback_on_step_end=callback, **call), final_state(tiny, scheduler, **call)
    )


def test_two_threads_sample_at_scales_that_change(tiny):
    scheduler = ranged(tiny)
    scales = (2.5, 9.0)

    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = pipe._guidance_scale + 1
        return {}

    def sample(scale: float) -> torch.Tensor:
        pipe = type(tiny.pipe)(**{**tiny.pipe.components, "scheduler": copy.deepcopy(scheduler)})
        other = tiny._replace(pipe=pipe)
        call = {"num_inference_steps": STEPS, "guidance_scale": scale, "callback_on_step_end": callback}
        found = [final_state(other, pipe.scheduler, **call) for _ in range(3)]
        assert torch.equal(found[0], found[2])
        return found[0]

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(sample, scales))
    for scale, found in zip(scales, together):
        assert torch.equal(found, sample(scale))


def test_a_call_without_the_decorator_of_diffusers_is_no_call(tiny, warnings):
    call = inspect.unwrap(type(tiny.pipe).__call__)

    class Pipeline(type(tiny.pipe)):
        def __call__(self, **arguments):
            with torch.no_grad():
                return call(self, **arguments)

    other = tiny._replace(pipe=Pipeline(**tiny.pipe.components, requires_safety_checker=False))
    final_state(other, ranged(tiny), num_inference_steps=STEPS, guidance_scale=8.0)
    assert [warning for warning in warnings if "not known here" in warning]


def test_a_loop_without_a_pipeline_sets_the_scale(tiny, warnings):
    scheduler = ranged(tiny)
    solver = scheduler.solvers[STEPS]

    def sample(scheduler: GASScheduler, changed: float | None = None) -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        state = torch.ones(1, 4, 8, 8)
        for k, t in enumerate(scheduler.timesteps):
            if changed is not None and k == 2:
                scheduler.set_guidance_scale(changed)
            state = scheduler.step(state.sin(), t, state).prev_sample
        return state

    assert torch.equal(sample(scheduler), sample(plain(scheduler, solver.at(3.0)))), "the usual one"
    (warning,) = warnings
    assert warning.startswith("`guidance_scale` is not known here: the solver samples as for 3.")
    for scale in (4.0, 10.0):
        scheduler.set_guidance_scale(scale)
        assert torch.equal(sample(scheduler), sample(plain(scheduler, solver.at(scale))))
    assert torch.allclose(sample(scheduler, 2.0), sample(plain(scheduler, switched(solver, 10.0, 2.0, 2))))
    scheduler.set_guidance_scale(None)
    assert torch.equal(sample(scheduler), sample(plain(scheduler, solver.at(3.0))))
    assert len(warnings) == 1, "once"
    with pytest.raises(ValueError, match="must be a number, got '5'"):
        scheduler.set_guidance_scale("5")


def test_saved_solvers_keep_the_range(tiny, tmp_path):
    scheduler = ranged(tiny, "true_cfg_scale")
    scheduler.add_solver(scheduler.theory_solver(3))
    scheduler.solvers[STEPS].provenance = {"teacher": "some/model"}
    scheduler.save_pretrained(tmp_path)
    loaded = GASScheduler.from_pretrained(tmp_path)
    for n, solver in scheduler.solvers.items():
        assert loaded.solvers[n].content() == solver.content()
        assert loaded.solvers[n].provenance == solver.provenance
    assert type(loaded.solvers[3]) is GeneralizedSolver and loaded.solvers[STEPS].argument == "true_cfg_scale"
    loaded.set_timesteps(STEPS)
    assert torch.equal(loaded.timesteps, plain_timesteps(scheduler))


def plain_timesteps(scheduler: GASScheduler) -> torch.Tensor:
    other = plain(scheduler, scheduler.solvers[STEPS].at(3.0))
    other.set_timesteps(STEPS)
    return other.timesteps


def test_exported_tables_are_those_of_chosen_scales(tiny, tmp_path):
    scheduler = ranged(tiny)
    scheduler.add_solver(scheduler.theory_solver(3))
    scheduler.export(tmp_path / "usual.json")
    usual = load_sampler().from_json(tmp_path / "usual.json")
    scheduler.export(tmp_path / "several.json", guidance_scales=[2.0, 5.0, 9.0])
    several = load_sampler().from_json(tmp_path / "several.json")
    call = {"num_inference_steps": STEPS, "guidance_scale": 6.0}
    expected = plain(scheduler, scheduler.solvers[STEPS].at(3.0))
    assert torch.equal(final_state(tiny, usual, **call), final_state(tiny, expected, **call))
    with pytest.raises(ValueError, match="Choose one of several guidance scales with `set_guidance_scale`"):
        several.set_timesteps(STEPS)
    for scale, nearest in ((5.0, 5.0), (6.0, 5.0), (20.0, 9.0)):
        several.set_guidance_scale(scale)
        expected = plain(scheduler, scheduler.solvers[STEPS].at(nearest))
        assert torch.equal(final_state(tiny, several, **call), final_state(tiny, expected, **call))
    several.set_timesteps(3)  # a solver of one scale
    with pytest.raises(ValueError, match="`guidance_scales` are for solvers of a range"):
        scheduler.export(tmp_path / "none.json", [3], guidance_scales=[2.0])


def test_the_range_is_shown(tiny, tmp_path, monkeypatch):
    scheduler = ranged(tiny)
    scheduler.solvers[STEPS].provenance = {"pipeline_arguments": {"guidance_scale": [2.0, 5.0, 10.0]}}
    scheduler.save_pretrained(tmp_path)
    assert "learned numbers, guidance_scale 2 to 10, shown for 3" in describe(scheduler, [STEPS])
    card = write_model_card(scheduler, tmp_path).read_text(encoding="utf-8")
    assert "One solver is for every `guidance_scale` from 2 to 10. It follows the scale of the call." in card
    scheduler.add_solver(scheduler.theory_solver(3))
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure))
    figures.draw_solvers(scheduler, [3, STEPS], tmp_path / "solvers.png")
    over_scales = [axis for axis in drawn[0].axes if axis.get_xlabel() == "guidance_scale"]
    assert len(over_scales) == 2 and len(over_scales[0].get_lines()) == STEPS
