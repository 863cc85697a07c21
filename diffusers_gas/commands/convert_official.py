"""Turns training checkpoints of the GS / GAS papers' code into a scheduler folder.

    python training/convert_official_checkpoint.py --checkpoint 4_steps.pt 5_steps.pt --output_dir my-scheduler
    python training/convert_official_checkpoint.py --checkpoint cifar10.pt --edm --t_end 1e-3 --output_dir my-scheduler

The checkpoints say nothing about the network that they were trained for, so its noise schedule is to be given: by default it
is Stable Diffusion's, otherwise the betas, a Diffusers scheduler's config file (of any class), or `--edm`. The averaged
weights are taken, as in the papers. The folder is to be loaded with `GASScheduler.from_pretrained`.
"""

import argparse
import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import EDMEulerScheduler
from torch import Tensor

from ..generalized_solver import GeneralizedSolver
from ..schedulers.scheduling_gas import GASScheduler
from .conversion import new_folder


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, nargs="+", help="files of different step counts for one network")
    add("--output_dir", required=True, help="the scheduler folder, which must not exist")
    add("--t_end", type=float, default=1e-3, help="time at which sampling ends, the papers' t_eps")
    add(
        "--parameterization",
        default="theory",
        choices=("theory", "linear_multistep"),
        help="what the coefficients are: corrections of theory, or all there is (the papers' use_theory_coef false)",
    )
    add("--beta_start", type=float, default=0.00085)
    add("--beta_end", type=float, default=0.012)
    add("--beta_schedule", default="scaled_linear")
    add("--prediction_type", default="epsilon", choices=("epsilon", "v_prediction"))
    schedule = parser.add_mutually_exclusive_group()
    schedule.add_argument("--scheduler_config", help="a scheduler_config.json, instead of betas and prediction type")
    schedule.add_argument(
        "--edm",
        action="store_true",
        help="a network with EDM preconditioning, sampled from sigma = 152 on as published",
    )
    return parser.parse_args(arguments)


def untrained_scheduler(args: argparse.Namespace) -> GASScheduler:
    """The scheduler of the network that the checkpoints were trained for."""
    if args.edm:
        return GASScheduler.from_config(EDMEulerScheduler().config, t_end=args.t_end)
    if args.scheduler_config is not None:
        try:
            config = json.loads(Path(args.scheduler_config).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{args.scheduler_config} is not a JSON file: {error}.") from error
        if not isinstance(config, dict):
            raise ValueError(f"{args.scheduler_config} must hold a scheduler's config, got {config!r}.")
        return GASScheduler.from_config(config, t_end=args.t_end)
    names = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "t_end")
    return GASScheduler(**{name: getattr(args, name) for name in names})


def averaged_weights(checkpoint: Any) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint by the names in the papers' code, which the file does not have."""
    try:
        weights = checkpoint["ema"]["shadow_params"]
    except (KeyError, TypeError, IndexError) as error:
        found = sorted(checkpoint) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"it has no averaged weights ('ema', 'shadow_params'), only {found}.") from error
    if not isinstance(weights, list) or len(weights) < 4 or len(weights) % 2:
        raise ValueError("its averaged weights are not a list of two tensors and two more for each order.")
    order = len(weights) // 2 - 1
    coefficients = [f"{kind}{i}_diff" for i in range(1, order + 1) for kind in "ca"]
    named = dict(zip(["mu_logit", "t_couple", *coefficients], weights))
    for name, weight in named.items():
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or not weight.isfinite().all():
            raise ValueError(f"'{name}' should be a tensor of finite numbers, got {weight!r}.")
    return named


def solver_from_weights(named: dict[str, Tensor], parameterization: str, t_end: float) -> GeneralizedSolver:
    """The solver that a checkpoint's weights are the parameters of."""
    n, order = named["t_couple"].numel(), len(named) // 2 - 1
    for name, weight in named.items():
        expected = (n - 1,) if name == "mu_logit" else (n,)
        if weight.shape != expected:
            raise ValueError(f"'{name}' should be of shape {expected} for {n} steps, got {tuple(weight.shape)}.")
    solver = GeneralizedSolver(
        n, order, theory_order=3, lower_order_final=False, t_end=t_end, parameterization=parameterization
    )

    def columns(kind: str) -> Tensor:
        return torch.stack([named[f"{kind}{i}_diff"] for i in range(1, order + 1)], dim=1)

    parameters = {
        "timestep_logits": named["mu_logit"],
        "timestep_offsets": named["t_couple"],
        "state_coefficients": columns("a"),
        "data_coefficients": columns("c"),
    }
    solver.load_state_dict(solver.state_dict() | parameters)
    return solver


def read_solver(path: str, parameterization: str, t_end: float) -> GeneralizedSolver:
    """The solver of a checkpoint file, which is read as tensors and plain data only."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # PyTorch's message goes on to recommend running the file.
        reason = re.search(r"WeightsUnpickler error: (.*)", str(error)) or re.match(r"(.*)", str(error))
        raise ValueError(f"{path} is not a file of tensors and plain data: {reason[1]}") from error
    try:
        solver = solver_from_weights(averaged_weights(checkpoint), parameterization, t_end)
    except ValueError as error:
        raise ValueError(f"{path} is not a checkpoint of the papers' training: {error}") from error
    step = checkpoint.get("step")
    solver.provenance = {"converted_from": Path(path).name, "training_step": step if isinstance(step, int) else None}
    return solver


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    scheduler = untrained_scheduler(args)
    for path in args.checkpoint:
        solver = read_solver(path, args.parameterization, args.t_end)
        if solver.num_inference_steps in scheduler.solvers:
            raise ValueError(f"{path} has {solver.num_inference_steps} steps, as another checkpoint has.")
        scheduler.add_solver(solver)
        step = solver.provenance["training_step"]
        print(f"Found:   {path}, {solver.num_inference_steps} steps, order {solver.order}, training step {step}")
        print(f"         times {' '.join(f'{t:.4g}' for t in solver.times().tolist())}")
    with new_folder(args.output_dir) as folder:
        scheduler.save_pretrained(folder)
    print(f"Written: {args.output_dir}, step counts {sorted(scheduler.solvers)}\n")
    print("from diffusers_gas import GASScheduler\n")
    print(f"pipe.scheduler = GASScheduler.from_pretrained({args.output_dir!r})")
    print(f"image = pipe(..., num_inference_steps={max(scheduler.solvers)}).images[0]")
