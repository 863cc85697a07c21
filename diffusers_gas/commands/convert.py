"""Turns files of the papers' code into folders for Diffusers.

    diffusers-gas convert edm --checkpoint edm-cifar10-32x32-uncond-vp.pkl --output_dir edm-cifar10
    diffusers-gas convert gas --checkpoint 4_steps.pt 5_steps.pt --output_dir my-scheduler
    diffusers-gas convert gas --checkpoint cifar10.pt --edm --t_end 1e-3 --output_dir my-scheduler
    diffusers-gas convert r3gan --checkpoint network-snapshot-final.pkl --output_dir r3gan-discriminator

Only tensors and plain data are read from the files: nothing in them runs.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from ..papers import gas, r3gan
from ..papers.edm import published
from ..papers.edm.pipeline import EDMPipeline
from ..papers.pickles import load_pickle
from ..schedulers.scheduling_gas import GASScheduler
from ..utils.files import partial_path, remove_leftovers


EDM = """Turns a network snapshot of EDM (arXiv 2206.00364) into a Diffusers pipeline. The network may be DDPM++, NCSN++ or
ADM, class-conditional or not, with EDM's preconditioning or that of the VP, VE and iDDPM baselines. Load the folder with
`DiffusionPipeline.from_pretrained` after `import diffusers_gas`."""
GAS = """Turns training checkpoints of the GS / GAS paper's code (arXiv 2510.17699) into a scheduler folder, from their averaged
weights. The checkpoints do not say which noise schedule they were trained for. It is that of Stable Diffusion unless you give
betas, a Diffusers scheduler's config file (of any class), or --edm. Load the folder with `GASScheduler.from_pretrained`."""
R3GAN = """Turns the discriminator of an R3GAN snapshot (arXiv 2501.05441) into a folder for adversarial distillation. Load it
with `R3GANDiscriminator.from_pretrained`."""


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    {"edm": convert_edm, "gas": convert_gas, "r3gan": convert_r3gan}[args.format](args)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    formats = parser.add_subparsers(dest="format", required=True)

    edm = formats.add_parser("edm", help="a network of EDM -> a pipeline", description=EDM)
    edm.add_argument("--checkpoint", required=True, help="a snapshot (.pkl) of the authors' training")

    gas = formats.add_parser("gas", help="solvers of GS / GAS -> a scheduler", description=GAS)
    several = "files (.pt) of one network, of different step counts"
    gas.add_argument("--checkpoint", required=True, nargs="+", help=several)
    gas.add_argument("--t_end", type=float, default=1e-3, help="time at which sampling ends, the paper's t_eps")
    gas.add_argument(
        "--parameterization",
        default="theory",
        choices=("theory", "linear_multistep"),
        help="whether the coefficients are corrections of theory, or are used as they are (use_theory_coef false)",
    )
    gas.add_argument("--beta_start", type=float, default=0.00085)
    gas.add_argument("--beta_end", type=float, default=0.012)
    gas.add_argument("--beta_schedule", default="scaled_linear")
    gas.add_argument("--prediction_type", default="epsilon", choices=("epsilon", "v_prediction"))
    schedule = gas.add_mutually_exclusive_group()
    schedule.add_argument("--scheduler_config", help="a scheduler_config.json, instead of betas and prediction type")
    schedule.add_argument(
        "--edm", action="store_true", help="for a network with EDM's preconditioning, sampled from sigma = 152 on"
    )

    r3gan = formats.add_parser("r3gan", help="a discriminator of R3GAN", description=R3GAN)
    r3gan.add_argument("--checkpoint", required=True, help="a snapshot (.pkl) of the authors' training")
    r3gan.add_argument(
        "--class_label", type=int, help="a class of a class-conditional network; by default the mean over all classes"
    )

    for added in formats.choices.values():
        added.add_argument("--output_dir", required=True, help="the new folder, which must not have content")
    return parser.parse_args(arguments)


def convert_edm(args: argparse.Namespace) -> None:
    snapshot = load_pickle(args.checkpoint)
    with errors_name(args.checkpoint, "a snapshot of EDM"):
        network = published.convert_snapshot(snapshot)
    unet, config = network.unet, network.unet.config
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=network.sigma_min, sigma_max=network.sigma_max, sigma_data=config.sigma_data
    )
    classes = "unconditional" if config.num_class_embeds is None else f"{config.num_class_embeds} classes"
    print(
        f"Found:   {network.wrapper} with {network.model} ({config.architecture}), {unet.num_parameters() / 1e6:.2f} M "
        f"weights, {config.in_channels} x {config.sample_size} x {config.sample_size}, {classes}"
    )
    with new_folder(args.output_dir) as folder:
        EDMPipeline(unet, scheduler).save_pretrained(folder)
    print(f"Written: {args.output_dir}, sigma from {network.sigma_min:g} to {network.sigma_max:g}\n")
    print("import diffusers_gas\nfrom diffusers import DiffusionPipeline\n")
    labels = "" if config.num_class_embeds is None else ", class_labels=0"
    print(f"pipe = DiffusionPipeline.from_pretrained({args.output_dir!r})")
    print(f"image = pipe(num_inference_steps=18{labels}).images[0]")


def convert_gas(args: argparse.Namespace) -> None:
    scheduler = untrained_scheduler(args)
    for path in args.checkpoint:
        checkpoint = load_pickle(path)
        with errors_name(path, "a checkpoint of the GS / GAS paper's training"):
            solver = gas.convert_checkpoint(checkpoint, args.parameterization, args.t_end)
        if solver.num_inference_steps in scheduler.solvers:
            raise ValueError(f"{path} has {solver.num_inference_steps} steps, as another checkpoint has.")
        solver.provenance["converted_from"] = Path(path).name
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


def convert_r3gan(args: argparse.Namespace) -> None:
    snapshot = load_pickle(args.checkpoint)
    with errors_name(args.checkpoint, "an R3GAN snapshot"):
        network = r3gan.convert_snapshot(snapshot, args.class_label)
    config, height = network.config, network.config.sample_size[0]
    print(
        f"Found:   {snapshot['D'].class_name}, {network.num_parameters() / 1e6:.2f} M weights, "
        f"{config.in_channels} x {height} x {height}\n"
        f"         widths {list(config.widths)}, groups {list(config.cardinalities)}, blocks "
        f"{list(config.blocks_per_stage)}"
    )
    with new_folder(args.output_dir) as folder:
        network.save_pretrained(folder)
    print(f"Written: {args.output_dir}\n")
    print("from diffusers_gas.distillation.discriminator import R3GANDiscriminator\n")
    print(f"discriminator = R3GANDiscriminator.from_pretrained({args.output_dir!r})")


def untrained_scheduler(args: argparse.Namespace) -> GASScheduler:
    """A scheduler of the network that the checkpoints of GS / GAS were trained for."""
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


@contextmanager
def errors_name(path: str, kind: str) -> Iterator[None]:
    """Adds to a `ValueError` which file is not of the kind that it should be."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} is not {kind}: {error}") from error


@contextmanager
def new_folder(path: str) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `path` at the end.

    Raises:
        ValueError: If `path` already has content.
    """
    target = Path(path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`--output_dir {path}` exists already: choose another, or remove it.")
    remove_leftovers(target.parent, target.name)
    partial = partial_path(target)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
