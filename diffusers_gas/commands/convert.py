"""Turns files of the papers' code, and published lists of times, into folders for Diffusers.

    diffusers-gas convert edm --checkpoint edm-cifar10-32x32-uncond-vp.pkl --output_dir edm-cifar10
    diffusers-gas convert gas --checkpoint 4_steps.pt 5_steps.pt --output_dir my-scheduler
    diffusers-gas convert gas --checkpoint cifar10.pt --scheduler_config edm-cifar10/scheduler --output_dir my-scheduler
    diffusers-gas convert dyweight --checkpoint dyweight_nfe3.pt --scheduler_config FLUX.1-dev/scheduler --output_dir my-scheduler
    diffusers-gas convert times --timesteps 999 850 736 645 545 455 343 233 124 24 --output_dir my-scheduler
    diffusers-gas convert r3gan --checkpoint network-snapshot-final.pkl --output_dir r3gan-discriminator

Only tensors and plain data are read from the files: nothing in them runs.
"""

import argparse
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from diffusers import EDMDPMSolverMultistepScheduler

from ..generalized_solver import GeneralizedSolver
from ..noise_schedules import FlowMatchSchedule
from ..papers import dyweight, gas, r3gan
from ..papers.edm import published
from ..papers.edm.pipeline import EDMPipeline
from ..papers.pickles import load_pickle
from ..schedulers.scheduling_gas import GASScheduler
from ..utils.files import remove_leftovers, replacing
from .arguments import add_settings


T = TypeVar("T")

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(kw_only=True)
class Conversion:
    """Where it goes to.

    Args:
        output_dir: The new folder, which must not have content.
    """

    output_dir: str

    def convert(self) -> None:
        raise NotImplementedError

    def write(self, converted: Any, what: str = "", module: str = "diffusers_gas") -> None:
        """Saves a scheduler, network or pipeline in the new folder, and prints how it is loaded.

        Raises:
            ValueError: If the folder has content.
        """
        target = Path(self.output_dir).absolute()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"`--output_dir {self.output_dir}` exists already: choose another, or remove it.")
        remove_leftovers(target.parent)
        with replacing(target) as folder:
            converted.save_pretrained(folder)
        name = type(converted).__name__
        print(f"Written: {self.output_dir}{what}\n\nfrom {module} import {name}\n")
        print(f"{name}.from_pretrained({self.output_dir!r})")


@dataclass(kw_only=True)
class EDMConversion(Conversion):
    """A network snapshot of EDM (arXiv 2206.00364) -> a Diffusers pipeline.

    The network may be DDPM++, NCSN++ or ADM, class-conditional or not. It must have EDM's preconditioning.

    Args:
        checkpoint: A snapshot (.pkl) of the authors' training.
    """

    checkpoint: str

    def convert(self) -> None:
        unet = read(self.checkpoint, "a snapshot of EDM", published.convert_snapshot)
        config = unet.config
        classes = "unconditional" if config.num_class_embeds is None else f"{config.num_class_embeds} classes"
        print(
            f"Found:   {config.architecture}, {unet.num_parameters() / 1e6:.2f} M weights, "
            f"{config.in_channels} x {config.sample_size} x {config.sample_size}, {classes}"
        )
        self.write(EDMPipeline(unet, EDMDPMSolverMultistepScheduler(sigma_data=config.sigma_data)))


@dataclass(kw_only=True)
class R3GANConversion(Conversion):
    """The discriminator of an R3GAN snapshot (arXiv 2501.05441) -> one for adversarial distillation.

    Args:
        checkpoint: A snapshot (.pkl) of the authors' training.
    """

    checkpoint: str

    def convert(self) -> None:
        network = read(self.checkpoint, "an R3GAN snapshot", r3gan.convert_snapshot)
        shape = " x ".join(map(str, (network.config.in_channels, *network.config.sample_size)))
        print(f"Found:   a discriminator of {network.num_parameters() / 1e6:.2f} M weights for {shape}")
        self.write(network, module=type(network).__module__)


@dataclass(kw_only=True)
class SolverConversion(Conversion):
    """The solvers.

    Args:
        t_end: Time at which sampling ends, t_eps in GS / GAS.
        scheduler_config: The scheduler of the network's pipeline, of any class: a folder or its scheduler_config.json; by default
            that of Stable Diffusion.
    """

    t_end: float = 1e-3
    scheduler_config: str | None = None

    def solvers(self, scheduler: GASScheduler) -> Iterator[tuple[str, GeneralizedSolver, str]]:
        """Where each solver comes from, the solver, and what it is."""
        raise NotImplementedError

    def convert(self) -> None:
        path = self.scheduler_config
        config = STABLE_DIFFUSION if path is None else GASScheduler.load_config(path)
        scheduler = GASScheduler.from_config(config, t_end=self.t_end)
        for source, solver, what in self.solvers(scheduler):
            if solver.num_inference_steps in scheduler.solvers:
                raise ValueError(f"{source} has {solver.num_inference_steps} steps, as another checkpoint has.")
            solver.provenance["converted_from"] = Path(source).name
            scheduler.add_solver(solver)
            print(f"Found:   {source}, {solver.num_inference_steps} steps, {what}")
            print(f"         times {' '.join(f'{t:.4g}' for t in solver.times().tolist())}")
        self.write(scheduler, f", step counts {sorted(scheduler.solvers)}")


