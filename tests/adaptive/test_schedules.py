"""Wasserstein-bounded steps, eta profiles and resampling: bounds, termination and monotonicity."""

import itertools
import math

import pytest
import torch
from gaussian_mixture import iddpm_noise_levels, reference_model, vp_schedule

from diffusers_gas.adaptive import (
    SIGMA_TIME,
    VE_TIME,
    ErrorMeasure,
    ProbabilityFlow,
    StepSearch,
    Tolerance,
    adaptive_schedule,
    eta_profile,
    resample_sigmas,
    run,
    sigma_grid,
)
from diffusers_gas.noise_schedules import check_sigmas, pchip


VP_TIME = ProbabilityFlow.from_noise_schedule(vp_schedule(0.01, 100.0))


def start(grid, batch=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, 4, 4, dtype=torch.float64, generator=generator) * grid[0]


def search_schedule(grid, tolerance, *args, **kwargs):
    model = reference_model()
    result = run(adaptive_schedule(start(grid), grid, tolerance, *args, **kwargs), model)
    assert result.num_evaluations == len(model.calls)
    return result


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("flow", [SIGMA_TIME, VE_TIME, VP_TIME])
def test_every_step_keeps_the_tolerance_on_its_own_batch(solver, flow):
    grid, tolerance = sigma_grid(10, 0.01, 100.0), Tolerance(0.02, 0.2)
    search = StepSearch(solver=solver, max_shrinks=12)
    result = search_schedule(grid, tolerance, search, flow=flow)
    profile = run(eta_profile(start(grid), result.sigmas, solver=solver, flow=flow), reference_model())
    limits = torch.tensor([tolerance(sigma.item(), 100.0) for sigma in result.sigmas[:-2]])
    assert not any(step.exceeds_tolerance for step in result.steps)
    assert (profile.eta[:-1] <= limits * (1 + 1e-6)).all()


def test_steps_of_the_published_search_exceed_the_tolerance():
    grid, tolerance = sigma_grid(18), Tolerance(0.02, 0.2)
    result = search_schedule(grid, tolerance, StepSearch(max_shrinks=2, variant="published"))
    eta = run(eta_profile(start(grid), result.sigmas), reference_model()).eta[:-1]
    limits = torch.tensor([step.tolerance for step in result.steps])
    assert (eta / limits).max() > 1.5


@pytest.mark.parametrize("flow", [SIGMA_TIME, VP_TIME])
def test_search_terminates_for_any_tolerance(flow):
    for eta, num_steps, snap in itertools.product((1e-14, 1e-4, 1e12), (2, 3, 12), (True, False)):
        check_search(eta, num_steps, snap, flow)


