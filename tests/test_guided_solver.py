"""A solver for a range of guidance scales."""

import math

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from diffusers_gas import GASScheduler, GeneralizedSolver
from diffusers_gas.guided_solver import GuidedSolver


def guided(scales=(2.0, 4.0, 10.0), n=3) -> GuidedSolver:
    solver = GuidedSolver.through(GASScheduler().theory_solver(n), scales)
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return solver


def values(solver: GeneralizedSolver) -> torch.Tensor:
    return parameters_to_vector(solver.parameters()).detach()


@pytest.mark.parametrize("scales", [(2.0, 10.0), (2.0, 4.0, 10.0), (0.5, 1.0, 3.0, 7.5)])
def test_parameters_are_polynomials_in_the_logarithm_of_the_scale(scales):
    solver = guided(scales)
    for knot, scale in zip(solver.knots, scales):
        assert torch.equal(values(solver.at(scale)), values(knot))
    logs = torch.linspace(math.log(scales[0]), math.log(scales[-1]), len(scales) + 1, dtype=torch.float64)
    at = torch.stack([values(solver.at(math.exp(log))) for log in logs])
    for _ in scales:
        at = at.diff(dim=0)
    assert at.abs().max() < 1e-12, "differences of order K of polynomials of degree K - 1 on even places"
    for outside, nearest in ((0.0, scales[0]), (-1.0, scales[0]), (100.0, scales[-1])):
        assert torch.equal(values(solver.at(outside)), values(solver.at(nearest)))


def test_a_fit_starts_from_another_solver_at_each_scale():
    start = guided()
    scales = (2.0, 3.0, 5.0)
    solver = GuidedSolver.through(start, scales, "true_cfg_scale", 20.0)
    assert (solver.argument, solver.usual_scale) == ("true_cfg_scale", 5.0)
    for scale in scales:
        assert torch.allclose(values(solver.at(scale)), values(start.at(scale)), rtol=0, atol=1e-15)
    more = solver.with_one_more_step()
    assert (more.scales, more.argument, more.num_inference_steps) == (solver.scales, solver.argument, 4)


@pytest.mark.parametrize("scales", [(), (2.0,), (3.0, 2.0), (2.0, 2.0), (0.0, 2.0), (2.0, math.inf), (1.0, math.nan)])
def test_ranges_that_are_none(scales):
    with pytest.raises(ValueError, match="needs 2 or more guidance scales, positive and ascending"):
        guided(scales)


def test_tensors_and_config_make_the_solver():
    solver = guided()
    assert GuidedSolver.from_tensors(solver.state_dict(), **solver.config()).content() == solver.content()
    tensors = solver.state_dict()
    for change in (
        {"knots.3.timestep_logits": tensors["knots.0.timestep_logits"]},
        {"timestep_logits": torch.zeros(2)},
    ):
        with pytest.raises(ValueError, match="expected the tensors of 3 knots"):
            GuidedSolver.from_tensors({**tensors, **change}, **solver.config())
    del tensors["knots.1.timestep_logits"]
    with pytest.raises(ValueError, match=r"missing tensors \['timestep_logits'\]"):
        GuidedSolver.from_tensors(tensors, **solver.config())
