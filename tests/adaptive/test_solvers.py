"""Order, cost and decisions of the solvers on the Gaussian-mixture probability-flow ODE."""

import functools
import math
from itertools import pairwise

import pytest
import torch
from gaussian_mixture import reference_model, vp_schedule

from diffusers_gas.adaptive import (
    SIGMA_TIME,
    VE_TIME,
    Churn,
    CurvatureSwitch,
    ProbabilityFlow,
    adaptive_dpmsolver,
    adaptive_heun,
    adaptive_unipc,
    cosine_weights,
    euler,
    heun,
    linear_weights,
    run,
    sigma_grid,
    step_weights,
)
from diffusers_gas.noise_schedules import FlowMatchSchedule


VP_TIME = ProbabilityFlow.from_noise_schedule(vp_schedule(0.01, 100.0))
FLOW_TIME = ProbabilityFlow.from_noise_schedule(FlowMatchSchedule(shift=2.0))
FIRST, SECOND = (lambda n: step_weights(n, None)), (lambda n: step_weights(n, 0))


def noise(batch=3, seed=0):
    return torch.randn(batch, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def full_sigmas(num_steps=18, **kwargs):
    return torch.cat([sigma_grid(num_steps, **kwargs), torch.zeros(1, dtype=torch.float64)])


def interior_sigmas(num_steps):
    """Noise levels of a stretch on which the mixture's components separate, away from the singular end at 0."""
    return sigma_grid(num_steps + 1, 1.5, 12.0)


START = 12.0 * noise()


@functools.cache
def exact_end():
    """By the fourth-order Runge-Kutta method."""
    model, x = reference_model(), START

    def drift(x, sigma):
        return (x - model(x, sigma)) / sigma

    for sigma, end in pairwise(interior_sigmas(200)):
        h = end - sigma
        k1 = drift(x, sigma)
        k2 = drift(x + h / 2 * k1, sigma + h / 2)
        k3 = drift(x + h / 2 * k2, sigma + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + drift(x + h * k3, end))
    return x


def error(result):
    return (result.sample - exact_end()).norm().item()


ORDERS = {
    "euler": (lambda x, s: euler(x, s), 1),
    "euler vp": (lambda x, s: euler(x, s, flow=VP_TIME), 1),
    "heun": (lambda x, s: heun(x, s), 2),
    "heun ve": (lambda x, s: heun(x, s, flow=VE_TIME), 2),
    "heun vp": (lambda x, s: heun(x, s, flow=VP_TIME), 2),
    "heun flow matching": (lambda x, s: heun(x, s, flow=FLOW_TIME), 2),
    "midpoint": (lambda x, s: adaptive_heun(x, s, SECOND(len(s) - 1), alpha=0.5), 2),
    "ralston": (lambda x, s: adaptive_heun(x, s, SECOND(len(s) - 1), alpha=2 / 3), 2),
    "dpmsolver++ 1M": (lambda x, s: adaptive_dpmsolver(x, s, FIRST(len(s) - 1)), 1),
    "dpmsolver++ 2M": (lambda x, s: adaptive_dpmsolver(x, s, SECOND(len(s) - 1)), 2),
    "dpmsolver++ 2M heun": (lambda x, s: adaptive_dpmsolver(x, s, SECOND(len(s) - 1), solver_type="heun"), 2),
}


@pytest.mark.parametrize("solver", ORDERS)
def test_convergence_order(solver):
    algorithm, order = ORDERS[solver]
    model = reference_model()
    errors = [error(run(algorithm(START, interior_sigmas(steps)), model)) for steps in (20, 40, 80)]
    measured = [math.log2(a / b) for a, b in pairwise(errors)]
    assert measured == pytest.approx([order, order], abs=0.2)


def test_unipc_is_of_higher_order_and_better_than_its_predictor():
    model = reference_model()
    errors = []
    for steps in (20, 40, 80):
        sigmas, rule = interior_sigmas(steps), SECOND(steps)
        errors.append(error(run(adaptive_unipc(START, sigmas, rule), model)))
        assert errors[-1] < error(run(adaptive_dpmsolver(START, sigmas, rule), model))
    assert all(a / b > 3.5 for a, b in pairwise(errors))


def test_first_order_multistep_solvers_are_euler_in_sigma_time():
    sigmas, model = full_sigmas(), reference_model()
    x = noise() * sigmas[0]
    expected = run(euler(x, sigmas), model).sample
    for solver in (adaptive_dpmsolver, adaptive_unipc):
        torch.testing.assert_close(run(solver(x, sigmas, FIRST(18)), model).sample, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", [adaptive_heun, adaptive_dpmsolver, adaptive_unipc])
def test_a_switch_and_the_plan_it_found_give_the_same_sample(solver):
    sigmas, model = full_sigmas(), reference_model()
    x = noise() * sigmas[0]
    online = run(solver(x, sigmas, CurvatureSwitch(1e-3)), model)
    assert 0 < online.switch_index < 17
    planned = run(solver(x, sigmas, step_weights(18, online.switch_index)), model)
    assert torch.equal(online.sample, planned.sample)
    assert online.num_evaluations == planned.num_evaluations
    assert planned.switch_index is None


@pytest.mark.parametrize("switch_index", [0, 1, 9, 17, None])
def test_evaluations_of_a_plan(switch_index):
    sigmas, model = full_sigmas(), reference_model()
    result = run(adaptive_heun(noise() * 80, sigmas, step_weights(18, switch_index)), model)
    assert result.num_evaluations == len(model.calls) == (18 if switch_index is None else 35 - switch_index)


def test_looking_ahead_costs_no_evaluation():
    sigmas, model = full_sigmas(), reference_model()
    result = run(adaptive_heun(noise() * 80, sigmas, CurvatureSwitch(1e-3, lagged=False)), model)
    assert result.num_evaluations == len(model.calls) == 35 - result.switch_index
    planned = run(adaptive_heun(noise() * 80, sigmas, step_weights(18, result.switch_index)), model)
    torch.testing.assert_close(result.sample, planned.sample, rtol=1e-12, atol=1e-13)
    # It sees a step earlier what the lagged proxy sees only after the step.
    lagged = run(adaptive_heun(noise() * 80, sigmas, CurvatureSwitch(1e-3)), model)
    assert result.switch_index <= lagged.switch_index


@pytest.mark.parametrize("flow", [SIGMA_TIME, VE_TIME, VP_TIME, FLOW_TIME])
def test_every_parameterization_samples_the_mixture(flow):
    sigmas = full_sigmas(60, sigma_min=0.01, sigma_max=50.0)
    sample = run(heun(noise() * 50, sigmas, flow=flow), reference_model()).sample
    means = reference_model().means
    distance = (sample[:, None] - means).flatten(2).norm(dim=2).min(1).values / sample[0].numel() ** 0.5
    assert (distance < 0.3).all()  # components have standard deviation 0.15 and are much further apart


def test_flow_matching_from_almost_pure_noise_in_float32():
    sigmas = torch.cat([torch.tensor([1e4]), full_sigmas(30, sigma_min=0.01, sigma_max=50.0)])
    samples = [
        run(heun(noise().to(dtype) * 1e4, sigmas, flow=FLOW_TIME), reference_model_as(dtype)).sample
        for dtype in (torch.float64, torch.float32)
    ]
    assert samples[1].dtype == torch.float32
    torch.testing.assert_close(samples[1].double(), samples[0], rtol=0, atol=1e-2)


def reference_model_as(dtype):
    model = reference_model()
    model.means = model.means.to(dtype)
    return model


def test_fresh_noise_is_kept_out_of_the_curvature_unless_asked():
    sigmas = full_sigmas(40)
    x = noise(16) * 80
    indices = {}
    for published in (True, False):
        generator = torch.Generator().manual_seed(1)
        churn = Churn(
            4.0,
            s_max=50.0,
            draw_noise=lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator),  # noqa: B023
            noise_in_curvature=published,
        )
        indices[published] = run(
            adaptive_heun(x, sigmas, CurvatureSwitch(1e-2), churn=churn), reference_model()
        ).switch_index
    deterministic = run(adaptive_heun(x, sigmas, CurvatureSwitch(1e-2)), reference_model()).switch_index
    first_churned = int((sigmas > 50).sum())
    assert indices[True] <= first_churned + 1
    assert abs(indices[False] - deterministic) <= 2


def test_churn_outside_its_range_changes_nothing():
    sigmas, model = full_sigmas(), reference_model()
    x = noise() * 80
    churn = Churn(40.0, s_min=100.0)
    for rule in (CurvatureSwitch(1e-3), SECOND(18)):
        torch.testing.assert_close(
            run(adaptive_heun(x, sigmas, rule, churn=churn), model).sample,
            run(adaptive_heun(x, sigmas, rule), model).sample,
        )


def test_weights():
    assert step_weights(5, 2).tolist() == [1, 1, 0, 0, 0]
    for weights in (linear_weights(9), cosine_weights(9)):
        assert weights[0] == 1
        assert weights[-1].abs() < 1e-12
        assert weights[4] == pytest.approx(0.5)
        assert (weights.diff() < 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: adaptive_heun(x, [1.0, 2.0, 0.0], CurvatureSwitch(1.0)), "descending"),
        (lambda x: adaptive_heun(x, [2.0, 2.0, 0.0], CurvatureSwitch(1.0)), "descending"),
        (lambda x: adaptive_heun(x, [2.0, math.nan, 0.0], CurvatureSwitch(1.0)), "descending"),
        (lambda x: adaptive_heun(x, [2.0], CurvatureSwitch(1.0)), "at least two"),
        (lambda x: adaptive_heun(x, [2.0, -1.0], CurvatureSwitch(1.0)), "may be 0"),
        (lambda x: adaptive_heun(x, [2.0, 1.0], [0.5, 0.5]), "1 weights"),
        (lambda x: adaptive_heun(x, [2.0, 1.0], [1.5]), "weights"),
        (lambda x: adaptive_heun(x, [2.0, 1.0], [1.0], alpha=0.0), "alpha"),
        (lambda x: adaptive_heun(x, [2.0, 1.0], CurvatureSwitch(1.0, lagged=False), alpha=0.5), "lagged"),
        (lambda x: adaptive_unipc(x, [2.0, 1.0], CurvatureSwitch(1.0, lagged=False)), "lagged"),
        (lambda x: adaptive_dpmsolver(x, [2.0, 1.0], [1.0], solver_type="euler"), "midpoint, heun"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        run(call(noise()), reference_model())


def test_a_curvature_that_is_no_number_decides_nothing():
    result = run(adaptive_heun(noise(), full_sigmas(), CurvatureSwitch(1e-3)), lambda x, sigma: x * math.nan)
    assert result.switch_index is None and result.num_evaluations == 18


def test_churn_adds_nothing_outside_its_range_in_any_time():
    sigmas = full_sigmas()
    for flow in (SIGMA_TIME, VE_TIME, VP_TIME):
        churned = adaptive_heun(80 * noise(), sigmas, SECOND(18), flow=flow, churn=Churn(40.0, s_min=100.0))
        expected = run(heun(80 * noise(), sigmas, flow=flow), reference_model()).sample
        torch.testing.assert_close(run(churned, reference_model()).sample, expected)


def test_a_threshold_must_be_a_number():
    with pytest.raises(ValueError, match="NaN"):
        CurvatureSwitch(math.nan)
