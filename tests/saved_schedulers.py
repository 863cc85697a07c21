"""Schedulers with made-up solvers and plans, for tests that need trained ones."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT
from diffusers import DDPMPipeline, UNet2DModel

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMScheduler
from diffusers_gas.pipelines.named_schedulers import EXAMPLE_MU


SAMPLER = ROOT / "examples" / "scheduling_solver_table.py"

STABLE_DIFFUSION: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}

# What networks predict.
PREDICTIONS = {
    "epsilon": STABLE_DIFFUSION,
    "v_prediction": STABLE_DIFFUSION | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "sample": {"prediction_type": "sample"},
    "flow": FLOW,
}

# One config of each kind.
CONFIGS = {
    "scaled-linear": STABLE_DIFFUSION,
    "sigmoid": {"beta_schedule": "sigmoid"},
    "zero-snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "snr-shifted": {"snr_shift_scale": 3.0},
    "flow": FLOW,
    "dynamic-shift": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True},
    "edm": {"sigma_data": 0.5},
}


def load_sampler() -> Any:
    """The class in the file that samples with exported solvers."""
    spec = importlib.util.spec_from_file_location("scheduling_solver_table", SAMPLER)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a scheduler finds its module by name
    spec.loader.exec_module(module)
    return module.SolverTableScheduler


def perturbed(
    solver: GeneralizedSolver, scale: float = 0.003, offset_scale: float | None = None, seed: int = 0
) -> GeneralizedSolver:
    """The solver with noise added to all of its parameters, as if it were learned.

    Args:
        solver: The solver, which is changed.
        scale: Standard deviation of the noise.
        offset_scale: That of the noise for the evaluation times' offsets, by default `scale`.
        seed: Seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in solver.named_parameters():
            own_scale = scale if offset_scale is None or name != "timestep_offsets" else offset_scale
            parameter += own_scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return solver


def trained_solver(num_inference_steps: int, seed: int = 0, **kwargs: Any) -> GeneralizedSolver:
    """A solver whose parameters all differ from their initial values."""
    return perturbed(GeneralizedSolver(num_inference_steps, **kwargs), seed=seed)


def trained_scheduler(*step_counts: int, seed: int = 0, **config: Any) -> GASScheduler:
    """A scheduler with a made-up solver for each number of steps."""
    scheduler = GASScheduler(**config)
    for num_inference_steps in step_counts:
        scheduler.add_solver(trained_solver(num_inference_steps, seed))
    return scheduler


def planned_scheduler(*step_counts: int, **config: Any) -> SDMScheduler:
    """A scheduler with a plan for each number of steps."""
    scheduler = SDMScheduler(**config)
    for num_inference_steps in step_counts:
        scheduler.add_plan(scheduler.plan_for(num_inference_steps))
    return scheduler


def learned(config: dict, *step_counts: int) -> GASScheduler:
    """A scheduler with solvers that are slightly off the theory's."""
    scheduler = GASScheduler(**config)
    for n in step_counts:
        solver = scheduler.theory_solver(n, EXAMPLE_MU)
        with torch.no_grad():
            for parameter in solver.parameters():
                parameter.add_(0.02)
        scheduler.add_solver(solver)
    return scheduler


def same_tensors(first: GeneralizedSolver, second: GeneralizedSolver) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def small_pipeline(scheduler: GASScheduler) -> DDPMPipeline:
    """A pipeline with a random network for 8x8 grey images."""
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = DDPMPipeline(unet=unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_pipeline(folder: Path, scheduler: GASScheduler) -> None:
    small_pipeline(scheduler).save_pretrained(folder)
