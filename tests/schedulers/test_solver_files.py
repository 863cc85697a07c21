"""Learned solvers on disk: the folder's layout, what survives a round trip, and what is refused with the file's name."""

import configparser
import copy
import inspect
import json
import os
import random
import signal
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, file_size_limit
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from saved_schedulers import same_tensors, small_pipeline, trained_scheduler, trained_solver
from torch import Tensor

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMScheduler
from diffusers_gas.schedulers.configs import METADATA_KEY


# What Diffusers, or who calls it, passes to every component of a pipeline.
LOADING_ARGUMENTS = {
    *("variant", "dtype", "torch_dtype", "device_map", "max_memory", "offload_folder", "offload_state_dict", "mirror"),
    *("use_safetensors", "use_flashpack", "use_onnx", "low_cpu_mem_usage", "disable_mmap", "quantization_config"),
    *("trust_remote_code", "custom_pipeline", "custom_revision", "output_loading_info"),
    *("provider", "provider_options", "sess_options", "device", "attn_implementation", "safety_checker"),
}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def content(path: Path) -> tuple[dict[str, list], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).tolist() for name in file.keys()}, file.metadata()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A scheduler folder with a solver of 4 steps."""
    trained_scheduler(4).save_pretrained(tmp_path)
    return tmp_path


# Layout and round trips


def test_layout(tmp_path):
    trained_scheduler(8, 4, 5).save_pretrained(tmp_path)
    names = {f"{n}_steps.solver" for n in (4, 5, 8)}
    assert files(tmp_path) == {"scheduler_config.json"} | names
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert config["_class_name"] == "GASScheduler" and config["_solver_steps"] == [4, 5, 8]
    assert (tmp_path / "4_steps.solver").stat().st_size < 5000


def test_files_are_plain_safetensors(folder):
    path = folder / "4_steps.solver"
    assert {name: tuple(tensor.shape) for name, tensor in load_file(path).items()} == {
        "timestep_logits": (3,),
        "timestep_offsets": (4,),
        "state_coefficients": (4, 4),
        "data_coefficients": (4, 4),
        "theory_orders": (4,),
    }
    record = json.loads(content(path)[1][METADATA_KEY])
    assert record["solver"]["num_inference_steps"] == 4
    assert record["scheduler"]["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"order": 2},
        {"theory_order": 3, "lower_order_final": False},
        {"theory_order": 1},
        {"t_start": 0.9},
        {"parameterization": "linear_multistep"},
        {"times": torch.tensor([1.0, 0.9, 0.5, 0.3, 0.1, 0.05, 1e-3], dtype=torch.float64)},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "default",
)
def test_solver_round_trip(tmp_path, kwargs):
    scheduler, solver = GASScheduler(), trained_solver(6, **kwargs)
    solver.provenance = {"teacher": "user/Größe", "num_samples": 128, "loss": [0.5, 0.25], "guidance_scale": None}
    scheduler.add_solver(solver)
    scheduler.save_pretrained(tmp_path)
    loaded = GASScheduler.from_pretrained(tmp_path).solvers[6]
    assert loaded.config() == solver.config() and loaded.provenance == solver.provenance
    assert same_tensors(loaded, solver)
    assert torch.equal(loaded.times(), solver.times())


def test_numbers_of_numpy_and_pytorch_are_saved(tmp_path):
    scheduler, levels = GASScheduler(), np.array([14.6, 5.0, 1.0, 0.0])
    scheduler.add_solver(GeneralizedSolver(np.int64(4), t_start=np.float32(0.9)))
    scheduler.solvers[4].provenance = {"scale": np.float32(1.5), "seeds": torch.arange(2)}
    scheduler.add_solver(scheduler.solver_on(sigmas=levels))
    scheduler.save_pretrained(tmp_path)
    loaded = GASScheduler.from_pretrained(tmp_path)
    assert loaded.solvers[4].provenance == {"scale": 1.5, "seeds": [0, 1]}
    for n in (3, 4):
        for one in (scheduler, loaded):
            one.set_timesteps(n)
        assert torch.equal(scheduler.timesteps, loaded.timesteps)
    assert torch.equal(
        scheduler.solver_on(sigmas=torch.tensor(levels)).times(), scheduler.solver_on(sigmas=levels.tolist()).times()
    )


def test_save_mirrors_the_scheduler(tmp_path):
    trained_scheduler(4, 5, 8).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("kept")
    (tmp_path / "notes.txt").write_text("kept")
    trained_scheduler(5, 6, seed=1).save_pretrained(tmp_path)
    kept = {"README.md", "notes.txt", "scheduler_config.json"}
    assert files(tmp_path) == kept | {"5_steps.solver", "6_steps.solver"}
    loaded = GASScheduler.from_pretrained(tmp_path)
    assert sorted(loaded.solvers) == [5, 6]
    assert same_tensors(loaded.solvers[5], trained_solver(5, seed=1))
    GASScheduler().save_pretrained(tmp_path)
    assert files(tmp_path) == kept
    assert GASScheduler.from_pretrained(tmp_path).solvers == {}


def test_saving_what_was_loaded_changes_nothing(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    GASScheduler.from_pretrained(folder).save_pretrained(other)
    assert files(other) == files(folder)
    name = "4_steps.solver"
    assert content(other / name) == content(folder / name)


def test_from_pretrained_finds_solvers_wherever_it_finds_the_config(folder):
    parent = folder.parent
    for loaded in (
        GASScheduler.from_pretrained(folder),
        GASScheduler.from_pretrained(str(folder)),
        GASScheduler.from_pretrained(f"{folder}/"),
        GASScheduler.from_pretrained(parent, subfolder=folder.name),
        GASScheduler.from_pretrained(folder, return_unused_kwargs=True)[0],
        # Diffusers falls back to the folder itself, and accepts the config file.
        GASScheduler.from_pretrained(folder, subfolder="scheduler"),
        GASScheduler.from_pretrained(str(folder / "scheduler_config.json")),
    ):
        assert list(loaded.solvers) == [4]


def test_from_pretrained_with_other_settings(folder):
    loaded = GASScheduler.from_pretrained(folder, use_theory_for_untrained_steps=True, solver_order=3)
    assert loaded.config.use_theory_for_untrained_steps and loaded.config.solver_order == 3
    loaded.set_timesteps(7)
    assert list(loaded.solvers) == [4]


def test_other_files_are_not_taken_for_solvers(folder):
    for name in ("x_steps.solver", "4_steps.solver.bak", "5_steps.partial-123", "5_steps.json", "5_steps.solver"):
        (folder / name).write_bytes(b"anything")
    assert list(GASScheduler.from_pretrained(folder).solvers) == [4]


def test_save_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file"):
        trained_scheduler(4).save_pretrained(tmp_path / "file")


# Interrupted writers


def killed_while_saving(schedulers: list[GASScheduler], folder: Path, seconds: float) -> None:
    """Saves the schedulers in turn in a child process, which is killed after a while."""
    parent, child = os.getpid(), os.fork()
    if child == 0:
        while os.getppid() == parent:
            for scheduler in schedulers:
                scheduler.save_pretrained(folder)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_killed_writer_leaves_no_half_file(tmp_path):
    schedulers = [trained_scheduler(4, seed=seed) for seed in range(2)]
    schedulers[0].save_pretrained(tmp_path)
    delays = random.Random(0)
    for _ in range(60):
        killed_while_saving(schedulers, tmp_path, delays.uniform(0.005, 0.015))
        solver = GASScheduler.from_pretrained(tmp_path).solvers[4]
        assert any(same_tensors(solver, scheduler.solvers[4]) for scheduler in schedulers)


def test_a_failed_save_leaves_the_old_file(folder):
    scheduler = trained_scheduler(4, seed=1)
    scheduler.solvers[4].provenance = {"teacher": object()}
    before = (folder / "4_steps.solver").read_bytes()
    with pytest.raises(TypeError):
        scheduler.save_pretrained(folder)
    assert files(folder) == {"scheduler_config.json", "4_steps.solver"}
    assert (folder / "4_steps.solver").read_bytes() == before


# Bad input


def refused(folder: Path, *words: str, file: str = "4_steps.solver", **kwargs: Any) -> None:
    """Loading fails with a `ValueError` that names the file and the trouble."""
    with pytest.raises(ValueError) as error:
        GASScheduler.from_pretrained(folder, **kwargs)
    assert str(folder / file) in str(error.value)
    for word in words:
        assert word in str(error.value)


def rewrite(
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], Any] | None = None,
    record: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Writes the solver file anew, with its tensors changed in place or with another record."""
    path = folder / "4_steps.solver"
    changed_tensors = load_file(path)
    changed_record = json.loads(content(path)[1][METADATA_KEY])
    if tensors is not None:
        tensors(changed_tensors)
    if record is not None:
        changed_record = record(changed_record)
    save_file(changed_tensors, path, {METADATA_KEY: json.dumps(changed_record)})


