"""Distils few-step solvers from a diffusion pipeline, and shows what they gain.

    accelerate launch training/train_gas.py
    accelerate launch training/train_gas.py --pretrained_model_name_or_path some/model --prompts_file prompts.txt
    accelerate launch training/train_gas.py --loss gas --num_inference_steps 4

Without arguments it distils a 4-step solver from the teacher in examples/teachers/digits. The solvers end up in
`{output_dir}/scheduler`, to be loaded with `GASScheduler.from_pretrained`. What the arguments mean, and which to choose, is
in training/README.md.
"""

import argparse

from diffusers.optimization import SchedulerType

from ..distillation.gradient_descent import Recipe
from ..pipelines.inputs import TRAINING_SEED
from .adam import train
from .common import (
    add_hub_arguments,
    add_pipeline_arguments,
    add_teacher_arguments,
    only_run,
    parse,
    positive,
)
from .gauss_newton import distil
from .run import Run


# The one that is left out needs rules that there is no argument for.
LEARNING_RATE_SCHEDULES = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]

# Published: 1400 for GS, 5000 for GAS, whose discriminator overfits sooner. Gauss-Newton goes on with any number.
NUM_TEACHER_SAMPLES = {"gauss_newton": 1024, "adam": 1400, "gas": 5000}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_pipeline_arguments(parser)
    add = parser.add_argument
    add("--output_dir", default="gas_output")
    add("--num_inference_steps", type=positive, nargs="+", default=[4], help="step counts of the solvers to distil")
    add("--optimizer", choices=("gauss_newton", "adam"), help="gauss_newton; adam for --loss gas")
    add(
        "--loss",
        choices=("l2", "l1", "huber", "gas"),
        help="l2 for Gauss-Newton, l1 for Adam; gas adds a discriminator",
    )
    add(
        "--features",
        default="states",
        choices=("states", "pixels", "lpips", "pyramid"),
        help="of which to take the loss",
    )
    add("--lpips_weights", nargs="+", help="files of VGG's weights and LPIPS's; from the Hub by default")
    add("--lpips_size", type=positive, default=224, help="pixels that images are resized to")
    add("--max_train_iterations", type=int, default=60, help="of Gauss-Newton; 0 keeps the solver it would start from")
    add("--max_train_seconds", type=float, help="of Gauss-Newton, for each step count")
    add("--train_batch_size", type=positive, help="samples per pipeline call and process; 128, for Adam 24")
    add("--initialize_from", help="a scheduler folder or Hub id of GS (solvers) or SDM (time steps) to start from")
    add("--seed", type=int, default=TRAINING_SEED, help="of the first training sample")
    add("--allow_tf32", action="store_true")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="of the networks; solvers stay in float64")
    add("--report_to", choices=("tensorboard", "wandb", "all"), help="trackers; their files go to {output_dir}/logs")
    add_hub_arguments(add)
    _add_teacher_arguments(parser)
    _add_adam_arguments(parser)
    _add_adversarial_arguments(parser)
    return _with_defaults(parse(parser, arguments))


def _add_teacher_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("teacher").add_argument
    add_teacher_arguments(add)
    add("--num_teacher_samples", type=positive, help="1024; 1400 for Adam, 5000 for gas")
    add("--num_validation_samples", type=positive, default=512)
    add(
        "--num_compared_samples", type=positive, default=128, help="of these, for the table with Diffusers' schedulers"
    )


def _add_adam_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("adam (defaults: the published recipe)").add_argument
    recipe = Recipe()
    add("--max_train_steps", type=positive, default=recipe.max_train_steps)
    add("--gradient_accumulation_steps", type=positive, default=recipe.gradient_accumulation_steps)
    add("--learning_rate", type=float, default=recipe.learning_rate)
    add("--lr_scheduler", default=recipe.lr_scheduler, choices=LEARNING_RATE_SCHEDULES)
    add("--lr_warmup_steps", type=int, default=recipe.lr_warmup_steps)
    add("--max_grad_norm", type=float, default=recipe.max_grad_norm)
    add("--ema_decay", type=float, default=recipe.ema_decay)
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--checkpointing_steps", type=positive, default=500)
    add("--checkpoints_total_limit", type=positive)
    add("--resume_from_checkpoint", help='"latest", or a file')
    add("--validation_steps", type=positive, default=500)
    add("--validation_prompts", nargs="+", help="of the pictures; the first held-out samples by default")
    add(
        "--initialization",
        choices=("gauss_newton", "theory", "published"),
        help="published (uniform times, third order); a Gauss-Newton fit for --loss gas",
    )


def _add_adversarial_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("--loss gas").add_argument
    add(
        "--gas_distance",
        choices=("l2", "l1", "huber"),
        help="the distillation loss beside the adversarial",
    )
    add("--adversarial_weight", type=float, default=1.0, help="published: 1, on CIFAR-10 0.1")
    add("--discriminator_model_name_or_path", help="a folder or Hub id, e.g. of convert_r3gan_checkpoint.py")
    add("--discriminator_width", type=positive, default=128, help="channels of a new one")
    add("--discriminator_learning_rate", type=float, help="published: 1e-5, for a pretrained one; 1e-4 for a new one")
    add("--r1_weight", type=float, default=0.1)
    add("--r2_weight", type=float, default=0.1)
    add(
        "--reuse_fakes",
        action="store_true",
        help="the discriminator learns from the solver's own samples: a rollout less",
    )


def _with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on other arguments."""
    if args.optimizer is None:
        args.optimizer = "adam" if args.loss == "gas" else "gauss_newton"
    gauss_newton = args.optimizer == "gauss_newton"
    if gauss_newton and args.loss == "gas":
        raise ValueError("`--loss gas` is not a least-squares problem: it needs `--optimizer adam`.")
    if args.loss is None:
        args.loss = "l2" if gauss_newton or args.features == "lpips" else "l1"
    if args.gas_distance is None:
        args.gas_distance = "l2" if args.features == "lpips" else "l1"
    distance = args.gas_distance if args.loss == "gas" else args.loss
    if args.features == "lpips" and distance != "l2":
        raise ValueError(f"LPIPS is a squared distance of features: it needs 'l2', not '{distance}'.")
    if args.discriminator_learning_rate is None:
        args.discriminator_learning_rate = 1e-4 if args.discriminator_model_name_or_path is None else 1e-5
    if args.num_teacher_samples is None:
        args.num_teacher_samples = NUM_TEACHER_SAMPLES["gas" if args.loss == "gas" else args.optimizer]
    if args.train_batch_size is None:
        args.train_batch_size = 128 if gauss_newton else Recipe().train_batch_size
    if args.initialization is None:
        args.initialization = "gauss_newton" if args.loss == "gas" else "published"
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with only_run(args.output_dir):
        train_all(args)


def train_all(args: argparse.Namespace) -> None:
    """The solvers of all step counts, and what they gain."""
    run = Run(args)
    run.announce()
    run.start_trackers()
    run.collect()
    for n in args.num_inference_steps:
        if args.optimizer == "adam":
            done = train(run, n)
        else:
            done = distil(run, run.folder, run.loss, n, keep_improvements=True)
        if not done:
            break
    run.accelerator.wait_for_everyone()
    if run.reports:
        run.report()
        if args.push_to_hub and run.accelerator.is_main_process:
            run.push_to_hub()
    run.accelerator.end_training()
