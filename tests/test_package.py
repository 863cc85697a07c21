"""The package as users and Diffusers see it: its public names, what saved pipelines record, and what importing needs."""

import ast
import gc
import inspect
import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from conftest import ROOT
from diffusers import EDMDPMSolverMultistepScheduler
from tiny_pipelines import build, plugged

import diffusers_gas
from diffusers_gas import (
    EDMPipeline,
    EDMUNet,
    GASScheduler,
    SampleInputs,
    SDMScheduler,
    calibrate,
    calibration,
    distill,
)


def run_python(code: str, *arguments: object) -> str:
    """What a new Python process prints that runs some code."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_public_names():
    for name in diffusers_gas.__all__:
        assert getattr(diffusers_gas, name).__module__.startswith("diffusers_gas.")
        assert name in dir(diffusers_gas)
    for name in ("adaptive", "calibration", "comparison", "pipelines", "presentation"):
        assert getattr(diffusers_gas, name).__name__ == f"diffusers_gas.{name}"
    assert not hasattr(diffusers_gas, "solver")
    # Diffusers looks these up in the module that a component comes from.
    assert diffusers_gas.SchedulerMixin is diffusers.SchedulerMixin
    assert diffusers_gas.ModelMixin is diffusers.ModelMixin


@pytest.mark.parametrize("kind", [EDMUNet, GASScheduler, SDMScheduler])
def test_classes_name_the_module_that_has_their_source(kind):
    assert f"class {kind.__name__}(" in inspect.getsource(kind)


LOAD = """
import json
import sys
import diffusers
from diffusers_gas import EDMPipeline

assert not hasattr(diffusers, "EDMPipeline")
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = (EDMPipeline if name == "EDMPipeline" else diffusers.DiffusionPipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    names = {name: type(component).__name__ for name, component in pipe.components.items()}
    images = pipe(num_inference_steps=4, output_type="np").images
    print("loaded", json.dumps([type(pipe).__name__, names, list(images.shape)]))
"""


def edm_pipeline() -> EDMPipeline:
    unet = EDMUNet(8, model_channels=8, channel_mult=(1, 2), layers_per_block=1)
    return EDMPipeline(unet, EDMDPMSolverMultistepScheduler())


def test_pipelines_record_the_package_and_load_in_a_new_process(tmp_path):
    arguments, expected = [], []
    for pipe in (edm_pipeline(), build("ddpm").pipe):
        for scheduler_class in (GASScheduler, SDMScheduler):
            folder, unet = tmp_path / str(len(expected)), type(pipe.unet).__name__
            pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
            pipe.save_pretrained(folder)
            index = json.loads((folder / "model_index.json").read_text())
            assert index["scheduler"] == ["diffusers_gas", scheduler_class.__name__]
            assert index["unet"] == ["diffusers_gas" if unet == "EDMUNet" else "diffusers", unet]
            arguments += [folder, type(pipe).__name__]
            names = {"unet": unet, "scheduler": scheduler_class.__name__}
            expected.append([type(pipe).__name__, names, [1, 8, 8, 3]])
    lines = [line for line in run_python(LOAD, *arguments).splitlines() if line.startswith("loaded ")]
    assert [json.loads(line.removeprefix("loaded ")) for line in lines] == expected


SAMPLE_WITHOUT = """
import importlib.util
import sys

missing, teacher = sys.argv[1].split(","), sys.argv[2]
find_spec = importlib.util.find_spec
# Diffusers finds out with this whether a library is installed.
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in missing else find_spec(name, *rest)
for name in missing:
    sys.modules[name] = None

from diffusers import DDPMPipeline
from diffusers_gas import GASScheduler

pipe = DDPMPipeline.from_pretrained(teacher)
pipe.scheduler = GASScheduler.from_config(pipe.scheduler.config)
print(pipe(num_inference_steps=4, output_type="np").images.shape)
print([name for name in sys.modules if name.startswith("diffusers_gas.")])
"""


def test_sampling_needs_no_optional_library_and_imports_nothing_that_makes_or_shows_solvers():
    teacher = Path(__file__).parent.parent / "examples/teachers/digits"
    missing = "transformers,peft,matplotlib,sklearn,scipy,psutil,tensorboard"
    *_, shape, imported = run_python(SAMPLE_WITHOUT, missing, teacher).splitlines()
    assert shape == "(1, 8, 8, 1)"
    packages = {name.split(".")[1] for name in ast.literal_eval(imported)}
    # And not: calibration, commands, comparison, distillation, papers, pipelines, presentation.
    assert packages == {
        *("generalized_solver", "guided_solver", "noise_schedules", "schedulers", "solver_table", "utils"),
    }


def load_and_sample(pipe):
    scheduler = GASScheduler.from_pretrained(ROOT / "examples/solvers/digits/gas")
    with plugged(pipe, scheduler):
        pipe(num_inference_steps=4, output_type="latent")


SAMPLING = {
    *("schedulers/configs.py", "schedulers/scheduling_gas.py", "schedulers/scheduling_utils.py"),
    *("generalized_solver.py", "noise_schedules.py", "solver_table.py", "utils/files.py"),
}
FITTING = {
    *("pipelines/driving.py", "pipelines/inputs.py", "pipelines/teacher.py"),
    *("least_squares.py", "utils/diffusers_hooks.py"),
}
OF_DISTILLATION = {"distillation/distill.py", "distillation/gauss_newton.py"}
OF_CALIBRATION = {
    *("calibration.py", "adaptive/solvers.py", "schedulers/scheduling_sdm.py", "schedulers/sdm_plan.py"),
}


@pytest.mark.parametrize(
    "function, files",
    [
        (load_and_sample, SAMPLING),
        (
            lambda pipe: distill(
                pipe, 3, inputs=SampleInputs.create(0, 10), teacher_num_inference_steps=4, max_iterations=1
            ),
            SAMPLING | FITTING | OF_DISTILLATION,
        ),
        (
            lambda pipe: calibrate(pipe, 2, inputs=SampleInputs.create(0, 2), most_evaluations=100),
            SAMPLING - {"generalized_solver.py", "utils/files.py"} | FITTING | OF_CALIBRATION,
        ),
    ],
    ids=["load and sample", "distill", "calibrate"],
)
def test_features_are_read_in_a_few_files(digits, monkeypatch, function, files):
    """Those of CONTRIBUTING.md, whose functions run."""
    monkeypatch.setattr(calibration, "FINE_STEPS", 8)
    root, called = Path(diffusers_gas.__file__).parent, set()
    gc.collect()  # generators that other tests have left would end in it
    sys.setprofile(lambda frame, event, _: called.add(frame.f_code) if event == "call" else None)
    try:
        function(digits)
    finally:
        sys.setprofile(None)
    paths = {Path(code.co_filename) for code in called}
    used = {path.relative_to(root).as_posix() for path in paths if root in path.parents}
    assert used == files
    assert len(used) <= (7 if function is load_and_sample else 14)