TENSORS = ("timestep_logits", "timestep_offsets", "state_coefficients", "data_coefficients", "theory_orders")


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_shapes_are_refused(folder, name):
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    refused(folder, name)


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_dtypes_are_refused(folder, name):
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].float()}))
    refused(folder, name)


@pytest.mark.parametrize("name", TENSORS)
def test_missing_tensors_are_refused(folder, name):
    rewrite(folder, lambda tensors: tensors.pop(name))
    refused(folder, name)


def test_extra_tensors_are_refused(folder):
    rewrite(folder, lambda tensors: tensors.update(surprise=torch.zeros(1)))
    refused(folder, "surprise")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", TENSORS[:-1])
def test_numbers_that_are_not_finite_are_refused(folder, name, value):
    rewrite(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    refused(folder, name)


@pytest.mark.parametrize("orders", [[0, 1, 2, 1], [1, 2, 4, 1], [2, 2, 2, 1]])
def test_impossible_orders_are_refused(folder, orders):
    rewrite(folder, lambda tensors: tensors.update(theory_orders=torch.tensor(orders)))
    refused(folder, "theory_orders")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, -1])
def test_truncated_files_are_refused(folder, length):
    path = folder / "4_steps.solver"
    path.write_bytes(path.read_bytes()[:length])
    refused(folder)


