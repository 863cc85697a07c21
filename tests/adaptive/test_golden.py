"""Every reference case of SDM's public code, to the tolerances in the description of the data."""

from itertools import pairwise

import pytest
import torch
from gaussian_mixture import CASES, assert_near, cases, flow_of, grid_of, reference_model, sigmas_of, tensors

from diffusers_gas.adaptive import (
    Churn,
    CurvatureSwitch,
    ErrorMeasure,
    StepSearch,
    Tolerance,
    adaptive_dpmsolver,
    adaptive_heun,
    adaptive_schedule,
    adaptive_unipc,
    cosine_weights,
    eta_profile,
    euler,
    heun,
    linear_weights,
    resample_sigmas,
    run,
    second_derivative,
    sigma_grid,
    step_weights,
)
from diffusers_gas.adaptive.solvers import sample_norm


def order_rule(params, sigmas, data):
    num_steps = len(sigmas) - 1
    if params["metric"] == "uhat":
        return step_weights(num_steps, int((data["uhat"] < params["u_cut"]).nonzero()[0]))
    if params["lambda_schedule"] == "step":
        return CurvatureSwitch(params["tau_k"], params["use_relative_metrics"])
    return {"linear": linear_weights, "cosine": cosine_weights}[params["lambda_schedule"]](num_steps)


def assert_trajectory(name, result, flow, times, data):
    params, expected = CASES[name]["params"], CASES[name]["expected"]
    approximate_grid = params["discretization"] == "iddpm"  # of float32 values in the reference
    scales = flow.scale(times)
    states = torch.stack([scale * x for scale, x in zip(scales, result.states)])
    assert_near(states, data["states"], 1e-5 if approximate_grid else 1e-9)
    kappa_tolerance = 1e-4 if approximate_grid else 1e-5
    torch.testing.assert_close(result.relative_curvature, data["kappa_rel_per_sample"], rtol=kappa_tolerance, atol=0)
    torch.testing.assert_close(result.relative_curvature.mean(1), data["kappa_rel"], rtol=kappa_tolerance, atol=0)
    torch.testing.assert_close(result.absolute_curvature.mean(1), data["kappa_abs"], rtol=kappa_tolerance, atol=0)
    torch.testing.assert_close(result.weights, data["lam"], rtol=0, atol=1e-12)
    if params["metric"] != "uhat":
        assert result.switch_index == expected["switch_index"]
    torch.testing.assert_close(result.sample, result.states[-1])


@pytest.mark.parametrize("name", cases("adaptive_solver"))
def test_adaptive_solver(name):
    params, expected, data = CASES[name]["params"], CASES[name]["expected"], tensors(name)
    flow, sigmas, model = flow_of(params), sigmas_of(params, data), reference_model()
    assert_near(sigmas, data["sigmas"], 1e-5 if params["discretization"] == "iddpm" else 1e-12)
    times = flow.inverse_sigma(sigmas)
    assert_near(times, data["t_steps"], 1e-5 if params["discretization"] == "iddpm" else 1e-12)
    churn = None
    if "noise" in data:
        noise = iter(data["noise"])
        churn = Churn(
            params["S_churn"],
            params["S_min"],
            params["S_max"],
            params["S_noise"],
            draw_noise=lambda x: next(noise),
            noise_in_curvature=True,
        )
    rule = order_rule(params, sigmas, data)
    algorithm = adaptive_heun(
        data["latents"] * sigmas[0], sigmas, rule, alpha=params["alpha"], flow=flow, churn=churn, keep_states=True
    )
    result = run(algorithm, model)
    assert_trajectory(name, result, flow, times, data)
    assert result.num_evaluations == len(model.calls) == expected["model_calls"] == data["evals"].sum()


def guided_model(guidance):
    model, guide = reference_model(), reference_model("guide.means")
    return model, guide, lambda x, sigma: guide(x, sigma) + guidance * (model(x, sigma) - guide(x, sigma))


@pytest.mark.parametrize("name", cases("adaptive_dpmsolver"))
def test_adaptive_dpmsolver(name):
    params, expected, data = CASES[name]["params"], CASES[name]["expected"], tensors(name)
    sigmas, flow = sigmas_of(params, data), flow_of(params)
    model = reference_model()
    denoiser = guided_model(params["guidance"])[2] if params["guidance"] != 1 else model
    rule = order_rule(params, sigmas, data)
    algorithm = adaptive_dpmsolver(
        data["latents"] * sigmas[0], sigmas, rule, solver_type=params["solver_type"], keep_states=True
    )
    result = run(algorithm, denoiser)
    assert_trajectory(name, result, flow, sigmas, data)
    assert result.num_evaluations == expected["model_calls"]
    assert result.num_evaluations + int((result.weights != 1).sum()) == expected["nfe"]


