"""Turns files of the papers' code, and published lists of times, into folders for Diffusers.

    diffusers-gas convert edm --checkpoint edm-cifar10-32x32-uncond-vp.pkl --output_dir edm-cifar10
    diffusers-gas convert gas --checkpoint 4_steps.pt 5_steps.pt --output_dir my-scheduler
    diffusers-gas convert gas --checkpoint cifar10.pt --edm --t_end 1e-3 --output_dir my-scheduler
    diffusers-gas convert dyweight --checkpoint dyweight_nfe3.pt --scheduler_config FLUX/scheduler_config.json --output_dir my-scheduler
    diffusers-gas convert times --timesteps 999 850 736 645 545 455 343 233 124 24 --output_dir my-scheduler
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

from ..generalized_solver import GeneralizedSolver
from ..noise_schedules import FlowMatchSchedule
from ..papers import dyweight, gas, r3gan
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
DYWEIGHT = """Turns the tables of DyWeight (arXiv 2603.11607) for FLUX into a scheduler folder. The samples are those of the tables at
the shift for which they were trained. Tables for EDM and Stable Diffusion networks cannot be converted."""
TIMES = """Turns published times (Align Your Steps, GITS, OSS, ...) into a scheduler folder: DPM-Solver++ on these times. Distill from
there with `diffusers-gas train --initialize_from`."""
R3GAN = """Turns the discriminator of an R3GAN snapshot (arXiv 2501.05441) into a folder for adversarial distillation. The logit of a
class-conditional one becomes the mean over all classes. Load it with `R3GANDiscriminator.from_pretrained`."""


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    converters = {"edm": convert_edm, "gas": convert_gas, "dyweight": convert_dyweight, "times": convert_times}
    (converters | {"r3gan": convert_r3gan})[args.format](args)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    formats = parser.add_subparsers(dest="format", required=True)

    edm = formats.add_parser("edm", help="a network of EDM -> a pipeline", description=EDM)
    edm.add_argument("--checkpoint", required=True, help="a snapshot (.pkl) of the authors' training")

    gas = formats.add_parser("gas", help="solvers of GS / GAS -> a scheduler", description=GAS)
    several = "files (.pt) of one network, of different step counts"
    gas.add_argument("--checkpoint", required=True, nargs="+", help=several)
    gas.add_argument(
        "--parameterization",
        default="theory",
        choices=("theory", "linear_multistep"),
        help="whether the coefficients are corrections of theory, or are used as they are (use_theory_coef false)",
    )
    add_network(gas)

    tables = formats.add_parser("dyweight", help="tables of DyWeight -> a scheduler", description=DYWEIGHT)
    tables.add_argument("--checkpoint", required=True, nargs="+", help=several)
    tables.add_argument(
        "--scheduler_config", required=True, help="the scheduler_config.json of the network's pipeline"
    )
    tables.add_argument("--t_end", type=float, default=1e-3, help="time at which the solvers end by their name")
    mu = "the shift, where it depends on the resolution; 0.63 is that of FLUX at 512 x 512"
    tables.add_argument("--mu", type=float, default=0.63, help=mu)

    times = formats.add_parser("times", help="published times -> a scheduler", description=TIMES)
    given = times.add_mutually_exclusive_group(required=True)
    given.add_argument("--timesteps", type=float, nargs="+", help="network times, one a step")
    levels = "noise levels, with the final one: sigma / alpha, or for flow matching sigma after the shift"
    given.add_argument("--sigmas", type=float, nargs="+", help=levels)
    times.add_argument("--mu", type=float, help="the shift of the list, where it depends on the resolution")
    add_network(times)

    r3gan = formats.add_parser("r3gan", help="a discriminator of R3GAN", description=R3GAN)
    r3gan.add_argument("--checkpoint", required=True, help="a snapshot (.pkl) of the authors' training")

    for added in formats.choices.values():
        added.add_argument("--output_dir", required=True, help="the new folder, which must not have content")
    return parser.parse_args(arguments)


def add_network(parser: argparse.ArgumentParser) -> None:
    """The arguments of [`untrained_scheduler`]."""
    add = parser.add_argument
    add("--t_end", type=float, default=1e-3, help="time at which sampling ends, t_eps in GS / GAS")
    add("--beta_start", type=float, default=0.00085)
    add("--beta_end", type=float, default=0.012)
    add("--beta_schedule", default="scaled_linear")
    add("--prediction_type", default="epsilon", choices=("epsilon", "v_prediction"))
    schedule = parser.add_mutually_exclusive_group()
    schedule.add_argument("--scheduler_config", help="a scheduler_config.json, instead of betas and prediction type")
    schedule.add_argument(
        "--edm", action="store_true", help="for a network with EDM's preconditioning, sampled from sigma = 152 on"
    )


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
    print("from diffusers_gas import EDMPipeline\n")
    labels = "" if config.num_class_embeds is None else ", class_labels=0"
    print(f"pipe = EDMPipeline.from_pretrained({args.output_dir!r})")
    print(f"image = pipe(num_inference_steps=18{labels}).images[0]")


def convert_gas(args: argparse.Namespace) -> None:
    scheduler = untrained_scheduler(args)
    for path in args.checkpoint:
        checkpoint = load_pickle(path)
        with errors_name(path, "a checkpoint of the GS / GAS paper's training"):
            solver = gas.convert_checkpoint(checkpoint, args.parameterization, args.t_end)
        add_converted(
            scheduler, solver, path, f"order {solver.order}, training step {solver.provenance['training_step']}"
        )
    save_scheduler(scheduler, args)


def convert_dyweight(args: argparse.Namespace) -> None:
    scheduler = scheduler_of_config(args)
    noise_schedule = scheduler.noise_schedule(args.mu)
    if not isinstance(noise_schedule, FlowMatchSchedule) or noise_schedule.inverted:
        raise ValueError(f"{args.scheduler_config} is not of a flow-matching network, as DyWeight's tables are.")
    for path in args.checkpoint:
        checkpoint = load_pickle(path)
        with errors_name(path, "a file of DyWeight's tables for FLUX"):
            solver = dyweight.convert_checkpoint(checkpoint, noise_schedule, args.t_end)
        add_converted(scheduler, solver, path, f"shift {noise_schedule.shift:.4g}")
    save_scheduler(scheduler, args)


def convert_times(args: argparse.Namespace) -> None:
    scheduler = untrained_scheduler(args)
    solver = scheduler.solver_on(timesteps=args.timesteps, sigmas=args.sigmas, mu=args.mu)
    if solver.t_end > 0:  # a list ends at its last level
        scheduler.register_to_config(t_end=solver.t_end)
    add_converted(
        scheduler, solver, "the list of timesteps" if args.sigmas is None else "the list of sigmas", "DPM-Solver++ 2M"
    )
    save_scheduler(scheduler, args)


def add_converted(scheduler: GASScheduler, solver: GeneralizedSolver, source: str, what: str) -> None:
    """Puts a solver into a scheduler, and prints what it is."""
    if solver.num_inference_steps in scheduler.solvers:
        raise ValueError(f"{source} has {solver.num_inference_steps} steps, as another checkpoint has.")
    solver.provenance["converted_from"] = Path(source).name
    scheduler.add_solver(solver)
    print(f"Found:   {source}, {solver.num_inference_steps} steps, {what}")
    print(f"         times {' '.join(f'{t:.4g}' for t in solver.times().tolist())}")


def save_scheduler(scheduler: GASScheduler, args: argparse.Namespace) -> None:
    """Saves a scheduler, and prints how it is used."""
    with new_folder(args.output_dir) as folder:
        scheduler.save_pretrained(folder)
    print(f"Written: {args.output_dir}, step counts {sorted(scheduler.solvers)}\n")
    print("from diffusers_gas import GASScheduler\n")
    print(f"pipe.scheduler = GASScheduler.from_pretrained({args.output_dir!r})")
    print(f"image = pipe(..., num_inference_steps={max(scheduler.solvers)}).images[0]")


def convert_r3gan(args: argparse.Namespace) -> None:
    snapshot = load_pickle(args.checkpoint)
    with errors_name(args.checkpoint, "an R3GAN snapshot"):
        network = r3gan.convert_snapshot(snapshot)
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
    """A scheduler of the network that solvers or times are for."""
    if args.edm:
        return GASScheduler.from_config(EDMEulerScheduler().config, t_end=args.t_end)
    if args.scheduler_config is not None:
        return scheduler_of_config(args)
    names = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "t_end")
    return GASScheduler(**{name: getattr(args, name) for name in names})


def scheduler_of_config(args: argparse.Namespace) -> GASScheduler:
    """A scheduler from the file `--scheduler_config`."""
    try:
        config = json.loads(Path(args.scheduler_config).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{args.scheduler_config} is not a JSON file: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{args.scheduler_config} must hold a scheduler's config, got {config!r}.")
    return GASScheduler.from_config(config, t_end=args.t_end)


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