@pytest.mark.parametrize("content", [b"garbage" * 100, b"\x00" * 64, b"\xff" * 64, b"version https://git-lfs\n"])
def test_garbage_is_refused(folder, content):
    (folder / "4_steps.solver").write_bytes(content)
    refused(folder)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["none", "other"])
def test_safetensors_of_something_else_are_refused(folder, metadata):
    save_file({"weight": torch.zeros(3)}, folder / "4_steps.solver", metadata)
    refused(folder)


def test_a_folder_in_place_of_a_file_is_refused(folder):
    (folder / "4_steps.solver").unlink()
    (folder / "4_steps.solver").mkdir()
    refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_damaged_records_are_refused(folder, text):
    path = folder / "4_steps.solver"
    save_file(load_file(path), path, {METADATA_KEY: text})
    refused(folder)


@pytest.mark.parametrize("key", ["solver", "scheduler", "provenance"])
def test_incomplete_records_are_refused(folder, key):
    rewrite(folder, record=lambda record: {name: record[name] for name in record if name != key})
    refused(folder)


@pytest.mark.parametrize("value", [None, [], "text", 3], ids=str)
@pytest.mark.parametrize("key", ["solver", "scheduler"])
def test_records_of_wrong_kind_are_refused(folder, key, value):
    rewrite(folder, record=lambda record: record | {key: value})
    refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 5},
        {"num_inference_steps": "4"},
        {"num_inference_steps": 0},
        {"num_inference_steps": 10**7, "order": 10**7},
        {"order": 3},
        {"order": 5},
        {"t_end": 2.0},
        {"t_end": "soon"},
        {"t_end": 0.01},
        {"parameterization": "other"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_records_that_contradict_the_tensors_or_the_scheduler_are_refused(folder, change):
    rewrite(folder, record=lambda record: record | {"solver": record["solver"] | change})
    refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_train_timesteps": 500},
        {"beta_start": 0.00085},
        {"beta_end": 0.012},
        {"beta_schedule": "scaled_linear"},
        {"trained_betas": [0.01] * 1000},
        {"prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True},
        {"t_end": 2e-3},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_config_that_contradicts_the_file_is_refused(folder, change):
    refused(folder, *change, **change)
    config_path = folder / "scheduler_config.json"
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | change))
    refused(folder, *change)


