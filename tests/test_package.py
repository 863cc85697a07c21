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
from diffusers_gas import EDMPipeline, EDMUNet, GASScheduler, SDMScheduler


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
pipe = (EDMPipeline if sys.argv[2] == "EDMPipeline" else diffusers.DiffusionPipeline).from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
names = {name: type(component).__name__ for name, component in pipe.components.items()}
print(json.dumps([type(pipe).__name__, names, list(pipe(num_inference_steps=4, output_type="np").images.shape)]))
"""


def edm_pipeline() -> EDMPipeline:
    unet = EDMUNet(8, model_channels=8, channel_mult=(1, 2), layers_per_block=1)
    return EDMPipeline(unet, EDMDPMSolverMultistepScheduler())


@pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])
@pytest.mark.parametrize("pipeline", [edm_pipeline, lambda: build("ddpm").pipe], ids=["edm", "ddpm"])
def test_pipelines_record_the_package_and_load_in_a_new_process(pipeline, scheduler_class, tmp_path):
    pipe = pipeline()
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_gas", scheduler_class.__name__]
    assert index["unet"][0] == ("diffusers_gas" if isinstance(pipe.unet, EDMUNet) else "diffusers")
    kind, names, shape = json.loads(run_python(LOAD, tmp_path, type(pipe).__name__).splitlines()[-1])
    assert kind == type(pipe).__name__
    assert names == {"unet": type(pipe.unet).__name__, "scheduler": scheduler_class.__name__}
    assert shape == [1, 8, 8, 3]


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


def test_loading_a_solver_and_sampling_is_read_in_seven_files(digits):
    """Those of CONTRIBUTING.md."""
    root, used = Path(diffusers_gas.__file__).parent, set()

    def note(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and root in path.parents:
            used.add(path.relative_to(root).as_posix())

    gc.collect()  # generators that other tests have left would end in it
    sys.setprofile(note)
    try:
        scheduler = GASScheduler.from_pretrained(ROOT / "examples/solvers/digits/gas")
        with plugged(digits, scheduler):
            digits(num_inference_steps=4, output_type="latent")
    finally:
        sys.setprofile(None)
    assert used == {
        *("schedulers/configs.py", "schedulers/scheduling_gas.py", "schedulers/scheduling_utils.py"),
        *("generalized_solver.py", "noise_schedules.py", "solver_table.py", "utils/files.py"),
    }
