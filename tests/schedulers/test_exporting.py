"""Exported tables: the sampler in examples/ gives the samples of the scheduler, bit by bit, from the JSON file alone."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from saved_schedulers import (
    CONFIGS,
    FLOW,
    SAMPLER,
    STABLE_DIFFUSION,
    learned,
    load_sampler,
    perturbed,
    planned_scheduler,
    save_pipeline,
)
from tiny_pipelines import TinyPipeline, build, final_state
from torch import Tensor

from diffusers_gas import GASScheduler, SDMScheduler
from diffusers_gas.schedulers.exporting import exported


DYNAMIC = CONFIGS["dynamic-shift"]


SolverTableScheduler = load_sampler()


def export_and_load(scheduler: Any, folder: Path, *step_counts: int, **shifts: Any) -> Any:
    scheduler.export(folder / "solver.json", step_counts or None, **shifts)
    return SolverTableScheduler.from_json(folder / "solver.json")


def sample(scheduler: Any, x: Tensor, begin: int | None = None) -> Tensor:
    """The loop of a pipeline with a smooth function in the place of its network, which mixes the entries of x."""
    if begin is not None:
        scheduler.set_begin_index(begin)
        x = scheduler.add_noise(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype), None)
    for t in scheduler.timesteps[begin or 0 :]:
        given = scheduler.scale_model_input(x, t)
        output = torch.sin(1.3 * given + t.to(x.dtype) / 500) + 0.2 * given.flip(-1)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def noise(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_samples_are_those_of_the_scheduler_bit_by_bit(config, dtype, tmp_path):
    scheduler = learned(config, 4, 7)
    mu = {"mu": 0.8} if config.get("use_dynamic_shifting") else {}
    other = export_and_load(scheduler, tmp_path, **{name: [value] for name, value in mu.items()})
    assert other.init_noise_sigma == scheduler.init_noise_sigma and len(other) == len(scheduler)
    for n in (4, 7):
        for begin in (None, 1, n - 1):
            for either in (scheduler, other):
                either.set_timesteps(n, **mu)
            assert torch.equal(other.timesteps, scheduler.timesteps)
            torch.testing.assert_close(other.sigmas, scheduler.sigmas, rtol=1e-6, atol=0)
            assert torch.equal(sample(other, noise(dtype), begin), sample(scheduler, noise(dtype), begin))


@pytest.mark.parametrize(
    "config",
    [
        FLOW | {"invert_sigmas": True},
        {"exploding_sigmas": [0.01, 80.0]},
        STABLE_DIFFUSION | {"variance_type": "learned_range"},
        {"prediction_type": "sample"},
    ],
    ids=["inverted", "exploding", "variance", "sample"],
)
def test_rarer_kinds_of_networks(config, tmp_path):
    scheduler = learned(config, 4)
    other = export_and_load(scheduler, tmp_path)
    for either in (scheduler, other):
        either.set_timesteps(4)
    torch.testing.assert_close(other.sigmas, scheduler.sigmas, rtol=1e-6, atol=1e-7)
    assert torch.equal(sample(other, noise()), sample(scheduler, noise()))
    output = torch.cat([noise(), noise()], dim=1) if "variance_type" in config else noise()
    for either in (scheduler, other):
        either.set_timesteps(4)
    first, second = (e.step(output, e.timesteps[0], noise()).prev_sample for e in (scheduler, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("config", [STABLE_DIFFUSION, FLOW, {"sigma_data": 0.5}], ids=["vp", "flow", "edm"])
def test_plans_of_sdm_are_exported_too(config, tmp_path):
    scheduler = planned_scheduler(8, **config)
    other = export_and_load(scheduler, tmp_path)
    for begin in (None, 3):
        for either in (scheduler, other):
            either.set_timesteps(8)
        assert torch.equal(sample(other, noise(), begin), sample(scheduler, noise(), begin))


def test_an_untrained_scheduler_exports_its_theory_solver(tmp_path):
    scheduler = GASScheduler(**FLOW)
    other = export_and_load(scheduler, tmp_path, 5)
    for either in (scheduler, other):
        either.set_timesteps(5)
    assert torch.equal(sample(other, noise()), sample(scheduler, noise()))


def test_every_shift_has_its_table(tmp_path):
    scheduler = learned(FLOW, 4)
    content = exported(scheduler, shifts=[3.0, 5.0])
    assert [table["shift"] for table in content["tables"]] == [3.0, 5.0]
    scheduler.set_shift(5.0)
    assert exported(scheduler)["tables"] == content["tables"][1:]

    dynamic = learned(DYNAMIC, 4)
    other = export_and_load(dynamic, tmp_path, mu=[0.5, 1.15])
    for mu in (0.5, 1.15):
        for either in (dynamic, other):
            either.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)  # as pipelines ask for 4 steps
        assert torch.equal(sample(other, noise()), sample(dynamic, noise()))
    with pytest.raises(ValueError, match=r"No table, or several, for 4 steps and mu = 0\.7"):
        other.set_timesteps(4, mu=0.7)


def shift_and_sample(tiny: TinyPipeline, scheduler: Any) -> tuple[float, Tensor]:
    """The `mu` that a pipeline asks a scheduler for, and its sample."""
    shifts: list[float] = []
    own = scheduler.set_timesteps

    @functools.wraps(own)  # pipelines inspect the signature
    def set_timesteps(*arguments: Any, **others: Any) -> None:
        shifts.append(others["mu"])
        own(*arguments, **others)

    scheduler.set_timesteps = set_timesteps
    sample = final_state(tiny, scheduler, num_inference_steps=4)
    return shifts[0], sample


@pytest.mark.parametrize("name", ["flux", "qwen-image", "ltx-video", "stable-diffusion-3"])
def test_pipelines_ask_for_the_shift_that_was_exported(name, tmp_path, caplog):
    """They compute it from settings of the model, which the file has, too."""
    tiny = build(name)
    # Stable Diffusion 3 asks only if the config says so.
    dynamic = {"use_dynamic_shifting": True, "max_shift": 1.9} if name == "stable-diffusion-3" else {}
    own = FlowMatchEulerDiscreteScheduler.from_config(tiny.pipe.scheduler.config, **dynamic)
    scheduler = GASScheduler.from_config(own.config)
    scheduler.add_solver(perturbed(scheduler.theory_solver(4, 1.0)))
    mu, expected = shift_and_sample(tiny, scheduler)
    sampler = export_and_load(scheduler, tmp_path, mu=[mu])
    sampler.save_pretrained(tmp_path)
    for one in (sampler, SolverTableScheduler.from_pretrained(tmp_path)):
        asked, sample = shift_and_sample(tiny, one)
        assert asked == mu and torch.equal(sample, expected)
    assert not caplog.text


def test_a_shift_that_is_not_in_the_file(tmp_path):
    scheduler = learned(DYNAMIC, 4)
    sampler = export_and_load(scheduler, tmp_path, mu=[0.5])
    with pytest.raises(ValueError, match=r"`scheduler\.export\(path, \[4\], mu=\[0\.7\]\)`"):
        sampler.set_timesteps(4, mu=0.7)
    with pytest.raises(ValueError, match=r"mu = None\. There are \(steps, mu\) = \[\(4, 0\.5\)\]\.$"):
        sampler.set_timesteps(4)
    content = exported(scheduler, mu=[0.5])
    del content["pipeline_settings"]
    earlier = SolverTableScheduler(**content)
    earlier.set_timesteps(4, mu=0.5)
    with pytest.raises(ValueError, match="this file lacks: export it again"):
        earlier.set_timesteps(4, mu=0.7)


def test_a_denoised_estimate_gives_the_same_prediction():
    """For programs that turn the network's output into a denoised estimate themselves, at the level that it was told."""
    x, output = noise(torch.float64), noise(torch.float64).flip(-1)
    estimates = {
        "epsilon": lambda alpha, sigma: (x - sigma * output) / alpha,
        "v_prediction": lambda alpha, sigma: alpha * x - sigma * output,
        "sample": lambda alpha, sigma: output,
        "flow_prediction": lambda alpha, sigma: x - sigma * output,
    }
    for prediction_type, estimate in estimates.items():
        flow = prediction_type == "flow_prediction"
        scheduler = learned({"prediction_type": prediction_type, **({"use_flow_sigmas": True} if flow else {})}, 4)
        for step in exported(scheduler)["tables"][0]["steps"]:
            p, q = step["prediction"]
            c_x, c_denoised = step["denoised"]
            denoised = estimate(step["evaluation_alpha"], step["evaluation_sigma"])
            torch.testing.assert_close(c_x * x + c_denoised * denoised, p * x + q * output, rtol=1e-9, atol=1e-9)
        assert step["evaluation_sigma"] != step["sigma"]  # so that the map has something to do


