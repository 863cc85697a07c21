"""The solvers that benchmarks judge: runs of the training scripts on the shipped models, made once and kept.

They lie in `.fits/{model}/{method}` of the output folder, `scheduler` in each; an interrupted one goes on. They are copied to
examples/solvers for the examples. Nothing to run here: quality.py does.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from report import FOLDER, output_folder

from diffusers_gas import GASScheduler, SDMScheduler


TRAINING_SCRIPTS = FOLDER.parents[1] / "training"
SHIPPED = FOLDER.parent / "solvers"

NUM_HELD_OUT = 256
# For the scripts' own tables, which are not used.
NUM_COMPARED = 1
GAS_STEPS = 400
NUM_GAS_SAMPLES = 1400
DISCRIMINATOR_WIDTH = 64
NUM_CALIBRATION = 64


@dataclass(frozen=True)
class Fit:
    """Step counts of a model's solvers, and the samples they learn from.

    Attributes:
        steps: Of Gauss-Newton and SDM.
        gas_steps: Of adversarial training.
        num_samples, max_iterations: Of Gauss-Newton.
        num_judged: Samples to judge by.
    """

    steps: tuple[int, ...] = (4, 6, 8)
    gas_steps: tuple[int, ...] = (4,)
    num_samples: int = 256
    max_iterations: int = 12
    num_judged: int = 512


FITS = {
    "digits": Fit(num_samples=1024, max_iterations=14, num_judged=1024),
    "text-to-digits": Fit(),
    "flow-digits": Fit(gas_steps=(), max_iterations=8),
    "moving-digits": Fit(steps=(4,)),
}


def folder(teacher: str, method: str) -> Path:
    return output_folder() / ".fits" / teacher / method


def run_script(name: str, teacher: str, output_dir: Path, *arguments: object, finished: str) -> Path:
    """The output folder of a training script, which is run unless the last file that it writes is there."""
    if not (output_dir / finished).exists():
        common = ["--teacher", teacher, "--output_dir", output_dir]
        subprocess.run(list(map(str, [sys.executable, TRAINING_SCRIPTS / name, *common, *arguments])), check=True)
    return output_dir


def gauss_newton(teacher: str) -> Path:
    fit = FITS[teacher]
    arguments = [
        "--num_inference_steps",
        *fit.steps,
        "--num_teacher_samples",
        fit.num_samples,
        "--num_validation_samples",
        NUM_HELD_OUT,
    ]
    arguments += ["--max_train_iterations", fit.max_iterations, "--num_compared_samples", NUM_COMPARED]
    return run_script("train_gas.py", teacher, folder(teacher, "gs"), *arguments, finished="comparison.json")


def gas(teacher: str) -> Path:
    """Adversarial training from Gauss-Newton's solver.

    With the script's rate of 1e-4 for a discriminator that starts from nothing; the published 1e-5 is for others.
    """
    arguments = ["--loss", "gas", "--discriminator_width", DISCRIMINATOR_WIDTH, "--max_train_steps", GAS_STEPS]
    arguments += ["--initialize_from", gauss_newton(teacher) / "scheduler"]
    arguments += ["--num_inference_steps", *FITS[teacher].gas_steps, "--num_teacher_samples", NUM_GAS_SAMPLES]
    arguments += ["--num_validation_samples", NUM_HELD_OUT, "--num_compared_samples", NUM_COMPARED]
    arguments += ["--resume_from_checkpoint", "latest", "--checkpointing_steps", 100]
    return run_script("train_gas.py", teacher, folder(teacher, "gas"), *arguments, finished="comparison.json")


def sdm(teacher: str) -> Path:
    arguments = ["--num_inference_steps", *FITS[teacher].steps, "--num_samples", NUM_CALIBRATION]
    return run_script("calibrate_sdm.py", teacher, folder(teacher, "sdm"), *arguments, finished="calibration.png")


def solvers(teacher: str) -> dict[str, GASScheduler | SDMScheduler]:
    """All of a model's schedulers, made as far as they are missing, by what they are called in tables."""
    found = {
        "SDM": SDMScheduler.from_pretrained(sdm(teacher) / "scheduler"),
        "GS": GASScheduler.from_pretrained(gauss_newton(teacher) / "scheduler"),
    }
    if FITS[teacher].gas_steps:
        found["GAS"] = GASScheduler.from_pretrained(gas(teacher) / "scheduler")
    return found


def ship(teacher: str) -> None:
    """Copies the schedulers that examples use to examples/solvers."""
    for method in ("gs", "gas", "sdm"):
        source, target = folder(teacher, method) / "scheduler", SHIPPED / teacher / method
        if source.exists():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
