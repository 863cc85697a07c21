"""Schedulers with made-up solvers, for tests of what is done with a trained one."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, UNet2DModel

from diffusers_gas import GASScheduler, GeneralizedSolver
from diffusers_gas.schedulers.time_grids import SOME_SHIFT


# One config of every kind.
CONFIGS = {
    "scaled-linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "zero-snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "snr-shifted": {"snr_shift_scale": 3.0},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    "dynamic-shift": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True},
    "edm": {"sigma_data": 0.5},
}


def trained_solver(num_inference_steps: int, seed: int = 0, **kwargs: Any) -> GeneralizedSolver:
    """A solver with all of its parameters off their initial values."""
    solver = GeneralizedSolver(num_inference_steps, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += 0.003 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return solver


def trained_scheduler(*step_counts: int, seed: int = 0, **config: Any) -> GASScheduler:
    scheduler = GASScheduler(**config)
    for num_inference_steps in step_counts:
        scheduler.add_solver(trained_solver(num_inference_steps, seed))
    return scheduler


def learned(config: dict, *step_counts: int) -> GASScheduler:
    scheduler = GASScheduler(**config)
    for n in step_counts:
        solver = scheduler.theory_solver(n, SOME_SHIFT)
        with torch.no_grad():
            for parameter in solver.parameters():
                parameter.add_(0.02)
        scheduler.add_solver(solver)
    return scheduler


def same_tensors(first: GeneralizedSolver, second: GeneralizedSolver) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def save_pipeline(folder: Path, scheduler: GASScheduler) -> None:
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
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)