@pytest.mark.parametrize("name", cases("baseline"))
def test_baseline(name):
    params, expected, data = CASES[name]["params"], CASES[name]["expected"], tensors(name)
    sigmas, model = sigmas_of(params, data), reference_model()
    x, second_order = data["latents"] * sigmas[0], step_weights(len(sigmas) - 1, 0)
    algorithms = {
        "euler": lambda: euler(x, sigmas),
        "heun": lambda: heun(x, sigmas),
        "dpmsolver": lambda: adaptive_dpmsolver(x, sigmas, second_order, solver_type=params["solver_type"]),
        "unipc": lambda: adaptive_unipc(x, sigmas, second_order),
    }
    result = run(algorithms[params["solver"]](), model)
    assert_near(result.sample, data["final"], 1e-9)
    inputs, call_sigmas = zip(*model.calls)
    assert_near(torch.stack(inputs), data["call_inputs"], 1e-9)
    assert_near(torch.stack(call_sigmas), data["call_sigmas"], 1e-12)
    assert len(model.calls) == result.num_evaluations == expected["model_calls"]


def search_of(params, variant):
    names = {"gamma_step": "gamma", "c_shrink": "shrink", "max_expand_bins": "max_expansions"}
    settings = {new: params[old] for old, new in names.items()}
    tolerance = Tolerance(params["eta_min"], params["eta_max"], params["eta_p"])
    search = StepSearch(
        solver=params.get("solver", "euler"),
        snap=params["use_grid_snap"],
        max_shrinks=params["max_shrink_iters"],
        variant=variant,
        **settings,
    )
    return tolerance, search


@pytest.mark.parametrize("name", cases("adaptive_schedule"))
def test_adaptive_schedule(name):
    params, expected, data = CASES[name]["params"], CASES[name]["expected"], tensors(name)
    flow, grid, model = flow_of(params), grid_of(params), reference_model()
    tolerance, search = search_of(params, "published")
    algorithm = adaptive_schedule(
        data["latents"] * grid[0], grid, tolerance, search, flow=flow, keep_states="path" in data
    )
    result = run(algorithm, model)
    assert_near(result.sigmas, data["optimized_sigmas"], 1e-4)
    assert_near(flow.scale(torch.tensor(flow.time(grid[-1]))) * result.sample, data["final"], 1e-4)
    steps = result.steps
    for key, values in {
        "t_hat": [step.t for step in steps],
        "t_next": [step.t_next for step in steps],
        "eta": [step.tolerance for step in steps],
        "best_S": [step.best.slope for step in steps],
        "best_eta": [step.best.eta for step in steps],
        "delta_t_next": [step.length for step in steps],
        "trial_t": [trial.t for step in steps for trial in step.trials],
        "trial_eta": [trial.eta for step in steps for trial in step.trials],
    }.items():
        assert_near(values, data[key], 1e-4)
    assert [step.num_expansions for step in steps] == data["expand_iters"].tolist()
    assert [step.num_shrinks for step in steps] == data["shrink_iters"].tolist()
    assert [i for i, step in enumerate(steps) for _ in step.trials] == data["trial_step"].tolist()
    evaluations = torch.tensor([len(step.trials) + 1 + (params["solver"] == "heun") for step in steps])
    assert evaluations.cumsum(0).tolist() == data["nfe"].tolist()
    assert result.num_evaluations == len(model.calls) == expected["model_calls"]
    assert sum(step.exceeds_tolerance for step in steps) == expected["tolerance_violations"]
    if "path" in data:
        scales = flow.scale(torch.cat([data["t_hat"], data["t_next"][-1:]]))
        assert_near(torch.stack([scale * x for scale, x in zip(scales, result.states)]), data["path"], 1e-4)


