"""Schedulers that bring their code along, loaded where this package cannot be imported, against the package's own."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DDIMScheduler
from hub_server import TOKEN, run_code, running_hub
from test_hub import save_pipeline, trained_scheduler

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMScheduler, standalone
from diffusers_gas.standalone import standalone_source


SCHEDULERS = (GASScheduler, SDMScheduler)

WITHOUT_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_gas":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
"""

SAMPLE = """
import hashlib
from diffusers import DiffusionPipeline
import torch

def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    images = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=8, output_type="np").images
    return hashlib.sha256(images.tobytes()).hexdigest()
"""


def load_module(source: str, folder: Path) -> ModuleType:
    path = folder / "standalone_scheduler.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("standalone_scheduler", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_code_is_complete(scheduler_class, tmp_path):
    path = tmp_path / "code.py"
    path.write_text(standalone_source(scheduler_class))
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    assert "diffusers_gas" not in imported and not any(name.startswith(".") for name in imported)
    assert {"torch", "diffusers", "safetensors"} <= imported
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(path)]  # undefined, unused
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        {"sigma_data": 0.5},
    ],
    ids=["vp", "zero-snr", "flow", "edm"],
)
@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_steps_are_those_of_the_package(scheduler_class, begin, config, tmp_path):
    ours = scheduler_class(**config)
    if scheduler_class is GASScheduler:
        solver = GeneralizedSolver(8)
        with torch.no_grad():
            solver.data_coefficients.normal_(std=0.05)
            solver.timestep_offsets.normal_(std=0.01)
        ours.add_solver(solver)
    else:
        ours.add_plan(ours.published_plan(8))
    ours.save_pretrained(tmp_path)
    theirs = getattr(load_module(standalone_source(scheduler_class), tmp_path), scheduler_class.__name__)
    theirs = theirs.from_pretrained(tmp_path)
    assert not isinstance(theirs, scheduler_class)

    outputs = torch.randn(8, 2, 3, 4)
    final = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8)
        if begin:
            scheduler.set_begin_index(begin)
        state = torch.ones(2, 3, 4)
        for t, output in zip(scheduler.timesteps[begin:], outputs):
            state = scheduler.step(output * scheduler.scale_model_input(state, t), t, state).prev_sample
        final.append(state)
    assert final[0].isfinite().all() and torch.equal(*final)


def test_pipeline_loads_without_the_package(tmp_path):
    gas = trained_scheduler(8)
    sdm = SDMScheduler.from_config(gas.config)
    for name, scheduler in (("gas", gas), ("sdm", sdm)):
        scheduler.include_code()
        save_pipeline(tmp_path / name, scheduler)
    with running_hub() as hub:
        for name in ("gas", "sdm"):
            hub.add_folder(f"user/{name}", tmp_path / name)
        with_package = run_code(
            hub,
            tmp_path / "home",
            f"""{SAMPLE}
import diffusers_gas
for name, scheduler in (("gas", diffusers_gas.GASScheduler), ("sdm", diffusers_gas.SDMScheduler)):
    scheduler = scheduler.from_pretrained(f"user/{{name}}", subfolder="scheduler")
    answers[name] = sample(DiffusionPipeline.from_pretrained(f"user/{{name}}", scheduler=scheduler))
try:
    DiffusionPipeline.from_pretrained("user/gas")
except ValueError as error:
    answers["error"] = str(error)
""",
        )
        assert "trust_remote_code=True" in with_package["error"] and with_package["gas"] != with_package["sdm"]
        load = f"""{WITHOUT_PACKAGE}{SAMPLE}
for name in ("gas", "sdm"):
    pipe = DiffusionPipeline.from_pretrained(f"user/{{name}}", trust_remote_code=True)
    answers[name] = sample(pipe)
    pipe.save_pretrained(name)
    answers[name + " again"] = sample(DiffusionPipeline.from_pretrained(name, trust_remote_code=True))
answers["imported"] = "diffusers_gas" in sys.modules
"""
        for settings in ({}, {"HF_HUB_OFFLINE": "1"}):
            count = len(hub.requests)
            answers = run_code(hub, tmp_path / "another_home", load, **settings)
            for name in ("gas", "sdm"):
                assert answers[name] == answers[f"{name} again"] == with_package[name]
            assert not answers["imported"] and "might require" not in answers["stderr"]
        assert len(hub.requests) == count


def test_card_of_a_scheduler_says_how_to_load_it_without_the_package(tmp_path):
    save_pipeline(tmp_path / "pipeline", DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
    trained_scheduler(8, seed=1).save_pretrained(tmp_path / "trained")
    with running_hub() as hub:
        hub.add_folder("user/pipeline", tmp_path / "pipeline")
        with_package = run_code(
            hub,
            tmp_path / "home",
            f"""{SAMPLE}
from diffusers_gas import GASScheduler
scheduler = GASScheduler.from_pretrained({str(tmp_path / "trained")!r})
scheduler.solvers[8].provenance = {{"teacher": "user/pipeline"}}
scheduler.include_code()
scheduler.push_to_hub("user/solver", token={TOKEN!r})
answers["image"] = sample(DiffusionPipeline.from_pretrained("user/pipeline", scheduler=scheduler))
""",
        )
        card = hub.repositories["user/solver"].files["README.md"].decode()
        code = card.split("## Without diffusers_gas")[1].split("```python")[1].split("```")[0]
        answers = run_code(hub, tmp_path / "home", f"{WITHOUT_PACKAGE}{SAMPLE}{code}\nanswers['image'] = sample(pipe)")
    assert answers["image"] == with_package["image"]


def test_code_of_others_is_refused():
    class Mine(GASScheduler):
        pass

    with pytest.raises(ValueError, match=r"Mine.*cannot be saved along"):
        Mine().include_code()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (
            {"a": "from .b import f\nX = 1\nclass Root:\n    x = X\n    f = f", "b": "X = 2\ndef f(): return X"},
            "define X",
        ),
        ({"a": "from .b import f as g\nclass Root:\n    f = g", "b": "def f(): return 1"}, "by its own name"),
        ({"a": "from . import b\nclass Root:\n    f = b.f", "b": "def f(): return 1"}, "not a module"),
    ],
)
def test_what_cannot_be_joined_is_named(modules, message, tmp_path, monkeypatch):
    modules = {"__init__": "__version__ = '1'\nfrom .a import Root", **modules}
    (tmp_path / "to_be_joined").mkdir()
    for name, text in modules.items():
        (tmp_path / "to_be_joined" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(standalone, "PACKAGE", "to_be_joined")
    standalone._parse.cache_clear()
    try:
        root = importlib.import_module("to_be_joined").Root
        with pytest.raises(ValueError, match=message):
            standalone_source(root)
    finally:
        for name in [name for name in sys.modules if name.startswith("to_be_joined")]:
            del sys.modules[name]