def test_the_file_is_small_and_for_people_to_read(tmp_path):
    scheduler = learned(STABLE_DIFFUSION, 4)
    scheduler.export(tmp_path / "solver.json")
    text = (tmp_path / "solver.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert content == exported(scheduler)  # every number comes back as it was
    assert (content["schema"], content["version"]) == ("diffusers_gas/solver_table", 1)
    assert (content["noise_schedule"], content["prediction_type"]) == ("variance_preserving", "epsilon")
    lines = [line for line in text.splitlines() if '"rule"' not in line]
    assert len(lines) < 120 and max(map(len, lines)) < 200


def test_what_cannot_be_exported_is_refused(tmp_path):
    path = tmp_path / "solver.json"
    cases = [
        (GASScheduler(), {}, "has learned nothing"),
        (learned({"thresholding": True}, 4), {}, "no fixed sums"),
        (SDMScheduler(online=True), {"num_inference_steps": [8]}, "no fixed sums"),
        (learned({}, 4), {"shifts": [3.0]}, "`shifts` are for flow matching"),
        (learned(DYNAMIC, 4), {"shifts": [3.0]}, "`shifts` are for flow matching"),
        (learned(DYNAMIC, 4), {}, "`mu` is required"),
        (learned(FLOW, 4), {"mu": [1.0]}, "`mu` is required"),
        (learned(FLOW, 4), {"num_inference_steps": [5]}, "No solver for 5 steps"),
    ]
    for scheduler, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            scheduler.export(path, **arguments)
    assert not path.exists()


def test_exporting_leaves_the_scheduler_as_it_is(tmp_path):
    scheduler = learned(FLOW, 4, 6)
    scheduler.set_timesteps(6)
    before = scheduler.timesteps.clone()
    scheduler.export(tmp_path / "solver.json", [4], shifts=[7.0])
    assert torch.equal(scheduler.timesteps, before) and scheduler.config.flow_shift == 3.0


def test_the_sampler_refuses_other_files():
    for content in ({"tables": [{}], "version": 2}, {}):
        with pytest.raises(ValueError, match="Expected an exported solver of version 1"):
            SolverTableScheduler(**content)


REMOTE = """
import sys
sys.modules["diffusers_gas"] = None  # not installed here
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("pipeline", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
assert type(pipe.scheduler).__name__ == "SolverTableScheduler"
images = pipe(generator=torch.manual_seed(0), num_inference_steps=4, output_type="np").images
torch.save(torch.from_numpy(images), "images.pt")
pipe.save_pretrained("again")
"""


@pytest.mark.slow
def test_a_pipeline_with_the_sampler_loads_without_this_package(tmp_path):
    """As `trust_remote_code=True` loads it, from one copied file and the exported one."""
    folder = tmp_path / "pipeline"
    save_pipeline(folder, learned(STABLE_DIFFUSION, 4))
    pipe = DiffusionPipeline.from_pretrained(folder)
    expected = pipe(generator=torch.manual_seed(0), num_inference_steps=4, output_type="np").images
    shutil.rmtree(folder / "scheduler")
    pipe.scheduler.export(folder / "scheduler" / "scheduler_config.json")
    shutil.copy(SAMPLER, folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["scheduling_solver_table", "SolverTableScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    subprocess.run([sys.executable, "-c", REMOTE], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "images.pt"), torch.from_numpy(expected))
    saved = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["tables"] == exported(pipe.scheduler)["tables"]
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder)