@dataclass(kw_only=True)
class DyWeightConversion(SolverConversion):
    """Tables of DyWeight (arXiv 2603.11607) for FLUX -> a scheduler.

    The samples are those of the tables at the shift for which they were trained. Tables for EDM and Stable Diffusion networks cannot
    be converted.

    Args:
        checkpoint: Files (.pt) of one network, of different step counts.
        mu: The shift, where it depends on the resolution; 0.63 is that of FLUX at 512 x 512.
    """

    checkpoint: Sequence[str]
    scheduler_config: str
    mu: float = 0.63

    def solvers(self, scheduler: GASScheduler) -> Iterator[tuple[str, GeneralizedSolver, str]]:
        schedule = scheduler.noise_schedule(self.mu)
        if not isinstance(schedule, FlowMatchSchedule) or schedule.inverted:
            raise ValueError(f"{self.scheduler_config} is not of a flow-matching network, as DyWeight's tables are.")
        for path in self.checkpoint:
            kind = "a file of DyWeight's tables for FLUX"
            solver = read(path, kind, dyweight.convert_checkpoint, schedule, self.t_end)
            yield path, solver, f"shift {schedule.shift:.4g}"


@dataclass(kw_only=True)
class GASConversion(SolverConversion):
    """Training checkpoints of the GS / GAS paper's code (arXiv 2510.17699) -> a scheduler, from their averaged weights.

    The checkpoints do not say which noise schedule they were trained for. It is that of Stable Diffusion unless you give
    --scheduler_config.

    Args:
        checkpoint: Files (.pt) of one network, of different step counts.
        parameterization: Whether the coefficients are corrections of theory, or are used as they are (use_theory_coef false).
    """

    checkpoint: Sequence[str]
    parameterization: Literal["theory", "linear_multistep"] = "theory"

    def solvers(self, scheduler: GASScheduler) -> Iterator[tuple[str, GeneralizedSolver, str]]:
        for path in self.checkpoint:
            kind = "a checkpoint of the GS / GAS paper's training"
            solver = read(path, kind, gas.convert_checkpoint, self.parameterization, self.t_end)
            yield path, solver, f"order {solver.order}, training step {solver.provenance['training_step']}"


@dataclass(kw_only=True)
class TimesConversion(SolverConversion):
    """Published times (Align Your Steps, GITS, OSS, ...) -> a scheduler: DPM-Solver++ on these times.

    Distill from there with `diffusers-gas train --initialize_from`.

    Args:
        timesteps: Network times, one a step.
        sigmas: Instead, noise levels, with the final one: sigma / alpha, or for flow matching sigma after the shift.
        mu: The shift of the list, where it depends on the resolution.
    """

    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    mu: float | None = None

    def solvers(self, scheduler: GASScheduler) -> Iterator[tuple[str, GeneralizedSolver, str]]:
        solver = scheduler.solver_on(timesteps=self.timesteps, sigmas=self.sigmas, mu=self.mu)
        if solver.t_end > 0:  # a list ends at its last level
            scheduler.register_to_config(t_end=solver.t_end)
        yield f"the list of {'timesteps' if self.sigmas is None else 'sigmas'}", solver, "DPM-Solver++ 2M"


FORMATS = {
    "edm": EDMConversion,
    "gas": GASConversion,
    "dyweight": DyWeightConversion,
    "times": TimesConversion,
    "r3gan": R3GANConversion,
}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    formats = parser.add_subparsers(dest="format", required=True)
    for name, conversion in FORMATS.items():
        description = inspect.cleandoc(str(conversion.__doc__)).partition("\n\nArgs:")[0]
        title = description.partition("\n")[0]
        one = formats.add_parser(name, help=title, description=description, argument_default=argparse.SUPPRESS)
        add_settings(one, conversion)
    given = vars(parser.parse_args(words))
    FORMATS[given.pop("format")](**given).convert()


def read(path: str, kind: str, convert: Callable[..., T], *settings: Any) -> T:
    """Converts the content of a file. A `ValueError` names the file and the kind that it should be of."""
    content = load_pickle(path)
    try:
        return convert(content, *settings)
    except ValueError as error:
        raise ValueError(f"{path} is not {kind}: {error}") from error
