"""Errors against an exact solution for numbers of network evaluations, and measured orders of convergence.

    python examples/benchmarks/exact_solution.py

The network of an unmodified Diffusers pipeline is exact: the noise prediction or velocity of a Gaussian mixture, in float64. The
reference is the probability-flow ODE, integrated to ten digits from the time where a scheduler begins to the time where it ends.
Errors are therefore those of the integration alone. A single Gaussian, which has a solution in closed form, checks the reference.
Diffusers' schedulers keep their tables in float32, which limits their accuracy to about 1e-6. DPM-Solver++, UniPC and DEIS also
round the times of the network to integers, except for uniform times of variance-preserving networks. The steps of Diffusers' DDIM
cover the whole time range only if their number divides 1000, hence 20, 40 and 100. The published third-order solver converges with
order 2.

The results are exact_solution.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT. The script
takes three minutes on a CPU core.
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LDMPipeline,
    ModelMixin,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from report import figure, markdown_table, write
from scipy.integrate import solve_ivp
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, SDMScheduler
from diffusers_gas.calibration import calibrate
from diffusers_gas.distillation.gauss_newton import Problem, best_initial_solver, distill_gauss_newton
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, TRAINING_SEED, SampleInputs
from diffusers_gas.pipelines.teacher import TeacherSamples


BUDGETS = (4, 6, 8, 20, 40, 100)
CALIBRATED_BUDGETS, DISTILLED_BUDGETS = (8, 20), (4, 6, 8)
NUM_JUDGED, NUM_TRAINING, NUM_HELD_OUT = 64, 128, 64
TOLERANCE = 1e-10


class MixtureNetwork(ModelMixin, ConfigMixin):
    """The exact network for a mixture of isotropic Gaussians.

    Args:
        sample_size, in_channels: Shape of the samples.
        num_components: Number of Gaussians.
        spread, std: Standard deviation of their means, and of each Gaussian.
        flow: Predict velocities of flow matching instead of the noise of Diffusers' default variance-preserving process.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 4,
        in_channels: int = 1,
        num_components: int = 5,
        spread: float = 0.5,
        std: float = 0.6,
        flow: bool = False,
    ):
        super().__init__()
        shape = (num_components, in_channels * sample_size**2)
        means = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.register_buffer("means", spread * means)
        config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if flow else {}
        self.noise_schedule = GASScheduler(**config).noise_schedule()

    def predictions(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Data and noise predictions at states `(batch, entries)`. Both are finite also at alpha = 0 and at sigma = 0."""
        variance = (alpha * self.config.std) ** 2 + sigma**2
        offsets = x[:, None] - alpha * self.means
        weights = (-offsets.square().sum(2) / (2 * variance)).softmax(1)[..., None]
        slope = (weights * offsets).sum(1) / variance
        return (weights * self.means).sum(1) + alpha * self.config.std**2 * slope, sigma * slope

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        t = self.noise_schedule.inverse_timestep(timestep.double())
        alpha, sigma = self.noise_schedule.alpha(t), self.noise_schedule.sigma(t)
        data, noise = self.predictions(sample.flatten(1).double(), alpha, sigma)
        output = noise - data if self.config.flow else noise
        return UNet2DOutput(output.view(sample.shape).to(sample.dtype))


def solution(network: MixtureNetwork, states: Tensor, start: float, end: float) -> Tensor:
    """The solution of the ODE as a function of the angle atan(sigma / alpha), for states with alpha^2 + sigma^2 = 1."""

    def velocity(angle: float, x: Any) -> Any:
        alpha, sigma = torch.tensor([angle, angle - math.pi / 2], dtype=torch.float64).cos()
        data, noise = network.predictions(torch.from_numpy(x).view(len(states), -1), alpha, sigma)
        return (alpha * noise - sigma * data).flatten().numpy()

    flat = states.double().flatten().numpy()
    result = solve_ivp(velocity, (start, end), flat, "DOP853", rtol=TOLERANCE, atol=TOLERANCE)
    if not result.success:
        raise RuntimeError(f"The integration of the reference failed: {result.message}")
    return torch.from_numpy(result.y[:, -1]).view(states.shape)


def reference_error() -> float:
    """Largest error of `solution` for a single Gaussian, which has a known solution."""
    network = MixtureNetwork(num_components=1)
    start, end = math.pi / 2, 0.0
    states = torch.randn(8, network.means.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = network.means[0] + network.config.std * states
    return (solution(network, states, start, end) - exact).abs().max().item()


class Case:
    """A pipeline with an exact network, and its exact samples."""

    def __init__(self, flow: bool):
        self.flow, self.network = flow, MixtureNetwork(flow=flow)
        if flow:
            self.pipe: DiffusionPipeline = DDPMPipeline(self.network, FlowMatchEulerDiscreteScheduler())
        else:  # DDPMPipeline does not scale the states for the network, but Heun's scheduler needs it.
            scheduler = DDPMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False)
            self.pipe = LDMPipeline(None, self.network, scheduler)
        self.judged = SampleInputs.create(EVALUATION_SEED, NUM_JUDGED)
        self._solutions: dict[tuple, Tensor] = {}

    def of(self, scheduler_class: type[SchedulerMixin], **settings: Any) -> SchedulerMixin:
        return scheduler_class.from_config(self.pipe.scheduler.config, **settings)

    def ends(self, scheduler: SchedulerMixin) -> tuple[float, float]:
        """Angles at which sampling begins and ends, after `set_timesteps`. A solver of this package begins at t = 1."""
        if isinstance(scheduler, DDIMScheduler):
            alphas = torch.stack([scheduler.alphas_cumprod[scheduler.timesteps[0]], scheduler.final_alpha_cumprod])
            return tuple(alphas.double().sqrt().acos().tolist())
        sigmas = scheduler.sigmas[[0, -1]].double()
        if isinstance(scheduler, GASScheduler):
            sigmas[0] = self.network.noise_schedule.diffusers_sigma(torch.tensor(1.0, dtype=torch.float64))
        return tuple(torch.atan2(sigmas, 1 - sigmas if self.flow else torch.ones(2, dtype=torch.float64)).tolist())

    def scale(self, scheduler: SchedulerMixin, angle: float) -> float:
        """The ratio of a scheduler's states to states with alpha^2 + sigma^2 = 1."""
        if self.flow:
            return 1 / (math.sin(angle) + math.cos(angle))
        return 1 / math.cos(angle) if isinstance(scheduler, HeunDiscreteScheduler) else 1.0

    def exact(self, scheduler: SchedulerMixin, noise: Tensor) -> Tensor:
        """The exact samples for the noise of a scheduler."""
        start, end = self.ends(scheduler)
        initial = getattr(scheduler, "init_noise_sigma", 1.0) / self.scale(scheduler, start)
        key = (*(round(float(value), 9) for value in (start, end, initial)), noise.sum().item())
        if key not in self._solutions:
            self._solutions[key] = solution(self.network, initial * noise, start, end)
        return self.scale(scheduler, end) * self._solutions[key]

    def error(self, scheduler: SchedulerMixin, num_inference_steps: int) -> dict[str, float]:
        """Root mean square error of samples, and the number of evaluations."""
        noise, final = sample_latents(
            self.pipe, scheduler, num_inference_steps, **self.judged.pipeline_arguments(self.pipe)
        )
        scheduler.set_timesteps(num_inference_steps)
        error = (final - self.exact(scheduler, noise)).square().mean().sqrt().item()
        return {"evaluations": len(scheduler.timesteps), "error": error}

    def samples(self, first_seed: int, num_samples: int) -> TeacherSamples:
        """The exact solutions as teacher samples."""
        inputs, scheduler = SampleInputs.create(first_seed, num_samples), self.of(GASScheduler)
        noise, _ = sample_latents(self.pipe, scheduler, 4, **inputs.pipeline_arguments(self.pipe))
        scheduler.set_timesteps(4)
        return TeacherSamples(inputs, noise, self.exact(scheduler, noise))

    def distilled(self) -> GASScheduler:
        scheduler = self.of(GASScheduler)
        training = self.samples(TRAINING_SEED, NUM_TRAINING)
        held_out = self.samples(TRAINING_SEED + NUM_TRAINING, NUM_HELD_OUT)
        for n in DISTILLED_BUDGETS:
            problem = Problem(self.pipe)
            start = best_initial_solver(problem, n, training)
            scheduler.add_solver(distill_gauss_newton(problem, start, training, held_out).solver)
        return scheduler


@dataclass(frozen=True)
class Method:
    """A scheduler, its theoretical order, and its number of steps for a number of evaluations."""

    scheduler: SchedulerMixin
    order: int | None
    budgets: tuple[int, ...] | None = None
    steps: Callable[[int], int] = lambda evaluations: evaluations


def theory(case: Case, **settings: Any) -> dict[str, Method]:
    orders = {1: 1, 2: 2, 3: 2}  # the order of convergence; for the published third-order solver it is 2
    return {
        f"GAS theory, order {order}": Method(case.of(GASScheduler, solver_order=order, **settings), converges)
        for order, converges in orders.items()
    }


def learned(case: Case) -> dict[str, Method]:
    calibrated = calibrate(case.pipe, CALIBRATED_BUDGETS)
    return {
        "SDM, Heun": Method(case.of(SDMScheduler), 2),
        "SDM, 2M": Method(case.of(SDMScheduler, solver="dpmsolver++"), 2),
        "SDM, calibrated": Method(calibrated, None, CALIBRATED_BUDGETS),
        "GS, distilled": Method(case.distilled(), None, DISTILLED_BUDGETS),
    }


def uniform_times(case: Case) -> dict[str, Method]:
    of, spacing = case.of, {"timestep_spacing": "trailing"}
    return {
        **theory(case),
        "DDIM": Method(of(DDIMScheduler, **spacing), 1),
        "DPM-Solver++ 2M": Method(of(DPMSolverMultistepScheduler, **spacing), 2),
        "DPM-Solver++ 3M": Method(of(DPMSolverMultistepScheduler, solver_order=3, **spacing), 2),
        "UniPC": Method(of(UniPCMultistepScheduler, **spacing), 2),
        "DEIS": Method(of(DEISMultistepScheduler, **spacing), 2),
        "Heun": Method(of(HeunDiscreteScheduler, **spacing), 2, steps=lambda n: (n + 1) // 2),
        **learned(case),
    }


def uniform_log_snr(case: Case) -> dict[str, Method]:
    of = functools.partial(case.of, timestep_spacing="trailing")
    return {
        **theory(case, use_lu_lambdas=True),
        "DPM-Solver++ 2M": Method(of(DPMSolverMultistepScheduler, use_lu_lambdas=True), 2),
        "DPM-Solver++ 3M": Method(of(DPMSolverMultistepScheduler, solver_order=3, use_lu_lambdas=True), 2),
        "UniPC": Method(of(UniPCMultistepScheduler, use_exponential_sigmas=True), 2),
        "DEIS": Method(of(DEISMultistepScheduler, use_exponential_sigmas=True), 2),
        "Heun": Method(of(HeunDiscreteScheduler, use_exponential_sigmas=True), 2, steps=lambda n: (n + 1) // 2),
    }


def flow_matching(case: Case) -> dict[str, Method]:
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return {
        **theory(case),
        "Euler": Method(case.pipe.scheduler, 1),
        "DPM-Solver++ 2M": Method(DPMSolverMultistepScheduler(**settings), 2),
        "DPM-Solver++ 3M": Method(DPMSolverMultistepScheduler(**settings, solver_order=3), 2),
        "UniPC": Method(UniPCMultistepScheduler(**settings), 2),
        "DEIS": Method(DEISMultistepScheduler(**settings), 2),
        **learned(case),
    }


CASES: dict[str, tuple[bool, Callable[[Case], dict[str, Method]]]] = {
    "variance preserving, uniform times": (False, uniform_times),
    "variance preserving, uniform in log SNR": (False, uniform_log_snr),
    "flow matching, uniform times": (True, flow_matching),
}


def slope(points: list[dict[str, float]]) -> float:
    """The measured order of convergence between the last two numbers of steps."""
    coarse, fine = points[-2:]
    return math.log(coarse["error"] / fine["error"]) / math.log(fine["evaluations"] / coarse["evaluations"])


def measure(name: str) -> list[dict]:
    flow, make = CASES[name]
    case = Case(flow)
    rows = []
    for label, method in tqdm(make(case).items(), desc=name):
        budgets = method.budgets or BUDGETS
        points = [{"budget": n, **case.error(method.scheduler, method.steps(n))} for n in budgets]
        measured = None if method.order is None else slope(points)
        rows.append({"method": label, "order": method.order, "slope": measured, "points": points})
    return rows


def table(results: dict[str, list[dict]]) -> str:
    sections = []
    for name, rows in results.items():
        cells = []
        for row in rows:
            errors = {point["budget"]: f"{point['error']:.1e}" for point in row["points"]}
            orders = ["-", "-"] if row["order"] is None else [str(row["order"]), f"{row['slope']:.1f}"]
            cells.append([row["method"], *(errors.get(n, "") for n in BUDGETS), *orders])
        header = [name, *map(str, BUDGETS), "order", f"measured from {BUDGETS[-2]} to {BUDGETS[-1]}"]
        sections.append(markdown_table(header, cells))
    return "\n\n".join(sections)


def draw(results: dict[str, list[dict]]) -> Any:
    picture, axes = figure(1, len(results), size=(4.4 * len(results) + 1.6, 4.4), sharey=True)
    methods = list(dict.fromkeys(row["method"] for rows in results.values() for row in rows))
    colors = dict(zip(methods, (*(f"C{i}" for i in range(10)), "black", "navy", "lime", "gold", "crimson")))
    lines = {}
    for axis, (name, rows) in zip(axes[0], results.items()):
        for row in rows:
            ours = row["method"].startswith(("GAS", "GS", "SDM"))
            style = {"marker": "o", "linestyle": "-"} if ours else {"marker": ".", "linestyle": "--", "linewidth": 1}
            evaluations, errors = ([point[key] for point in row["points"]] for key in ("evaluations", "error"))
            (line,) = axis.plot(evaluations, errors, color=colors[row["method"]], markersize=4, **style)
            lines[row["method"]] = line
        axis.set(xscale="log", yscale="log", xlabel="network evaluations", title=name)
        axis.set_xticks(BUDGETS, BUDGETS)
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("root mean square error of samples")
    axes[0, -1].legend(lines.values(), lines, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture


def main() -> None:
    error = reference_error()
    results = {name: measure(name) for name in CASES}
    note = f"Root mean square errors of {NUM_JUDGED} samples. The error of the reference is {error:.0e}."
    write(__file__, {"reference_error": error, "cases": results}, f"{note}\n\n{table(results)}", draw(results))


if __name__ == "__main__":
    logging.getLogger("diffusers_gas").setLevel(logging.ERROR)  # SDM warns about few evaluations
    main()
