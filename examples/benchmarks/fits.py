"""The solvers that the benchmarks evaluate: results of the training scripts on the shipped models.

They are made once and kept in `.fits/{model}/{method}/scheduler` in the output folder; interrupted fits are resumed. The solvers for
the examples are copied to examples/solvers. quality.py, solver_cost.py and transfer.py run this module.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from report import FOLDER, output_folder

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMScheduler


TRAINING_SCRIPTS = FOLDER.parents[1] / "training"
SHIPPED = FOLDER.parent / "solvers"
TEACHERS = FOLDER.parent / "teachers"

# Samples for the scripts' own tables, which are not used.
NUM_COMPARED = 1
# Guidance scales of the samples that a solver for a range is distilled from.
NUM_SCALES = 5
# Difference between the first seeds of repeated fits.
REPEAT_SEEDS = 10_000


@dataclass(frozen=True)
class Fit:
    """Settings of the fits of a model.

    Attributes:
        steps: Numbers of steps for Gauss-Newton and SDM.
        gas_steps: Numbers of steps for adversarial training.
        num_judged: Samples for the evaluation.
        num_repeats: Further fits with the fewest steps, each to other samples.
        guidance_range: The lowest and the highest guidance scale of the solvers for a range.
        guided_steps: Their numbers of steps. They cost twice as much as those of one scale.
        further_training: Arguments of `train_gas.py` for training that goes on from Gauss-Newton's solvers.
        discriminator: Those that adversarial training adds or changes. `True` is the value of a switch.
    """

    steps: tuple[int, ...] = (4, 6, 8, 10)
    gas_steps: tuple[int, ...] = (4,)
    num_judged: int = 512
    num_repeats: int = 1
    guidance_range: tuple[float, float] | None = None
    guided_steps: tuple[int, ...] = (4, 6)
    further_training: Mapping[str, Any] = field(
        default_factory=lambda: {"max_train_steps": 400, "num_teacher_samples": 1400}
    )
    # The learning rate is the script's 1e-4, for an untrained one. The published 1e-5 is for a trained one.
    discriminator: Mapping[str, Any] = field(default_factory=lambda: {"discriminator_width": 64})


FITS = {
    "digits": Fit(num_judged=1024),
    "text-to-digits": Fit(guidance_range=(1.5, 8)),
    "flow-digits": Fit(gas_steps=(), guidance_range=(1.5, 8)),
    "moving-digits": Fit(steps=(4, 6, 8), gas_steps=()),
    "text-to-emoji": Fit(
        steps=(4, 5, 6, 8, 10),
        gas_steps=(3, 4, 5),
        num_repeats=0,
        guidance_range=(2, 10),
        further_training={
            "max_train_steps": 30,
            "train_batch_size": 16,
            "num_teacher_samples": 256,
            "num_validation_samples": 16,
        },
        discriminator={
            "discriminator_features": "pixels",
            "discriminator_size": 32,
            "discriminator_width": 32,
            "discriminator_learning_rate": 1e-3,
            "reuse_fakes": True,
            "adversarial_weight": 0.1,
            "discriminator_warmup_steps": 60,
            "max_train_steps": 90,
        },
    ),
}


def folder(teacher: str, method: str) -> Path:
    return output_folder() / ".fits" / teacher / method


def run_script(name: str, teacher: str, output_dir: Path, *arguments: object) -> None:
    common = ["--pretrained_model_name_or_path", TEACHERS / teacher, "--output_dir", output_dir]
    subprocess.run(list(map(str, [sys.executable, TRAINING_SCRIPTS / name, *common, *arguments])), check=True)


def record_of(output_dir: Path, num_inference_steps: int) -> Path:
    """The file that train_gas.py writes at the end of the fit for a number of steps."""
    return output_dir / f"{num_inference_steps}_steps.json"


def cost(solver: GeneralizedSolver) -> dict[str, Any]:
    """What a fit took, the teacher's samples and the choice of the start included."""
    names = ("evaluations", "teacher_images", "num_teacher_samples", "seconds")
    return {name: solver.provenance[name] for name in names}


def train(teacher: str, output_dir: Path, steps: Iterable[int], *arguments: object) -> Path:
    """Runs train_gas.py for the numbers of steps that it has not finished yet, and returns its output folder."""
    arguments = (*arguments, "--num_compared_samples", NUM_COMPARED)
    for n in steps:
        if not record_of(output_dir, n).exists():
            run_script("train_gas.py", teacher, output_dir, "--num_inference_steps", n, *arguments)
            (output_dir / "comparison.json").rename(record_of(output_dir, n))
    return output_dir


def gauss_newton(teacher: str, steps: Iterable[int], repeat: int = 0) -> Path:
    """The fits of a model by default settings, or repeated ones to other samples."""
    path = folder(teacher, f"gs-{repeat}" if repeat else "gs")
    return train(teacher, path, steps, "--seed", repeat * REPEAT_SEEDS)


def of_scales(teacher: str, num_inference_steps: int, *guidance_scales: float) -> GASScheduler:
    """The fit at a guidance scale, or for the range of several ones."""
    path = folder(teacher, "gs-guidance-" + "-".join(f"{scale:g}" for scale in guidance_scales))
    train(teacher, path, [num_inference_steps], "--guidance_scale", *guidance_scales)
    return GASScheduler.from_pretrained(path / "scheduler")


