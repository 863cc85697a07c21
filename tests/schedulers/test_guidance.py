"""A solver remembers its guidance scale and says when it is used far from it."""

import pytest
from tiny_pipelines import build, generators

from diffusers_gas import GASScheduler
from diffusers_gas.pipelines.inputs import default_guidance


@pytest.fixture(scope="module")
def tiny():
    return build("stable-diffusion")


@pytest.mark.parametrize(
    "trained, used, warned",
    [
        (7.5, 7.5, False),
        (7.5, 6.5, False),
        (7.5, 9.0, False),
        (7.5, 3.0, True),
        (7.5, 12.0, True),
        (7.5, 1.0, True),
        ([3.0, 7.5], 5.0, False),
        ([3.0, 7.5], 2.0, True),
        (None, 30.0, False),
    ],
)
def test_pipelines_are_warned_far_from_the_trained_scale(tiny, warnings, tmp_path, trained, used, warned):
    scheduler = GASScheduler.from_config(tiny.pipe.scheduler.config)
    solver = scheduler.theory_solver(3)
    solver.provenance = {"pipeline_arguments": {} if trained is None else {"guidance_scale": trained}}
    scheduler.add_solver(solver)
    scheduler.save_pretrained(tmp_path)
    own = tiny.pipe.scheduler
    tiny.pipe.scheduler = GASScheduler.from_pretrained(tmp_path)
    try:
        inputs = {**tiny.inputs(1), "guidance_scale": used, "output_type": "latent"}
        tiny.pipe(**inputs, generator=generators(1), num_inference_steps=3)
    finally:
        tiny.pipe.scheduler = own
    assert len(warnings) == warned
    if warned:
        assert f"is used with {used}" in warnings[0] and "`--guidance_scale 3 5 7.5`" in warnings[0]


def test_no_pipeline_no_warning(warnings):
    guidance_scale = 30.0
    scheduler = GASScheduler()
    scheduler.add_solver(scheduler.theory_solver(3))
    scheduler.solvers[3].provenance = {"pipeline_arguments": {"guidance_scale": 1.0}}
    scheduler.set_timesteps(3)
    assert not warnings and guidance_scale


def test_defaults_are_the_pipelines_own(tiny, digits):
    assert default_guidance(tiny.pipe) == {"guidance_scale": 7.5}
    assert default_guidance(digits) == {}
    assert "true_cfg_scale" in default_guidance(build("flux").pipe)
