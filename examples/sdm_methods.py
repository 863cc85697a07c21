"""The methods of SDM (arXiv 2602.12624) one by one: curvature, noise levels, and solvers of first and second order.

    python examples/sdm_methods.py

`diffusers_gas.calibrate` combines some of these methods by itself. This script runs each of them on a pipeline, for
research: the curvature along trajectories, noise levels by Karras and by bounded Wasserstein error, and solvers that mix
first-order and second-order steps. Distances are mean squared distances of final samples to a fine solution.

The model is the one of this repository that draws pixels without prompts, as those of the paper do: nothing but its network is
in the trajectory, and the exact curvature differentiates that.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_gas import SampleInputs, SDMScheduler, adaptive
from diffusers_gas.calibration import run_on_pipeline


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument(
    "--model", default=Path(__file__).resolve().parent / "teachers" / "digits", help="of a DDPMPipeline"
)
parser.add_argument("--num_steps", type=int, default=12)
parser.add_argument("--num_samples", type=int, default=16)
parser.add_argument("--output", type=Path, default=Path("example_output/sdm_methods.png"))
args = parser.parse_args()

pipe = DDPMPipeline.from_pretrained(args.model)
pipe.set_progress_bar_config(disable=True)
torch.manual_seed(0)  # for churn
samples, N = SampleInputs.create(0, args.num_samples), args.num_steps
scheduler = SDMScheduler.from_config(pipe.scheduler.config, solver="heun")  # the published noise levels
noise_schedule = scheduler.noise_schedule()
low, high = scheduler.sigma_range(noise_schedule)


def on_pipeline(sigmas: torch.Tensor, method: Callable) -> Any:
    """The result of a method whose data predictions are the pipeline's."""
    return run_on_pipeline(pipe, sigmas, method, **samples.pipeline_arguments(pipe))


def karras(num_steps: int) -> torch.Tensor:
    return torch.cat([adaptive.sigma_grid(num_steps, low, high), torch.zeros(1)])


fine = on_pipeline(karras(100), adaptive.heun)

# Curvature. The free proxy compares the drifts of neighbouring steps. The exact curvature is the length of the second
# derivative relative to that of the drift. It differentiates the pipeline's network.


