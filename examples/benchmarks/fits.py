"""The solvers that the benchmarks evaluate: results of the training scripts on the shipped models.

They are made once and kept in `.fits/{model}/{method}/scheduler` in the output folder; interrupted fits are resumed. The solvers for
the examples are copied to examples/solvers. quality.py, solver_cost.py and transfer.py run this module.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import FOLDER, output_folder

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMScheduler


TRAINING_SCRIPTS = FOLDER.parents[1] / "training"
SHIPPED = FOLDER.parent / "solvers"

# Samples for the scripts' own tables, which are not used.
NUM_COMPARED = 1
GAS_STEPS = 400
NUM_GAS_SAMPLES = 1400
DISCRIMINATOR_WIDTH = 64
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
    """

    steps: tuple[int, ...] = (4, 6, 8, 10)
    gas_steps: tuple[int, ...] = (4,)
    num_judged: int = 512
    num_repeats: int = 1


FITS = {
    "digits": Fit(num_judged=1024),
    "text-to-digits": Fit(),
    "flow-digits": Fit(gas_steps=()),
    "moving-digits": Fit(steps=(4, 6, 8)),
    "text-to-emoji": Fit(steps=(4,), gas_steps=(), num_judged=128, num_repeats=0),
}


def folder(teacher: str, method: str) -> Path:
    return output_folder() / ".fits" / teacher / method


def run_script(name: str, teacher: str, output_dir: Path, *arguments: object) -> None:
    common = ["--teacher", teacher, "--output_dir", output_dir]
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


def gauss_newton(teacher: str, steps: Iterable[int], repeat: int = 0, limit: int | None = None) -> Path:
    """The fits of a model by default settings, or repeated ones to other samples, or to at most `limit` samples."""
    name = "-".join(["gs", *([f"{repeat}"] if repeat else []), *([f"{limit}-samples"] if limit else [])])
    limited = ["--num_teacher_samples", limit] if limit else []
    return train(teacher, folder(teacher, name), steps, "--seed", repeat * REPEAT_SEEDS, *limited)


def gas(teacher: str) -> Path:
    """Adversarial training that starts from Gauss-Newton's solver.

    The learning rate of the discriminator is the script's 1e-4, for an untrained one. The published 1e-5 is for a trained one.
    """
    arguments = ["--loss", "gas", "--discriminator_width", DISCRIMINATOR_WIDTH, "--max_train_steps", GAS_STEPS]
    arguments += [
        "--initialize_from",
        gauss_newton(teacher, FITS[teacher].steps) / "scheduler",
        "--num_teacher_samples",
        NUM_GAS_SAMPLES,
    ]
    arguments += ["--resume_from_checkpoint", "latest", "--checkpointing_steps", 100]
    return train(teacher, folder(teacher, "gas"), FITS[teacher].gas_steps, *arguments)


def sdm(teacher: str) -> Path:
    """Calibrates plans for all numbers of evaluations."""
    output_dir, steps = folder(teacher, "sdm"), FITS[teacher].steps
    if not all((output_dir / "scheduler" / "solver" / f"{n}_steps.safetensors").exists() for n in steps):
        # The tables have the distance to the teacher, which GS is fitted to and Diffusers' best are chosen by.
        run_script("calibrate_sdm.py", teacher, output_dir, "--target", "teacher", "--num_inference_steps", *steps)
    return output_dir


def solvers(teacher: str) -> dict[str, GASScheduler | SDMScheduler]:
    """All schedulers of a model by their names in the tables. Missing ones are made."""
    found = {
        "SDM": SDMScheduler.from_pretrained(sdm(teacher) / "scheduler"),
        "GS": GASScheduler.from_pretrained(gauss_newton(teacher, FITS[teacher].steps) / "scheduler"),
    }
    if FITS[teacher].gas_steps:
        found["GAS"] = GASScheduler.from_pretrained(gas(teacher) / "scheduler")
    return found


def repeats(teacher: str) -> list[GASScheduler]:
    """Schedulers of the repeated fits."""
    fit = FITS[teacher]
    folders = (gauss_newton(teacher, [min(fit.steps)], repeat) for repeat in range(1, fit.num_repeats + 1))
    return [GASScheduler.from_pretrained(path / "scheduler") for path in folders]


def ship(teacher: str) -> None:
    """Copies the schedulers for the examples to examples/solvers."""
    for method in ("gs", "gas", "sdm"):
        source, target = folder(teacher, method) / "scheduler", SHIPPED / teacher / method
        if source.exists():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