def test_a_renamed_file_is_refused(folder):
    (folder / "4_steps.solver").rename(folder / "5_steps.solver")
    with pytest.raises(OSError, match=r"no 4_steps\.solver, which its scheduler_config\.json lists"):
        GASScheduler.from_pretrained(folder)
    config_path = folder / "scheduler_config.json"
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | {"_solver_steps": [5]}))
    refused(folder, "4", file="5_steps.solver")


def test_one_bad_file_among_good_ones_is_named(tmp_path):
    trained_scheduler(4, 6, 8).save_pretrained(tmp_path)
    (tmp_path / "6_steps.solver").write_bytes(b"")
    refused(tmp_path, file="6_steps.solver")


# Whole pipelines


def images(pipe: DiffusionPipeline, num_inference_steps: int = 4) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, generator=generator, num_inference_steps=num_inference_steps, output_type="np").images


def test_pipeline_round_trip(tmp_path):
    pipe = small_pipeline(trained_scheduler(4, 6, beta_schedule="squaredcos_cap_v2"))
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers_gas", "GASScheduler"]
    assert {"4_steps.solver", "6_steps.solver"} <= files(tmp_path / "scheduler")
    for pipeline_class in (DiffusionPipeline, DDPMPipeline):
        loaded = pipeline_class.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is GASScheduler and sorted(loaded.scheduler.solvers) == [4, 6]
        assert loaded.scheduler.config.beta_schedule == "squaredcos_cap_v2"
        assert (images(loaded) == images(pipe)).all()


def test_pipeline_of_an_untrained_scheduler_round_trip(tmp_path):
    pipe = small_pipeline(GASScheduler(solver_order=3))
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scheduler.solvers == {} and loaded.scheduler.config.solver_order == 3
    assert (images(loaded, 5) == images(pipe, 5)).all()