def of_range(teacher: str, num_inference_steps: int) -> GASScheduler:
    """The fit for all guidance scales of a model."""
    return of_scales(teacher, num_inference_steps, *scales_of_range(teacher))


def gs(teacher: str) -> GASScheduler:
    """The solvers of a model: for a range of guidance scales where its fits have one, else for its usual scale."""
    fit = FITS[teacher]
    guided = fit.guided_steps if fit.guidance_range else ()
    single = [n for n in fit.steps if n not in guided]
    scheduler = GASScheduler.from_pretrained(gauss_newton(teacher, single) / "scheduler")
    for n in guided:
        scheduler.add_solver(of_range(teacher, n).solvers[n])
    return scheduler


def gas(
    teacher: str,
    steps: Iterable[int] | None = None,
    repeat: int = 0,
    discriminator: bool = True,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Training that goes on from Gauss-Newton's solvers, with or without a discriminator.

    Args:
        teacher: The model.
        steps: Numbers of steps; by default those of the model's fits.
        repeat: Which of the repeated fits to go on from. Each has other samples.
        discriminator: Whether the training is adversarial.
        changes: Arguments that replace those of the model; `None` leaves one out.
    """
    steps = list(steps or FITS[teacher].gas_steps)
    start = gauss_newton(teacher, steps, repeat)
    arguments = further_arguments(teacher, discriminator, changes)
    changed = [f"{name}-{value}" for name, value in (changes or {}).items()]
    words = ["gas" if discriminator else "adam", *([f"{repeat}"] if repeat else []), *changed]
    path = folder(teacher, "-".join(words))
    # The trainings of a model and a repeat share the teacher's samples.
    samples = folder(teacher, f"further_training-{repeat}") / "teacher_samples"
    samples.mkdir(parents=True, exist_ok=True)
    path.mkdir(parents=True, exist_ok=True)
    if not (path / samples.name).exists():
        (path / samples.name).symlink_to(samples.resolve())
    start_and_seed = ("--initialize_from", start / "scheduler", "--seed", repeat * REPEAT_SEEDS)
    return train(teacher, path, steps, *arguments, *start_and_seed, "--checkpointing_steps", 100)


def further_arguments(
    teacher: str, discriminator: bool = True, changes: Mapping[str, Any] | None = None
) -> list[object]:
    """The arguments of [`gas`] on the command line."""
    fit = FITS[teacher]
    loss = {"loss": "gas", **fit.discriminator} if discriminator else {"optimizer": "adam", "loss": "l1"}
    chosen = {**fit.further_training, **loss, **(changes or {})}
    pairs = [
        (f"--{name}", *(() if value is True else (value,))) for name, value in chosen.items() if value is not None
    ]
    return [word for pair in pairs for word in pair]


def sdm(teacher: str, steps: Sequence[int], *guidance_scales: float) -> SDMScheduler:
    """Calibrated plans for numbers of evaluations, at the usual guidance scale or for samples of one or several given ones."""
    output_dir = folder(teacher, "-".join(["sdm", *(f"{scale:g}" for scale in guidance_scales)]))
    if not all((output_dir / "scheduler" / f"{n}_steps.solver").exists() for n in steps):
        scales = ("--guidance_scale", *guidance_scales) if guidance_scales else ()
        # The tables have the distance to the teacher, which GS is fitted to and Diffusers' best are chosen by.
        arguments = ("--target", "teacher", "--num_inference_steps", *steps, *scales)
        run_script("calibrate_sdm.py", teacher, output_dir, *arguments)
    return SDMScheduler.from_pretrained(output_dir / "scheduler")


def scales_of_range(teacher: str) -> list[float]:
    """Guidance scales from one end of a model's range to the other, in equal ratios."""
    return np.geomspace(*FITS[teacher].guidance_range, NUM_SCALES).round(2).tolist()


def solvers(teacher: str) -> dict[str, GASScheduler | SDMScheduler]:
    """All schedulers of a model by their names in the tables. Missing ones are made."""
    found = {
        "SDM": sdm(teacher, FITS[teacher].steps),
        "GS": gs(teacher),
    }
    if FITS[teacher].gas_steps:
        found["GAS"] = GASScheduler.from_pretrained(gas(teacher) / "scheduler")
    return found


def repeats(teacher: str) -> list[GASScheduler]:
    """Schedulers of the repeated fits at the usual guidance scale, the first of them among the model's solvers or beside them."""
    fit = FITS[teacher]
    numbers = range(fit.num_repeats + 1) if fit.num_repeats else ()
    folders = (gauss_newton(teacher, [min(fit.steps)], repeat) for repeat in numbers)
    return [GASScheduler.from_pretrained(path / "scheduler") for path in folders]


def ship(teacher: str) -> None:
    """Saves the schedulers for the examples in examples/solvers."""
    for method, scheduler in solvers(teacher).items():
        target = SHIPPED / teacher / method.lower()
        shutil.rmtree(target, ignore_errors=True)
        scheduler.save_pretrained(target)