@pytest.mark.parametrize("name", cases("eta_log"))
def test_eta_profile(name):
    params, expected, data = CASES[name]["params"], CASES[name]["expected"], tensors(name)
    flow, sigmas, model = flow_of(params), sigmas_of(params, data), reference_model()
    result = run(eta_profile(data["latents"] * sigmas[0], sigmas, solver=params["solver"], flow=flow), model)
    torch.testing.assert_close(result.eta, data["eta"], rtol=1e-5, atol=0)
    torch.testing.assert_close(result.slope, data["S_hat"], rtol=1e-5, atol=0)
    torch.testing.assert_close(result.dt, data["dt"], rtol=1e-9, atol=0)
    assert result.eta.sum().item() == pytest.approx(expected["eta_sum"], rel=1e-5)
    # The reference evaluates the end of each step once more: Heun's to advance, Euler's to begin the next step.
    repeated = len(sigmas) - 2
    assert len(model.calls) == result.num_evaluations == expected["model_calls"] - repeated


@pytest.mark.parametrize("name", cases("resample"))
def test_resampling(name):
    params, data = CASES[name]["params"], tensors(name)
    out = resample_sigmas(
        data["sigma_path"],
        data["eta"],
        params["num_steps"],
        power=params["power"],
        q=params["q"],
        spacing=params["discretization"],
        append_zero=params["append_zero"],
    )
    torch.testing.assert_close(out, data["out"], rtol=1e-9, atol=0)
    assert len(out) == CASES[name]["expected"]["length"]


@pytest.mark.parametrize("name", cases("curvature"))
def test_curvature(name):
    params, data = CASES[name]["params"], tensors(name)
    flow, sigmas, model = flow_of(params), sigmas_of(params, data), reference_model()
    rule = CurvatureSwitch(params["tau_k"], lagged=params["curvature_mode"] == "proxy")
    algorithm = adaptive_heun(data["latents"] * sigmas[0], sigmas, rule, flow=flow, keep_states=True)
    result = run(algorithm, model)
    torch.testing.assert_close(result.relative_curvature.mean(1), data["log_kappa"], rtol=1e-5, atol=0)
    torch.testing.assert_close(result.weights, data["log_lambda"], rtol=0, atol=1e-12)

    times = flow.inverse_sigma(sigmas).tolist()
    states = list(zip(result.states, times[:-1]))
    points = [flow.point(x, t, model(x, flow.sigma(torch.tensor(t, dtype=torch.float64)))) for x, t in states]
    scales = [flow.scale(torch.tensor(t, dtype=torch.float64)).item() for t in times[:-1]]
    drifts = [point.drift for point in points]
    logged = {
        "drift": (drifts, 1e-9),
        "denoised": ([point.denoised for point in points], 1e-9),
        "ddotx_exact": ([second_derivative(model, flow, x, t) for x, t in states], 1e-6),
        "ddotx_closed": ([second_derivative(model, flow, x, t, published=True) for x, t in states], 1e-4),
    }
    for key, (values, tolerance) in logged.items():
        for value, expected in zip(values, data[key]):
            assert_near(value, expected, tolerance)
    assert_near(torch.stack([scale * x for scale, x in zip([*scales, 1.0], result.states)]), data["states"], 1e-9)

    def finite_difference(drift, earlier_drift, t, earlier_t):
        return (drift - earlier_drift) / (t - earlier_t)

    estimates = [torch.zeros_like(drifts[0])]
    for i in range(1, len(drifts)):
        estimates.append(finite_difference(drifts[i], drifts[i - 1], times[i], times[i - 1]))
    if params["curvature_mode"] == "heun_fd":
        for i in range(len(drifts) - 1):
            end = flow.move(result.states[i], drifts[i], times[i], times[i + 1])
            sigma = torch.tensor(flow.noise_level(times[i + 1]), dtype=torch.float64)
            end_drift = flow.drift(end, times[i + 1], model(end, sigma))
            estimates[i] = finite_difference(end_drift, drifts[i], times[i + 1], times[i])
    # The reference divides by |dt| and so has the opposite sign.
    assert_near(-torch.stack(estimates), data["ddotx_fd"], 1e-8)

    closed = logged["ddotx_closed"][0]
    x_minus_denoised = [scale * point.x - point.denoised for scale, point in zip(scales, points)]
    norms = {
        "log_Dtheta_norm": logged["denoised"][0],
        "log_ddotx_closed_norm": closed,
        "log_ddotx_fd_norm": estimates,
        "log_ddotx_recon_err_norm": [a + b for a, b in zip(closed, estimates)],
        "log_x_minus_D_norm": x_minus_denoised,
    }
    for key, values in norms.items():
        means = torch.stack([sample_norm(value).mean() for value in values])
        torch.testing.assert_close(means, data[key], rtol=1e-4, atol=1e-12)
    assert_near([t - t_next for t, t_next in pairwise(times)], data["log_h"], 1e-9)
    assert_near([point.sigma for point in points], data["log_sigma_hat"], 1e-9)