def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The data prediction of a network that predicts the noise, at x = x0 + sigma * noise."""
    t = noise_schedule.inverse_lambda(-sigma.log())
    return x - sigma.float() * pipe.unet(noise_schedule.alpha(t).float() * x, noise_schedule.timestep(t)).sample


trajectory = on_pipeline(karras(24), lambda x, sigmas: adaptive.heun(x, sigmas, keep_states=True))
proxy, exact = trajectory.relative_curvature.mean(1)[1:], []
with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
    for x, sigma in zip(trajectory.states[1:-1], karras(24)[1:-1].tolist()):
        drift = adaptive.SIGMA_TIME.drift(x, sigma, denoiser(x, torch.tensor(sigma)))
        exact_derivative = adaptive.second_derivative(denoiser, adaptive.SIGMA_TIME, x, sigma)
        lengths = [v.flatten(1).norm(dim=1) for v in (exact_derivative, drift)]
        exact.append((lengths[0] / lengths[1]).mean())

print("Relative curvature, in 1 / sigma\n\n   sigma     free    exact")
for sigma, free, true in list(zip(karras(24)[1:], proxy, exact))[::4]:
    print(f"{sigma:8.3g} {free:8.3g} {true:8.3g}")

# Noise levels. The adaptive schedule has as many steps as its tolerance requires. Resampling distributes its noise levels over
# N steps.
rms, tolerance = adaptive.ErrorMeasure("rms"), adaptive.Tolerance(0.01, 0.1)


def bounded_error(variant: str) -> torch.Tensor:
    search = adaptive.StepSearch(variant=variant)
    found = on_pipeline(karras(32)[:-1], lambda x, s: adaptive.adaptive_schedule(x, s, tolerance, search, measure=rms))
    eta = on_pipeline(found.sigmas, lambda x, s: adaptive.eta_profile(x, s, measure=rms)).eta
    ratios = [error / tolerance(sigma, high) for error, sigma in zip(eta[:-1].tolist(), found.sigmas.tolist())]
    print(f"Adaptive schedule, {variant} search: {len(found.steps)} steps, errors up to {max(ratios):.2f} tolerances")
    return adaptive.resample_sigmas(found.sigmas, eta, N)


print()
schedules = {
    "Karras": karras(N),
    "bounded error, verified search": bounded_error("verified"),
    "bounded error, published search": bounded_error("published"),
    "uniform in log sigma": torch.cat([adaptive.sigma_grid(N, low, high, "loglinear"), torch.zeros(1)]),
}

# Solvers. A rule says which steps are of second order: a switch on the measured curvature, a switch at a step, or weights.
switch, second = adaptive.CurvatureSwitch(tau=0.002), adaptive.step_weights(N, 0)
vp_time = adaptive.ProbabilityFlow.from_noise_schedule(noise_schedule)
churn = adaptive.Churn(s_churn=1.0, s_max=20.0)
solvers = {
    "Euler": adaptive.euler,
    "Heun": adaptive.heun,
    "Heun, VE time": lambda x, s: adaptive.heun(x, s, flow=adaptive.VE_TIME),
    "Heun, the pipeline's time": lambda x, s: adaptive.heun(x, s, flow=vp_time),
    "midpoint": lambda x, s: adaptive.adaptive_heun(x, s, second, alpha=0.5),
    "adaptive, curvature switch": lambda x, s: adaptive.adaptive_heun(x, s, switch),
    "adaptive, linear": lambda x, s: adaptive.adaptive_heun(x, s, adaptive.linear_weights(N)),
    "adaptive, cosine": lambda x, s: adaptive.adaptive_heun(x, s, adaptive.cosine_weights(N)),
    "adaptive, churn": lambda x, s: adaptive.adaptive_heun(x, s, switch, churn=churn),  # arrives at other samples
    "DPM-Solver++ 2M": lambda x, s: adaptive.adaptive_dpmsolver(x, s, second),
    "DPM-Solver++ 2M, adaptive": lambda x, s: adaptive.adaptive_dpmsolver(x, s, switch),
    "UniPC": lambda x, s: adaptive.adaptive_unipc(x, s, second),
    "UniPC, adaptive": lambda x, s: adaptive.adaptive_unipc(x, s, switch),
}

rows = [(f"Heun: {name}", sigmas, adaptive.heun) for name, sigmas in schedules.items()]
rows += [(f"{name}: Karras", karras(N), solver) for name, solver in solvers.items() if name != "Heun"]
print(f"\n{'solver and noise levels':<40} evaluations  distance")
points = {}
for name, sigmas, solver in rows:
    result = on_pipeline(sigmas, solver)
    points[name] = result.num_evaluations, (result.sample - fine.sample).square().mean().item()
    print(f"{name:<40} {points[name][0]:>11}  {points[name][1]:.2e}")

figure = Figure(figsize=(15, 4.5), layout="constrained")
curvature, levels, quality = figure.subplots(1, 3)
curvature.plot(karras(24)[1:-1], proxy, ".-", label="free proxy")
curvature.plot(karras(24)[1:-1], exact, ".-", label="exact")
curvature.set(xscale="log", yscale="log", xlabel="sigma", ylabel="relative curvature, 1 / sigma")
for name, sigmas in schedules.items():
    levels.plot(sigmas[:-1], ".-", label=name)
levels.set(yscale="log", xlabel="step", ylabel="sigma")
for name, point in points.items():
    quality.plot(*point, "o" if name.startswith("Heun: ") else "x", label=name)
quality.set(yscale="log", xlabel="network evaluations", ylabel="distance to a fine solution")
for axis in (curvature, levels):
    axis.legend(fontsize=7)
quality.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
args.output.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(args.output, dpi=120)
print(f"\nPicture: {args.output}")
