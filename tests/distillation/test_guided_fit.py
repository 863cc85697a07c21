"""Gauss-Newton fits of one solver for a range of guidance scales."""

import math

import pytest
import torch
from tiny_pipelines import build
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from diffusers_gas import GASScheduler, distill
from diffusers_gas.distillation.distill import guidance_knots
from diffusers_gas.distillation.gauss_newton import Problem
from diffusers_gas.guided_solver import GuidedSolver
from diffusers_gas.pipelines import driving
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache, default_teacher


@pytest.fixture(scope="module")
def tiny():
    tiny = build("stable-diffusion", torch.float64)
    tiny.pipe.set_progress_bar_config(disable=True)
    return tiny


def prompts(tiny) -> dict:
    return {name: value for name, value in tiny.inputs(2).items() if name != "guidance_scale"}


@pytest.mark.parametrize("typical_loss", [math.inf, 1e-3])
def test_the_joint_linearization_is_the_derivative_of_the_loss(tiny, tmp_path, monkeypatch, typical_loss):
    """For samples at the knots and between them, squared or in the robust form. Networks are rough in time, so that the coefficients show it."""
    monkeypatch.setitem(driving.STATE_DIFFERENCE, torch.float64, 1e-4)
    inputs = SampleInputs.create(0, 3, **prompts(tiny), guidance_scale=[2.0, 3.0, 6.0])
    samples = TeacherCache(tmp_path, "tiny", default_teacher(tiny.pipe), 6).collect(tiny.pipe, inputs, 4, "")
    theory = GASScheduler.from_config(tiny.pipe.scheduler.config, t_start=0.8).theory_solver(2)
    solver = GuidedSolver.through(theory, [2.0, 6.0])
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    problem = Problem(tiny.pipe)
    problem.typical_loss = typical_loss

    def loss_of() -> float:
        return problem.means(problem.robust(problem.losses_of_samples(solver, samples)[0])[0])[0]

    assert problem.linearize(solver, samples) == pytest.approx(loss_of(), rel=1e-6)
    assert (loss_of() < 0.9 * problem.losses(solver, samples)[0]) == (typical_loss < math.inf)

    point, size = parameters_to_vector(solver.parameters()).detach(), 1e-5
    of_coefficients = torch.cat([torch.full((p.numel(),), float(p.ndim == 2)) for p in solver.parameters()])
    for direction in of_coefficients * torch.randn(3, len(point), dtype=torch.float64):
        around = []
        for sign in (1, -1):
            vector_to_parameters(point + sign * size * direction, solver.parameters())
            around.append(loss_of())
        slope = (around[0] - around[1]) / (2 * size)
        assert 2 * (problem.gradient @ direction).item() == pytest.approx(slope, rel=1e-3)


def test_a_list_of_scales_makes_one_solver_for_the_range(tiny):
    call = {"teacher_num_inference_steps": 4, "max_iterations": 1, **prompts(tiny)}
    scheduler = distill(tiny.pipe, 2, guidance_scale=[6.0, 2.0, 3.0], **call)
    solver = scheduler.solvers[2]
    assert isinstance(solver, GuidedSolver) and (solver.scales, solver.usual_scale) == ([2.0, 3.0, 6.0], 6.0)
    assert solver.provenance["pipeline_arguments"]["guidance_scale"] == [6.0, 2.0, 3.0]
    again = distill(tiny.pipe, 2, guidance_scale=4.0, initialize_from=scheduler, **{**call, "max_iterations": 0})
    expected = solver.at(4.0)
    assert all(map(torch.equal, again.solvers[2].parameters(), expected.parameters()))


@pytest.mark.parametrize(
    "scales, knots",
    [
        ({"guidance_scale": 5.0}, None),
        ({"guidance_scale": [5.0]}, None),
        ({"true_cfg_scale": [5.0, 2.0]}, ("true_cfg_scale", [2.0, 5.0])),
        ({"guidance_scale": [1.0, 2.0, 3.0, 5.0, 8.0]}, ("guidance_scale", [1.0, 8.0**0.5, 8.0])),
    ],
)
def test_knots(scales, knots):
    found = guidance_knots(SampleInputs.create(0, 8, **scales))
    assert found == knots or (found[0] == knots[0] and found[1] == pytest.approx(knots[1]))


@pytest.mark.parametrize(
    "scales, message",
    [
        ({"guidance_scale": [0.0, 5.0]}, "must be positive"),
        ({"guidance_scale": [2.0, 5.0], "image_guidance_scale": [1.0, 2.0]}, "Only one guidance scale can be a range"),
    ],
)
def test_scales_that_no_solver_is_fitted_to(scales, message):
    with pytest.raises(ValueError, match=message):
        guidance_knots(SampleInputs.create(0, 8, **scales))