def test_solver_folder_plugs_into_a_loaded_pipeline(folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("pipeline")
    small_pipeline(GASScheduler()).save_pretrained(directory)
    pipe = DiffusionPipeline.from_pretrained(directory, scheduler=GASScheduler.from_pretrained(folder))
    pipe.set_progress_bar_config(disable=True)
    trained = images(pipe)
    pipe.scheduler = GASScheduler.from_config(pipe.scheduler.config)
    assert abs(trained - images(pipe)).max() > 1e-6


def test_calling_a_pipeline_twice_gives_the_same_image_twice(folder):
    pipe = small_pipeline(GASScheduler.from_pretrained(folder))
    assert (images(pipe) == images(pipe)).all()


def test_a_damaged_solver_stops_the_pipeline_with_the_file_named(tmp_path):
    small_pipeline(trained_scheduler(4)).save_pretrained(tmp_path)
    path = tmp_path / "scheduler/4_steps.solver"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"4_steps\.solver"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_a_full_disk_is_an_error_and_keeps_the_solver_there_is(tmp_path):
    scheduler = GASScheduler()
    scheduler.add_solver(trained_solver(4))
    scheduler.save_pretrained(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    scheduler.add_solver(trained_solver(4, seed=1))
    with file_size_limit(300), pytest.raises(OSError):
        scheduler.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


# Solvers for another repository's config


FLOW_MATCHING = {"shift": 3.0, "base_shift": 0.5}


@pytest.fixture
def model_and_solver(tmp_path: Path) -> tuple[Path, Path]:
    """A model with a scheduler of Diffusers, and a folder with solvers for it that end at a time of their own."""
    model, solver = tmp_path / "model", tmp_path / "solver"
    FlowMatchEulerDiscreteScheduler(**FLOW_MATCHING).save_pretrained(model / "scheduler")
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0, "t_end": 0.01}
    scheduler = GASScheduler(**config)
    for n in (4, 6):
        scheduler.add_solver(trained_solver(n, t_end=0.01))
    scheduler.save_pretrained(solver)
    return model, solver


def test_solvers_for_the_scheduler_of_a_model(model_and_solver):
    model, solver = model_and_solver
    loaded = GASScheduler.from_pretrained(model, subfolder="scheduler", solver=solver)
    assert sorted(loaded.solvers) == [4, 6] and same_tensors(loaded.solvers[6], trained_solver(6, t_end=0.01))
    assert (loaded.config.flow_shift, loaded.config.t_end) == (3.0, 0.01)  # the model's, and the solver's
    expected = GASScheduler.from_pretrained(solver, flow_shift=3.0)
    for scheduler in (loaded, expected):
        scheduler.set_timesteps(4)
    assert torch.equal(loaded.timesteps, expected.timesteps)
    # Settings, and the answer with what is not known.
    loaded, unused = GASScheduler.from_pretrained(
        model, "scheduler", True, solver=solver, use_theory_for_untrained_steps=True, unknown=1
    )
    assert loaded.config.use_theory_for_untrained_steps and unused["unknown"] == 1


def test_solvers_of_another_model_are_refused(model_and_solver, tmp_path):
    _, solver = model_and_solver
    DDIMScheduler().save_pretrained(tmp_path / "other" / "scheduler")
    with pytest.raises(ValueError, match=r"do not fit the scheduler of .*'use_flow_sigmas': False"):
        GASScheduler.from_pretrained(tmp_path / "other", subfolder="scheduler", solver=solver)
    GASScheduler().save_pretrained(tmp_path / "untrained")
    with pytest.raises(ValueError, match="has no solver files"):
        GASScheduler.from_pretrained(tmp_path / "other", subfolder="scheduler", solver=tmp_path / "untrained")
    with pytest.raises(OSError, match="missing"):
        GASScheduler.from_pretrained(tmp_path / "other", subfolder="scheduler", solver="user/missing")
    with pytest.raises(TypeError, match="pretrained_model_name_or_path"):
        GASScheduler.from_pretrained(solver=solver)


@pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])
def test_misspelled_settings_are_refused_and_foreign_ones_ignored(scheduler_class, tmp_path):
    """A word that is spelled wrong must not make an untrained scheduler."""
    DDIMScheduler().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no setting `predicton_type`. Is `prediction_type` meant"):
        scheduler_class.from_pretrained(tmp_path, predicton_type="sample")
    with pytest.raises(ValueError, match=r"no setting `sovler`. Is `solver` meant"):
        scheduler_class.from_pretrained(tmp_path, sovler="user/solver")
    with pytest.raises(ValueError, match=r"no setting `use_flow_sigma`. Is `use_flow_sigmas` meant"):
        scheduler_class.from_config({**DDIMScheduler().config, "use_flow_sigma": True})
    theirs = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    foreign = {name for kind in theirs for name in inspect.signature(kind).parameters} | LOADING_ARGUMENTS
    foreign -= inspect.signature(scheduler_class).parameters.keys()
    assert {"algorithm_type", "use_beta_sigmas"} <= foreign
    config, ignored = DDIMScheduler().config, dict.fromkeys(foreign)
    plain = scheduler_class.from_config(config)
    for made in (scheduler_class.from_config(config, **ignored), scheduler_class.from_pretrained(tmp_path, **ignored)):
        assert all(made.config[name] == value for name, value in plain.config.items() if not name.startswith("_"))


def test_a_server_finds_the_classes_by_name():
    """The names and the call by which vLLM-Omni makes a scheduler."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    entry_points = dict(
        line.split(" = ") for line in config["options.entry_points"]["vllm_omni.schedulers"].split("\n") if line
    )
    assert entry_points.keys() == {"gas", "sdm"}
    for value in entry_points.values():
        scheduler_class = EntryPoint("name", value, "vllm_omni.schedulers").load()
        assert scheduler_class in (GASScheduler, SDMScheduler)


def test_a_server_makes_and_drives_a_scheduler(model_and_solver):
    """vLLM-Omni passes the model's own `local_files_only` and `revision`, copies the scheduler, and has loops of its own."""
    model, solver = model_and_solver
    made = GASScheduler.from_pretrained(
        str(model), subfolder="scheduler", local_files_only=True, revision="main", solver=str(solver)
    )
    scheduler, x = copy.deepcopy(made), torch.randn(1, 16, 4)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), device="cpu", mu=None)
    scheduler.set_begin_index(0)
    for t in scheduler.timesteps:
        (x,) = scheduler.step(torch.sin(x + t / 1000), t, x, return_dict=False, generator=None)
    assert x.isfinite().all() and scheduler.config.num_train_timesteps == 1000
