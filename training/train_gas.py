"""Distils few-step solvers from a diffusion pipeline, and shows what they gain.

    accelerate launch training/train_gas.py
    accelerate launch training/train_gas.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt

Without arguments it distils a 4-step solver from the teacher in examples/teachers/digits. The solvers end up in
`{output_dir}/scheduler`, to be loaded with `GASScheduler.from_pretrained`.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from common import add_pipeline_arguments, common_arguments, load_pipeline, parse, positive
from diffusers import DiffusionPipeline, SchedulerMixin

import diffusers_gas
from diffusers_gas import GASScheduler, GeneralizedSolver, SDMScheduler
from diffusers_gas.distillation.comparison import (
    Row,
    compare,
    comparison_picture,
    count_parameters,
    distance_to_teacher,
    markdown_table,
    sample_images,
    training_free_schedulers,
)
from diffusers_gas.distillation.gauss_newton import best_initial_solver, distill_gauss_newton
from diffusers_gas.distillation.inputs import load_sample_inputs
from diffusers_gas.distillation.losses import Loss
from diffusers_gas.distillation.teacher import EVALUATION_SEED, TRAINING_SEED, SampleInputs, TeacherCache
from diffusers_gas.oracle import scheduler_config
from diffusers_gas.schedulers.scheduling_utils import translate_config


NUM_PICTURED = 10
NUM_START_SAMPLES = 128


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add_pipeline_arguments(parser)
    add("--teacher_scheduler", help="a Diffusers class; DPM-Solver++ 2M, or the pipeline's own for flow matching")
    add("--teacher_num_inference_steps", type=positive, default=50)
    add("--num_teacher_samples", type=positive, default=1024)
    add("--num_validation_samples", type=positive, default=512)
    add("--num_inference_steps", type=positive, nargs="+", default=[4], help="step counts of the solvers to distil")
    add("--loss", default="l2", choices=("l2", "l1", "huber"))
    add("--max_train_iterations", type=int, default=60, help="0 keeps the solver that training would start from")
    add("--max_train_seconds", type=float, help="for each step count")
    add("--train_batch_size", type=positive, default=128, help="samples per pipeline call and process")
    add("--output_dir", default="gas_output")
    add("--seed", type=int, default=TRAINING_SEED, help="of the first training sample")
    add("--initialize_from", help="an SDM scheduler folder (calibrate_sdm.py): start new solvers from its time steps")
    return parse(parser, arguments)


def teacher_scheduler(args: argparse.Namespace, pipe: DiffusionPipeline) -> SchedulerMixin:
    config = scheduler_config(pipe)
    if args.teacher_scheduler is not None:
        scheduler_class = getattr(diffusers, args.teacher_scheduler, None)
        if scheduler_class is None:
            raise ValueError(f"`--teacher_scheduler {args.teacher_scheduler}` is not a Diffusers scheduler class.")
        return scheduler_class.from_config(config)
    if translate_config(config).get("use_flow_sigmas"):
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=False)
    return diffusers.DPMSolverMultistepScheduler.from_config(
        config, timestep_spacing="trailing", algorithm_type="dpmsolver++", solver_order=2
    )


class Run:
    """One run of the script: where its files lie and what it works with."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.accelerator = args, Accelerator()
        self.output_dir = Path(args.output_dir)
        if self.accelerator.device.type == "cpu":
            # Accelerate's launcher leaves a process one thread, which is meant for processes that drive a GPU.
            local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            torch.set_num_threads(max(torch.get_num_threads(), (os.cpu_count() or 1) // local_processes))
        set_seed(args.seed)
        self.pipe = load_pipeline(args, self.accelerator.device)
        self.teacher = teacher_scheduler(args, self.pipe)
        common = common_arguments(args)
        cycle = load_sample_inputs(self.pipe, args.prompts_file, common)
        self.training = SampleInputs.create(args.seed, args.num_teacher_samples, cycle, **common)
        self.validation = SampleInputs.create(EVALUATION_SEED, args.num_validation_samples, cycle, **common)
        self.scheduler = self._open_scheduler()
        self.fits: dict[int, dict[str, float]] = {}

    @property
    def scheduler_dir(self) -> Path:
        return self.output_dir / "scheduler"

    @property
    def provenance(self) -> dict[str, Any]:
        args = self.args
        return {
            "teacher": path.name if (path := Path(args.pretrained_model_name_or_path)).is_dir() else str(path),
            "revision": args.revision,
            "torch_dtype": args.torch_dtype,
            "prompts_file": args.prompts_file and Path(args.prompts_file).name,
            "teacher_scheduler": type(self.teacher).__name__,
            "teacher_num_inference_steps": args.teacher_num_inference_steps,
            "pipeline_arguments": dict(self.training.common),
        }

    def _open_scheduler(self) -> GASScheduler:
        """The scheduler in the output folder, whose other step counts stay, or a new one."""
        if not (self.scheduler_dir / GASScheduler.config_name).exists():
            return GASScheduler.from_config(scheduler_config(self.pipe))
        scheduler = GASScheduler.from_pretrained(self.scheduler_dir)
        for n, solver in scheduler.solvers.items():
            found = {name: solver.provenance.get(name) for name in self.provenance}
            if found != self.provenance:
                raise ValueError(
                    f"{self.scheduler_dir} holds a {n}-step solver made with {found}, not {self.provenance}. Choose "
                    "another --output_dir or remove that one."
                )
        return scheduler

    def announce(self) -> None:
        args = self.args
        self.print(
            f"Teacher:   {type(self.pipe).__name__} from {args.pretrained_model_name_or_path}, "
            f"{count_parameters(self.pipe) / 1e6:.2f} M weights, {type(self.teacher).__name__} with "
            f"{args.teacher_num_inference_steps} steps\n"
            f"Samples:   {len(self.training)} to learn from, {len(self.validation)} held out\n"
            f"Solvers:   {args.num_inference_steps} steps, Gauss-Newton on the {args.loss} distance\n"
            f"Output:    {self.scheduler_dir}, cached teacher samples beside it\n"
        )

    def print(self, text: str) -> None:
        self.accelerator.print(text, flush=True)

    def collect(self) -> None:
        """Teacher samples, an equally large share for every process."""
        args = self.args
        name = f"{args.pretrained_model_name_or_path} {args.revision} {args.variant} {args.torch_dtype}"
        cache = TeacherCache(self.output_dir / "teacher_samples", name, self.teacher, args.teacher_num_inference_steps)
        self.training_samples, self.validation_samples = (
            cache.collect(self.pipe, self._share(inputs), args.train_batch_size, label)
            for inputs, label in ((self.training, "Teacher"), (self.validation, "Held out"))
        )

    def _share(self, inputs: SampleInputs) -> SampleInputs:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if len(inputs) < world:
            raise ValueError(f"{len(inputs)} samples cannot be shared by {world} processes: ask for more of them.")
        return inputs[rank::world][: len(inputs) // world]

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.accelerator.device), "sum").to(tensor.device)

    def distil(self, num_inference_steps: int) -> bool:
        """Distils and saves one solver; `False` if it was interrupted."""
        loss, batch_size = Loss(self.args.loss), self.args.train_batch_size
        common = {"loss": loss, "batch_size": batch_size, "reduce": self.reduce}
        start = self.scheduler.solvers.get(num_inference_steps) or self._new_start(num_inference_steps, common)
        result = distill_gauss_newton(
            self.pipe,
            start,
            self.training_samples,
            self.validation_samples,
            max_iterations=self.args.max_train_iterations,
            max_seconds=self.args.max_train_seconds,
            on_improvement=self.save,
            **common,
        )
        self.save(result.solver)
        self.fits[num_inference_steps] = {
            name: getattr(result, name) for name in ("initial_distance", "distance", "evaluations", "seconds")
        }
        self.print(
            f"{num_inference_steps} steps: held-out distance {result.initial_distance:.5f} -> {result.distance:.5f} "
            f"with {result.evaluations} network evaluations in {result.seconds:.0f} s"
        )
        return not result.interrupted

    def _new_start(self, num_inference_steps: int, common: dict[str, Any]) -> GeneralizedSolver:
        if self.args.initialize_from is not None:
            return SDMScheduler.from_pretrained(self.args.initialize_from).initial_solver(num_inference_steps)
        fewer = self.scheduler.solvers.get(num_inference_steps - 1)
        warm = [] if fewer is None else [fewer.with_one_more_step()]
        samples = self.training_samples[:NUM_START_SAMPLES]
        return best_initial_solver(self.pipe, num_inference_steps, samples, further_candidates=warm, **common)

    def save(self, solver: GeneralizedSolver) -> None:
        solver.provenance = {
            **self.provenance,
            "loss": self.args.loss,
            "num_teacher_samples": len(self.training),
            "versions": {module.__name__: module.__version__ for module in (torch, diffusers, diffusers_gas)},
        }
        self.scheduler.add_solver(solver)
        if self.accelerator.is_main_process:
            self.scheduler.save_pretrained(self.scheduler_dir)

    def report(self) -> None:
        """Table and picture against every few-step scheduler of Diffusers, from the folder as a user would load it."""
        args, pipe, samples = self.args, self.pipe, self.validation_samples
        ours = GASScheduler.from_pretrained(self.scheduler_dir)
        steps, batch_size = list(self.fits), args.train_batch_size
        rivals = training_free_schedulers(scheduler_config(pipe))
        others = compare(pipe, rivals, steps, samples, batch_size)
        rows = [Row(n, "GS (ours)", distance_to_teacher(pipe, ours, n, samples, batch_size)) for n in steps]
        table = markdown_table(rows, others)
        self.print(f"\nMean squared distance to the teacher on {len(samples)} held-out samples:\n\n{table}\n")
        (self.output_dir / "comparison.md").write_text(table + "\n")
        results = {
            "arguments": vars(args),
            "fits": self.fits,
            "ours": list(map(asdict, rows)),
            "others": list(map(asdict, others)),
        }
        (self.output_dir / "comparison.json").write_text(json.dumps(results, indent=2) + "\n")

        n, inputs = steps[0], samples.inputs[:NUM_PICTURED]
        best = next(row.scheduler for row in others if row.num_inference_steps == n)
        pictured = {
            f"teacher, {args.teacher_num_inference_steps} steps": (self.teacher, args.teacher_num_inference_steps),
            f"{best}, {n} steps": (rivals[best], n),
            f"GS (ours), {n} steps": (ours, n),
        }
        images = {label: sample_images(pipe, *sampler, inputs) for label, sampler in pictured.items()}
        comparison_picture(images, self.output_dir / "comparison.png")
        self.print(f"Picture:   {self.output_dir / 'comparison.png'}\nScheduler: {self.scheduler_dir}")


def main(arguments: list[str] | None = None) -> None:
    run = Run(parse_args(arguments))
    run.announce()
    run.collect()
    for num_inference_steps in run.args.num_inference_steps:
        if not run.distil(num_inference_steps):
            break
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        run.report()
    run.accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"train_gas.py: {error}")