def nearest(train_sigmas, sigmas):
    """The training noise level nearest in log sigma to each of `sigmas`."""
    return train_sigmas[(train_sigmas.log() - sigmas.log()[..., None]).abs().argmin(-1)]


def latent_denoiser(train_sigmas, guidance):
    """Data prediction, through the noise prediction, of a network that is evaluated at training noise levels only."""
    model, guide, _ = guided_model(guidance)

    def denoiser(x, sigma):
        train_sigma = nearest(train_sigmas, sigma)
        # The input of the network is the scaled state. The network undoes the scaling of the training noise level.
        y = x * ((1 + train_sigma**2) / (1 + sigma**2)).sqrt()
        noise = (y - model(y, train_sigma)) / train_sigma
        if guidance != 1:
            unguided = (y - guide(y, train_sigma)) / train_sigma
            noise = unguided + guidance * (noise - unguided)
        return x - sigma * noise

    return denoiser


LATENT_MEASURE = ErrorMeasure(norm="rms", vp_scaled_drift=True)


def latent_grid(params, train_sigmas):
    high, low = train_sigmas.max().item(), train_sigmas.min().item()
    if params["use_karras_sigmas"]:
        return sigma_grid(params["num_steps"], low, high)
    # "Leading" spacing as in Diffusers' DPMSolverMultistepScheduler.
    spacing = params["num_train_timesteps"] // (params["num_steps"] + 1)
    return train_sigmas[torch.arange(params["num_steps"], 0, -1) * spacing + params["steps_offset"]]


@pytest.mark.parametrize("name", cases("t2i_schedule"))
def test_text_to_image_schedule(name):
    params, expected, data = CASES[name]["params"], CASES[name]["expected"], tensors(name)
    train_sigmas = data["train_sigmas"]
    grid = latent_grid(params, train_sigmas)
    denoiser = latent_denoiser(train_sigmas, params["guidance_scale"])
    tolerance, search = search_of(params, "published_latent")
    start = data["latents"] * (1 + grid[0] ** 2).sqrt()
    result = run(adaptive_schedule(start, grid, tolerance, search, measure=LATENT_MEASURE), denoiser)
    steps = result.steps
    torch.testing.assert_close(result.sigmas, data["optimized_sigmas"], rtol=1e-3, atol=0)
    assert_near([step.best.slope for step in steps], data["best_S"], 1e-3)
    assert_near([step.best.length for step in steps], data["best_delta_sigma"], 1e-3)
    assert_near([step.tolerance for step in steps], data["eta"], 1e-3)
    assert_near(result.sample / (1 + grid[-1] ** 2).sqrt(), data["final"], 1e-3)
    assert [step.num_expansions for step in steps] == data["expand_iters"].tolist()
    assert [step.num_shrinks for step in steps] == data["shrink_iters"].tolist()
    assert len(steps) + 1 == expected["num_intervals"]
    # The reference evaluates the start of a step again with each trial, and then both ends of the chosen step.
    calls = [(step.sigma, end) for step in steps for end in (*(trial.t for trial in step.trials), step.sigma_next)]
    calls = torch.tensor(calls, dtype=torch.float64).flatten()
    torch.testing.assert_close(nearest(train_sigmas, calls), data["call_sigmas"])
    assert len(calls) == expected["model_calls"]
    assert result.num_evaluations < expected["model_calls"]


@pytest.mark.parametrize("name", cases("t2i_eta"))
def test_text_to_image_eta(name):
    params, expected, data = CASES[name]["params"], CASES[name]["expected"], tensors(name)
    train_sigmas = tensors("case92")["train_sigmas"]
    sigmas = data["input_sigmas"]
    start = data["latents"] * (1 + sigmas[0] ** 2).sqrt()
    algorithm = eta_profile(start, sigmas, solver="dpmsolver++", measure=LATENT_MEASURE)
    result = run(algorithm, latent_denoiser(train_sigmas, params["guidance_scale"]))
    assert_near(result.eta, data["eta"], 1e-3)
    assert_near(result.slope, data["S_hat"], 1e-3)
    assert_near(result.dt, data["dsigma"], 1e-3)
    # The reference makes every evaluation twice except the first and the last.
    assert result.num_evaluations == (expected["model_calls"] + 1) // 2
    torch.testing.assert_close(nearest(train_sigmas, sigmas[:-1]), data["call_sigmas"].unique().flip(0))


def test_every_case_is_covered():
    assert len(CASES) == 100
