"""Finds where a diffusion pipeline's trajectories bend, and plans few-evaluation sampling accordingly. Trains nothing.

    python training/calibrate_sdm.py
    python training/calibrate_sdm.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt

Without arguments it calibrates for the model in examples/teachers/digits. The plans end up in `{output_dir}/scheduler`, to
be loaded with `SDMScheduler.from_pretrained`.
"""

import argparse
from pathlib import Path

import torch

from ..calibration import calibrate
from ..comparison import count_parameters
from ..pipelines.inputs import TRAINING_SEED, SampleInputs
from ..schedulers.sdm_plan import SOLVERS
from .common import (
    add_hub_arguments,
    add_pipeline_arguments,
    common_arguments,
    load_pipeline,
    only_run,
    parse,
    pipeline_record,
    positive,
    push_to_hub,
    sample_arguments,
)
from .inspect_solver import describe, draw


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_pipeline_arguments(parser)
    add("--num_inference_steps", type=int, nargs="+", default=[8, 12, 18], help="numbers of network evaluations")
    add("--solver", choices=SOLVERS, help="kind of second-order steps; by default the better one")
    add("--num_samples", type=positive, default=32, help="samples to measure with")
    add("--batch_size", type=positive, default=32, help="samples per pipeline call")
    add("--output_dir", default="sdm_output")
    add("--seed", type=int, default=TRAINING_SEED, help="of the first sample")
    add_hub_arguments(add)
    return parse(parser, arguments)


def default_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with only_run(args.output_dir):
        calibrate_all(args)


def calibrate_all(args: argparse.Namespace) -> None:
    """The plans for all numbers of evaluations, and what they gain."""
    pipe, output_dir = load_pipeline(args, default_device()), Path(args.output_dir)
    pipe.set_progress_bar_config(disable=True)
    common = common_arguments(args)
    cycle = sample_arguments(args, pipe, common)
    print(
        f"Model:     {type(pipe).__name__} from {args.pretrained_model_name_or_path}, "
        f"{count_parameters(pipe) / 1e6:.2f} M weights\n"
        f"Samples:   {args.num_samples}\n"
        f"Plans:     {args.num_inference_steps} network evaluations\n"
        f"Output:    {output_dir / 'scheduler'}\n",
        flush=True,
    )
    calibration = calibrate(
        pipe,
        args.num_inference_steps,
        inputs=SampleInputs.create(args.seed, args.num_samples, cycle, **common),
        batch_size=args.batch_size,
        solvers=SOLVERS if args.solver is None else (args.solver,),
        on_plan=lambda scheduler: scheduler.save_pretrained(output_dir / "scheduler"),
        provenance=pipeline_record(args),
    )
    scheduler = calibration.scheduler
    draw(scheduler, args.num_inference_steps, output_dir / "calibration.png")
    results = (
        "Mean squared distance to a fine solution, beside Euler's and Heun's steps on Karras' noise levels:\n\n"
        f"{calibration.summary()}\n"
    )
    print(f"\n{describe(scheduler, args.num_inference_steps)}\n\n{results}")
    spent = calibration.num_evaluations / args.num_samples
    print(f"Spent:     {spent:.0f} evaluations for each of {args.num_samples} samples")
    print(f"Figure:    {output_dir / 'calibration.png'}\nScheduler: {output_dir / 'scheduler'}")
    if args.push_to_hub:
        print(f"Pushed to: {push_to_hub(args, scheduler, results, output_dir / 'calibration.png')}")