def check_search(eta, num_steps, snap, flow):
    grid = sigma_grid(num_steps, 0.01, 100.0)
    search = StepSearch(snap=snap, max_shrinks=2, solver="heun" if num_steps == 3 else "euler")
    result = search_schedule(grid, Tolerance(eta, 10 * eta), search, flow=flow)
    check_sigmas(result.sigmas)
    assert result.sigmas[[0, -2, -1]].tolist() == [grid[0], grid[-1], 0]
    assert len(result.steps) <= (num_steps - 1) * (1 if snap else 2**2 + 1)
    if snap:
        assert all((grid - sigma).abs().min() <= 1e-9 * sigma for sigma in result.sigmas[:-1])
    if eta == 1e12:
        assert len(result.steps) <= max(1, num_steps // 4)
    if eta == 1e-14 and not snap:
        assert any(step.exceeds_tolerance for step in result.steps)


def test_snapping_terminates_on_a_grid_that_ends_above_its_range():
    grid = iddpm_noise_levels()[300:-1:40]
    assert 0.002 < grid[-1] < grid[0] < 81
    for variant in ("verified", "published"):
        result = search_schedule(grid, Tolerance(0.02, 0.2), StepSearch(snap=True, variant=variant))
        assert result.sigmas[-2] == grid[-1]


def test_a_tighter_tolerance_needs_more_steps():
    grid = sigma_grid(18)
    counts = [len(search_schedule(grid, Tolerance(eta, 10 * eta)).steps) for eta in (0.1, 0.02, 0.004, 0.0008)]
    assert counts == sorted(counts)
    assert counts[0] * 4 < counts[-1]


def test_finer_steps_at_low_noise_with_a_smaller_eta_min():
    grid = sigma_grid(18)
    loose, tight = (search_schedule(grid, Tolerance(eta_min, 0.2)) for eta_min in (0.1, 0.005))
    assert (tight.sigmas < 1).sum() > (loose.sigmas < 1).sum()


def test_verification_is_free_for_euler():
    grid = sigma_grid(18)
    result = search_schedule(grid, Tolerance(0.02, 0.2))
    assert result.num_evaluations == 1 + sum(len(step.trials) for step in result.steps)


@pytest.mark.parametrize("variant", ["verified", "published"])
def test_the_longest_accepted_trial_is_taken_unlike_in_the_published_search(variant):
    steps = search_schedule(sigma_grid(18), Tolerance(0.02, 0.2), StepSearch(variant=variant)).steps
    longest = [max(trial.length for trial in step.trials if trial.eta <= step.tolerance) for step in steps]
    taken = [step.best.length for step in steps]
    assert (taken == longest) == (variant == "verified")
    assert any(step.num_expansions for step in steps)
    assert all(len({trial.t for trial in step.trials}) == len(step.trials) for step in steps)
    if variant == "verified":  # a rejected doubling is not halved again to less than what was accepted
        assert all(step.num_shrinks == 0 for step in steps if step.num_expansions)


def test_the_search_knows_the_error_that_the_profile_measures():
    grid = sigma_grid(18)
    result = search_schedule(grid, Tolerance(0.02, 0.2), keep_states=True)
    profile = run(eta_profile(start(grid), result.sigmas), reference_model())
    found = torch.tensor([step.best.eta for step in result.steps], dtype=torch.float64)
    torch.testing.assert_close(profile.eta[:-1], found, rtol=1e-6, atol=1e-12)
    assert len(result.states) == len(result.sigmas) - 1
    assert torch.equal(result.states[-1], result.sample)


def test_rms_errors_do_not_grow_with_the_dimension():
    grid = torch.cat([sigma_grid(18), torch.zeros(1)])
    model = lambda x, sigma: 0.25 / (0.25 + sigma**2) * x  # noqa: E731
    x = torch.ones(1, 4, dtype=torch.float64) * grid[0]
    small, large = (
        run(eta_profile(x.repeat(1, n), grid, measure=ErrorMeasure(norm="rms")), model).eta[:-3] for n in (1, 100)
    )
    torch.testing.assert_close(small, large)
    small, large = (run(eta_profile(x.repeat(1, n), grid), model).eta for n in (1, 100))
    torch.testing.assert_close(10 * small, large)


@pytest.mark.parametrize("spacing", ["edm", "loglinear"])
@pytest.mark.parametrize("q", [0.0, 0.25])
def test_resampling_keeps_ends_and_order(spacing, q):
    sigmas = torch.cat([sigma_grid(25), torch.zeros(1)])
    eta = torch.rand(25, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.01
    for num_steps in (2, 3, 10, 200):
        out = resample_sigmas(sigmas, eta, num_steps, q=q, spacing=spacing)
        check_sigmas(out)
        assert out[[0, -2, -1]].tolist() == sigmas[[0, -2, -1]].tolist()
        assert len(out) == num_steps + 1


def test_resampling_equal_errors_to_the_same_number_is_the_identity():
    sigmas = torch.cat([sigma_grid(12), torch.zeros(1, dtype=torch.float64)])
    out = resample_sigmas(sigmas, torch.full((12,), 0.3), 12, q=0.0)
    torch.testing.assert_close(out, sigmas, rtol=1e-10, atol=0)


def test_resampling_equalizes_errors():
    grid = torch.cat([sigma_grid(18), torch.zeros(1)])
    fine = torch.cat([sigma_grid(200), torch.zeros(1)])
    eta = run(eta_profile(start(fine), fine), reference_model()).eta
    resampled = resample_sigmas(fine, eta, 18, q=0.0)
    spread = []
    for sigmas in (grid, resampled):
        eta = run(eta_profile(start(sigmas), sigmas), reference_model()).eta[:-1]
        spread.append((eta.max() / eta.mean()).item())
    assert spread[1] < 0.6 * spread[0]


def test_q_moves_levels_towards_low_noise():
    sigmas = sigma_grid(30)
    low, high = (resample_sigmas(sigmas, torch.ones(29), 12, q=q) for q in (0.0, 0.5))
    assert (high[1:-2] < low[1:-2]).all()


def test_a_step_without_error_does_not_stop_the_resampling():
    eta = torch.ones(29)
    eta[[3, 4, 20]] = 0
    check_sigmas(resample_sigmas(sigma_grid(30), eta, 12))


def test_pchip_agrees_with_scipy():
    interpolate = pytest.importorskip("scipy.interpolate")
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 4, 30):
        x = torch.rand(size, dtype=torch.float64, generator=generator).cumsum(0)
        y = torch.randn(size, dtype=torch.float64, generator=generator).round(decimals=1)
        at = torch.linspace(x[0].item() - 0.5, x[-1].item() + 0.5, 300, dtype=torch.float64)
        expected = interpolate.PchipInterpolator(x.numpy(), y.numpy())(at.numpy())
        torch.testing.assert_close(pchip(x, y, at), torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["edm", "loglinear"])
def test_grids(kind):
    grid = sigma_grid(20, 0.01, 70.0, kind)
    check_sigmas(grid)
    assert len(grid) == 20
    assert grid[[0, -1]].tolist() == [70.0, 0.01]


def test_a_network_that_overflows_is_reported():
    grid = sigma_grid(5)
    x, to_zero = start(grid), torch.cat([grid, torch.zeros(1)])
    for algorithm in (adaptive_schedule(x, grid, Tolerance(1, 1)), eta_profile(x, to_zero)):
        with pytest.raises(ValueError, match="not finite"):
            run(algorithm, lambda x, sigma: x / 0)


BAD = {
    "Tolerance order": (lambda: Tolerance(0.2, 0.1), "eta_min <= eta_max"),
    "Tolerance zero": (lambda: Tolerance(0.0, 0.1), "0 < eta_min"),
    "Tolerance NaN": (lambda: Tolerance(0.1, math.nan), "eta_max"),
    "Tolerance p": (lambda: Tolerance(0.1, 0.2, -1.0), "`p`"),
    "search solver": (lambda: StepSearch(solver="ddim"), "euler, heun"),
    "search variant": (lambda: StepSearch(variant="fast"), "verified, published"),
    "search shrink": (lambda: StepSearch(shrink=1.0), "`shrink`"),
    "norm": (lambda: ErrorMeasure(norm="l1"), "l2, rms"),
    "grid kind": (lambda: sigma_grid(5, kind="karras"), "edm, loglinear"),
    "grid range": (lambda: sigma_grid(5, 1.0, 0.5), "sigma_min < sigma_max"),
    "grid size": (lambda: sigma_grid(1), "at least 2"),
    "schedule to zero": (lambda: run(adaptive_schedule(None, [1.0, 0.0], Tolerance(1, 1)), None), "above 0"),
    "profile solver": (lambda: run(eta_profile(None, [1.0, 0.0], solver="unipc"), None), "euler, heun"),
    "profile end": (lambda: run(eta_profile(None, [2.0, 1.0]), None), "end with 0"),
    "profile flow": (
        lambda: run(eta_profile(None, [1.0, 0.0], solver="dpmsolver++", flow=VE_TIME), None),
        "sigma time",
    ),
    "resample count": (lambda: resample_sigmas([2.0, 1.0, 0.0], [1.0], 4), "must be 2 finite errors"),
    "resample NaN": (lambda: resample_sigmas([2.0, 1.0, 0.0], [math.nan, 1.0], 4), "finite errors"),
    "resample nothing": (lambda: resample_sigmas([2.0, 1.0, 0.0], [0.0, 0.0], 4), "nothing to redistribute"),
    "resample steps": (lambda: resample_sigmas([2.0, 1.0, 0.0], [1.0, 0.0], 1), "at least 2"),
    "resample spacing": (lambda: resample_sigmas([2.0, 1.0], [1.0], 4, spacing="log"), "edm, loglinear"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
