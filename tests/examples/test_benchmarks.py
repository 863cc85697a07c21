"""The benchmarks run with small settings, and their results agree with known values."""

import functools
import hashlib
import io
import json
import math
import os
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from fake_accelerator import DEVICE, Accelerator


sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
import accelerator
import adversarial
import adversarial_galaxies
import as_they_come
import cost_projection
import distillation_cost
import evaluations_saved
import exact_solution
import fits
import galaxies
import guidance_scales
import of_others
import published_solvers
import quality
import real_sizes
import report
import sdm_quality
import sigmas_alone
import solver_cost
import step_cost
import time_series
import time_to_quality
import transfer

from diffusers_gas import GASScheduler, SDMScheduler
from diffusers_gas.calibration import calibrate
from diffusers_gas.distillation.gauss_newton import distill_gauss_newton
from diffusers_gas.pipelines.driving import num_evaluations
from diffusers_gas.pipelines.inputs import SampleInputs


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def output(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv(report.OUTPUT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    return tmp_path


def constants(monkeypatch, module, **values) -> None:
    for name, value in values.items():
        monkeypatch.setattr(module, name, value)


def results(module):
    """Runs a benchmark, and returns its results."""
    module.main()
    for ending in (".md", ".png"):
        assert report.output_path(module.__file__, ending).stat().st_size > 100
    return json.loads(report.output_path(module.__file__, ".json").read_text())


def test_step_cost(monkeypatch):
    shapes = {"small": (1, 3, 8, 8), "large": (1, 4, 32, 32)}
    constants(monkeypatch, step_cost, SHAPES=shapes, STEP_COUNTS=(3, 4), REPETITIONS=1)
    constants(monkeypatch, step_cost, DRAWN_STEPS=4, DRAWN_SHAPE="large")
    found = results(step_cost)
    names = step_cost.schedulers().keys()
    assert len(found["rows"]) == 2 * 2 * len(names) and len(found["calls"]) == 3 * len(names)
    for row in found["rows"]:
        assert 0 < row["relative"] < 1e3 and row["us"] > 0
        assert row["scheduler"] != step_cost.REFERENCE or row["relative"] == 1
    assert all(row["us"] > 0 for row in found["calls"])


def test_as_they_come(monkeypatch):
    constants(monkeypatch, as_they_come, MODELS=("digits",), EVALUATIONS=(5, 7), NUM_SAMPLES={"digits": 6})
    constants(monkeypatch, as_they_come, TEACHER_STEPS=20)
    rows = results(as_they_come)["digits"]
    assert [row["evaluations"] for row in rows] == [5, 7]
    assert all(0.8 < row[method][0] < 1.1 for row in rows for method in ("SDM", "GAS"))


def test_sdm_quality(monkeypatch):
    constants(monkeypatch, sdm_quality, BUDGETS=(6,), NUM_SAMPLES=6, BATCH_SIZE=6, REFERENCE_STEPS=30)
    constants(monkeypatch, sdm_quality, NUM_SCREENED=3, NUM_JUDGED=2)
    quick = functools.partial(calibrate, inputs=SampleInputs.create(0, 6), most_evaluations=900)
    constants(monkeypatch, sdm_quality, calibrate=quick, rivals=lambda pipe, n: quality.rivals(pipe, n)[::4])
    rows = {name: row["6"] for name, row in results(sdm_quality)["rows"].items()}
    medians = {name: row["median"] for name, row in rows.items()}
    # So few samples and evaluations do not tell calibrated plans from each other and from DPM-Solver++.
    others = [name for name in medians if name.startswith(("Euler", "Heun", "SDM published", "SDM uncalibrated"))]
    assert len(others) == 4 and all(medians["SDM calibrated, either"] < medians[name] for name in others)
    assert medians["SDM as it comes"] < 0.2 * medians['SDM uncalibrated, published (`solver="heun"`)']
    assert rows["best of Diffusers"]["note"] and medians["best of Diffusers"] < medians["Euler, Karras"]
    assert "6 evaluations" in rows["SDM calibrated, Heun"]["note"] and "heun" in rows["SDM calibrated, Heun"]["note"]


def test_published_solvers(monkeypatch):
    constants(monkeypatch, published_solvers, SOLVERS={"digits": ("neuralsolver-dit",)}, STEP_COUNTS=(6, 8))
    constants(monkeypatch, published_solvers, NUM_SAMPLES=8, BATCH_SIZE=8)
    ((row, later),) = results(published_solvers).values()
    assert row["solver"] == "neuralsolver-dit" and 0.3 < published_solvers.relative(row) < 30
    assert results(published_solvers) == {"digits": [row, later]}  # it is not measured again


def test_sigmas_alone(monkeypatch):
    constants(monkeypatch, sigmas_alone, MODELS=("text-to-digits",), STEP_COUNTS=(4,), NUM_SAMPLES=8, BATCH_SIZE=8)
    found = {row["scheduler"]: row["distance"] for row in results(sigmas_alone)}
    assert len(found) == 5 and min(found, key=found.get) == sigmas_alone.GS


def test_solver_cost(monkeypatch):
    constants(monkeypatch, solver_cost, NUM_JUDGED=8, NUM_FITS={4: 2})
    run_script, small = fits.run_script, ["--max_train_iterations", 1, "--teacher_num_inference_steps", 5]
    small += ["--num_validation_samples", 8, "--num_compared_samples", 1, "--num_teacher_samples", 8]
    monkeypatch.setattr(fits, "run_script", lambda *arguments: run_script(*arguments, *small))
    monkeypatch.setattr(sys, "argv", ["solver_cost.py", "--models", "digits", "--steps", "4"])
    (row,) = results(solver_cost)
    first, second = row["fits"]
    assert first["mean"] != second["mean"] and first["num_teacher_samples"] == 8
    assert all(fit["evaluations"] > 5 * (8 + 8) + 8 * num_evaluations(4) for fit in row["fits"])
    assert all(0 < fit["median"] < fit["mean"] < 1 for fit in row["fits"])


@pytest.fixture
def emoji(monkeypatch) -> Path:
    """Small numbers for the benchmarks of the emoji model, and a fit of it that has the shipped solvers."""
    few = fits.Fit(steps=(4,), gas_steps=(4,), num_judged=4)
    monkeypatch.setitem(fits.FITS, quality.PAGE_MODEL, few)
    folder = report.output_folder() / "GS"  # as of a fit
    folder.mkdir()
    (folder / "scheduler").symlink_to(fits.SHIPPED / quality.PAGE_MODEL / "gs")
    constants(monkeypatch, evaluations_saved, gs=lambda teacher: GASScheduler.from_pretrained(folder / "scheduler"))
    constants(monkeypatch, evaluations_saved, rivals=lambda pipe, n: quality.rivals(pipe, n)[::12])
    return folder


def test_evaluations_saved(monkeypatch, emoji):
    constants(monkeypatch, evaluations_saved, STEPS=(4,), NUM_FIRST_SCREENED=2, NUM_CHOSEN=2)
    found = results(evaluations_saved)
    assert list(found["GS"]) == ["4"] and list(found["Diffusers"]) == ["4", "8", "12"]
    theirs = [row["distance"] for row in found["Diffusers"].values()]
    assert found["GS"]["4"]["distance"] < theirs[0] and theirs[-1] < theirs[0]


def test_guidance_scales(monkeypatch):
    """The shipped solver stands for that of the range, and an untrained one for those of single scales."""
    ours = shipped("flow-digits", "gs")
    other = GASScheduler.from_config(ours.config)
    other.add_solver(other.theory_solver(4))
    other.solvers[4].provenance = ours.solvers[4].provenance | {"evaluations": 1}

    constants(monkeypatch, guidance_scales, of_range=lambda model, n: ours, of_scales=lambda model, n, scale: other)
    plans = shipped("flow-digits", "sdm")
    constants(monkeypatch, guidance_scales, sdm=lambda model, steps, *scales: plans if len(scales) > 1 else other)
    constants(monkeypatch, guidance_scales, JUDGED={"flow-digits": (4.0, 8.0)}, NUM_SAMPLES=4)
    monkeypatch.setattr(sys, "argv", ["guidance_scales.py", "--steps", "4"])
    found = results(guidance_scales)
    assert [row["scale"] for row in found.values()] == [4, 8]
    for row in found.values():
        of_range, single, best = (
            row["distances"][name] for name in (guidance_scales.RANGE, guidance_scales.SINGLE, guidance_scales.BEST)
        )
        assert of_range < min(single, best) and row["evaluations"][guidance_scales.SINGLE] == 1
        assert row["medians"][guidance_scales.RANGE] < row["medians"][guidance_scales.SINGLE]
        plan, single = (row["distances"][name] for name in (guidance_scales.PLAN, guidance_scales.SINGLE_PLAN))
        assert of_range < plan != single
    monkeypatch.setattr(guidance_scales, "measure", None)
    assert results(guidance_scales) == found, "nothing is measured twice"


def test_adversarial(monkeypatch, emoji):
    """With one solver in all places, nothing is gained; the fit to the features comes closer in these."""
    constants(monkeypatch, adversarial, STEPS=(4,), NUM_SEEDS=2, NUM_TRAINING=8, NUM_HELD_OUT=4)
    constants(monkeypatch, adversarial, VARIANTS={"no change": {}})
    constants(monkeypatch, adversarial, gas=lambda *_, **__: emoji, gauss_newton=lambda *_: emoji)
    constants(monkeypatch, adversarial, distill_gauss_newton=functools.partial(distill_gauss_newton, max_iterations=1))
    found = results(adversarial)
    assert [row["method"] for row in found["rows"]].count("GAS") == 2
    assert adversarial.gains(found, "GAS", "GS", 4) == [0, 0]
    assert found["variants"][0]["frechet"] == next(r["frechet"] for r in found["rows"] if r["method"] == "GAS")
    assert found["rows"][-1]["method"] == adversarial.FEATURES and 0 < found["rows"][-1]["distance"] < 1


def test_adversarial_galaxies(monkeypatch, output):
    """A training for more steps goes on where the one for fewer has ended, and every seed has a control of equal length."""
    wheel_of_galaxies(monkeypatch, output)
    scheduler = GASScheduler.from_config(galaxies.load_pipeline().scheduler.config)
    scheduler.add_solver(scheduler.theory_solver(3))
    monkeypatch.setattr(of_others.Subject, "distilled", lambda subject: scheduler)
    constants(monkeypatch, of_others, TEACHER_STEPS=5)
    constants(monkeypatch, adversarial_galaxies, NUM_TRAINING=32, NUM_JUDGED=16, JUDGED_EVERY=1, DISCRIMINATOR_WIDTH=8)
    found = []
    for last in (1, 2):
        arguments = ["--num_seeds", "2", "--max_train_steps", str(last)]
        monkeypatch.setattr(sys, "argv", ["adversarial_galaxies.py", *arguments])
        found.append(results(adversarial_galaxies)["3"])
    assert [row["method"] for row in found[0][:2]] == [adversarial_galaxies.TEACHER, adversarial_galaxies.START]
    assert found[1][: len(found[0])] == found[0]
    trained = {(row["method"], row["seed"], row["trained"]): row["fine"] for row in found[1][2:]}
    methods = {method for method, *_ in trained}
    assert len(trained) == 2 * 2 * 2 and adversarial_galaxies.CONTROL in methods and len(set(trained.values())) == 8


def test_time_to_quality_goes_on_after_an_interruption(monkeypatch, output):
    setting = time_to_quality.Setting(
        num_teacher_samples=8, num_validation_samples=4, adam_steps=2, judged_every=1, max_iterations=1
    )
    constants(monkeypatch, time_to_quality, SETTING=setting)
    folder = output / ".time_to_quality"
    kept = {"points": [{"seconds": 1.0, "evaluations": 2, "distance": 3.0}], "peak_memory": 5, "batch_size": 7}
    folder.mkdir()
    for name, its in (("Adam l1, our start", setting), ("Gauss-Newton, our start", replace(setting, adam_steps=3))):
        (folder / f"{name}.json").write_text(json.dumps({"setting": vars(its), "fit": kept}))
    found = results(time_to_quality)
    assert found["curves"].pop("Adam l1, our start") == kept["points"] and not folder.exists()
    curves = {name: found["curves"][name] for name in found["curves"] if name.endswith("published start")}
    for loss in ("l1", "l2"):
        published = curves[f"Adam {loss}, published start"]
        assert [point["evaluations"] for point in published] == [24 * 4 * step for step in range(3)]
    recipe = [point["distance"] for point in curves[found["baseline"]]]
    assert found["targets"] == [recipe[-1], min(recipe)]
    for name, points in found["curves"].items():
        assert points[-1]["seconds"] >= points[0]["seconds"] and found["peak_memory"][name] > 2**20


def test_distillation_cost(monkeypatch):
    constants(monkeypatch, distillation_cost, STEP_COUNTS=(2, 3), SAMPLES_FOR_STEPS=4, BATCH_SIZE=2)
    constants(monkeypatch, distillation_cost, STEPS_FOR_SAMPLES=2, SAMPLE_COUNTS=(4,))
    found = results(distillation_cost)
    assert {(row["steps"], row["samples"], row["processes"]) for row in found} == {(2, 4, 1), (3, 4, 1), (2, 4, 2)}
    for row in found:
        n = row["steps"]
        if row["method"] == "backpropagation":
            assert row["evaluations"] == n * row["samples"]
            continue
        assert row["evaluations"] == n * (n + 1) * (n + 5) // 6 * row["samples"]
        assert row["trial_evaluations"] == n * row["samples"]
        # Time grid and offsets, and lower triangles of coefficients.
        assert row["unknowns"] == n - 1 + n + n * (n + 1)
        parameters = n - 1 + n + 2 * n**2
        # A linearization sends its number of entries, loss, normal equations and gradient, a trial its loss, distance and number.
        assert row["reduce_bytes"] == 8 * (2 + parameters**2 + parameters + 2 * row["trials"])
        assert row["fixed_seconds"] > 0 and row["trials"] >= 1
    memory = [row["peak_memory"] for row in found if row["processes"] == 1]
    assert all(peak > 2**19 for peak in memory)


@pytest.mark.parametrize("name", cost_projection.MODELS)
def test_architectures_have_the_published_numbers_of_parameters(name):
    model = cost_projection.MODELS[name]
    assert cost_projection.count_parameters(model) == pytest.approx(model.parameters, rel=0.025)


def test_cost_projection(monkeypatch, output):
    name = "Stable Diffusion 1.5"
    constants(monkeypatch, cost_projection, MODELS={name: cost_projection.MODELS[name]})
    cost = {"evaluations": 1_000_000, "teacher_images": 20_000, "num_teacher_samples": 64}
    fits = [{"model": "text-to-digits", "steps": n, "fits": [cost]} for n in cost_projection.STEP_COUNTS]
    (output / f"{cost_projection.FITS}.json").write_text(json.dumps(fits))
    iteration = {"method": "Gauss-Newton", "steps": 4, "samples": 64, "reduce_calls": 4, "reduce_bytes": 12_000}
    times = {"fixed_seconds": 1.0, "seconds": 11.0}
    measured = [iteration | times | {"processes": 1}, iteration | times | {"processes": 2, "seconds": 6.5}]
    (output / "distillation_cost.json").write_text(json.dumps(measured))
    (output / "real_sizes.json").write_text("[]")
    found = results(cost_projection)
    network = found["networks"][name]
    assert network["speed"] == "assumed: 40% of an H100" and found["speeds"] == []
    # Guidance takes two evaluations. The products of attention are 0.13e12 operations of each.
    assert network["operations"] == pytest.approx(0.8e12, rel=0.02)
    assert network["seconds"] == 2 * network["operations"] / (989e12 * 0.4)
    assert [(row["predicted"], row["measured"]) for row in found["check"]] == [(6.0, 6.5)]
    assert found["sdm_hours"][name] == pytest.approx(5000 * network["seconds"] / 3600)
    for row in found["projections"]:
        assert row["evaluations"] == {"fit": 1_000_000 - 50 * (64 + 32), "teacher": 50 * (64 + 32)}
        wall = list(row["wall_hours"].values())
        assert wall == sorted(wall, reverse=True)
        assert row["gpu_hours"] / 8 < wall[-1] and wall[0] < row["gpu_hours"] + 1.5  # a second for each iteration


def test_projections_use_the_speed_of_an_accelerator():
    """The speed of the fastest sampling of the same model."""

    def row(model, accelerator, seconds, **case):
        case = {"model": model, "task": "sample", "precision": "bfloat16"} | case
        device = "a GPU" if accelerator else "a CPU"
        measured = {"operations": 10, "evaluations": 8, "seconds": seconds}
        return {"device": device, "accelerator": accelerator, "case": case, **measured}

    sizes = [row("SDXL", True, 4.0), row("SDXL", True, 2.0, precision="float16"), row("SDXL", False, 16.0)]
    sizes += [row("FLUX.1-dev", False, 20.0), row("SDXL", True, 1.0, task="distill")]
    unmeasured = {key: value for key, value in row("SDXL", True, 0.1).items() if key != "seconds"}
    sizes.append({**unmeasured, "not_run": "not run: needs 9.9 GiB for its weights"})
    assert cost_projection.speed_of("SDXL", sizes) == cost_projection.Speed(40.0, "measured: a GPU")
    assert cost_projection.speed_of("FLUX.1-dev", sizes).source == "assumed: 40% of an H100"
    speeds = {(row["device"], row["model"]): row["speed"] for row in cost_projection.speeds_of_networks(sizes)}
    assert speeds == {("a GPU", "SDXL"): 20.0, ("a CPU", "SDXL"): 5.0, ("a CPU", "FLUX.1-dev"): 4.0}


def test_theory_converges_with_its_order_to_the_exact_solution(monkeypatch):
    constants(monkeypatch, exact_solution, BUDGETS=(4, 40, 80), NUM_JUDGED=8)
    name = "variance preserving, uniform in log SNR"
    constants(monkeypatch, exact_solution, CASES={name: exact_solution.CASES[name]})
    found = results(exact_solution)
    assert found["reference_error"] < 1e-8
    theory = [row for row in found["cases"][name] if row["method"].startswith("GAS theory")]
    assert [row["slope"] for row in theory] == pytest.approx([1, 2, 2], abs=0.3)
    assert all(math.isfinite(point["error"]) for row in found["cases"][name] for point in row["points"])


def test_learned_solvers_come_closer_to_the_exact_solution(monkeypatch):
    constants(monkeypatch, exact_solution, BUDGETS=(4, 8), NUM_JUDGED=8, NUM_TRAINING=32, NUM_HELD_OUT=8)
    constants(monkeypatch, exact_solution, CALIBRATED_BUDGETS=(4,), DISTILLED_BUDGETS=(4,))
    name = "flow matching, uniform times"
    constants(monkeypatch, exact_solution, CASES={name: exact_solution.CASES[name]})
    errors = {
        (row["method"], point["budget"]): point["error"]
        for row in results(exact_solution)["cases"][name]
        for point in row["points"]
    }
    diffusers = ("Euler", "DPM-Solver++ 2M", "DPM-Solver++ 3M", "UniPC", "DEIS")
    assert errors["GS, distilled", 4] < 0.3 * min(errors[method, 4] for method in diffusers)
    assert errors["SDM, calibrated", 4] < errors["SDM, Heun", 4]


def test_real_sizes(monkeypatch, output):
    """With tiny networks; a second run keeps what the first has measured."""
    constants(monkeypatch, real_sizes, in_own_process=lambda function, *arguments: function(*arguments))

    def rows(*options):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--small", "--device", "cpu", *options])
        real_sizes.main()
        assert all((output / f"real_sizes-small{ending}").stat().st_size > 100 for ending in (".md", ".png"))
        return json.loads((output / "real_sizes-small.json").read_text())

    tasks = [row for row in rows("--models", "FLUX.1-dev") if "seconds" in row]
    assert [row["case"]["task"] for row in tasks] == ["sample", "distill", "adversarial"]
    found = rows()
    assert [row for row in found if row["case"]["model"] == "FLUX.1-dev"] == tasks
    models = list(dict.fromkeys(row["case"]["model"] for row in found))
    assert models == ["Stable Diffusion 1.5", "SDXL", "FLUX.1-dev", "Wan 2.1 1.3B"]
    for row in found:
        case = row["case"]
        if case["way"] == "offloaded":
            assert row["not_run"] == "not run: needs an accelerator"
            continue
        # A student's sample of the adversarial step and one for the discriminator.
        expected = {"sample": 8, "adversarial": 2 * 4, "distill": 2 * 5 + 30 + 5 * 4}[case["task"]]
        expected *= 1 + case["guided"]
        assert row["evaluations"] == expected or (case["task"] == "distill" and row["evaluations"] > expected)
        assert row["parameters"] > 0 and row["operations"] > 0
        if case["task"] == "sample":
            assert row["finite"] and 0 < real_sizes.share(row) < 1
        elif case["task"] == "distill":
            assert row["sampled_distance"] == pytest.approx(row["distance"], rel=1e-3)
        else:
            assert real_sizes.share(row) is None and row["gradient_norm"] > 0


def test_real_sizes_go_on_after_a_case_without_enough_memory(monkeypatch, output):
    """It is tried again in the next run."""

    def measure(function, case, device):
        if case.task == "distill":
            raise torch.OutOfMemoryError
        return function(case, device)

    monkeypatch.setattr(sys, "argv", ["benchmark", "--small", "--device", "cpu", "--models", "FLUX.1-dev"])
    for in_own_process, failed in ((measure, ["distill"]), (lambda function, *arguments: function(*arguments), [])):
        constants(monkeypatch, real_sizes, in_own_process=in_own_process)
        real_sizes.main()
        rows = json.loads((output / "real_sizes-small.json").read_text())
        assert len(rows) == 3 and [row["case"]["task"] for row in rows if "not_run" in row] == failed


@pytest.fixture
def short(monkeypatch) -> None:
    """The script for accelerators does less, in this process."""
    module = "tests/integration/test_precision_and_placement.py"
    constants(monkeypatch, accelerator, TESTS=(f"{module}::test_gradients_are_not_in_float64_on_the_device",))
    constants(monkeypatch, accelerator, NUM_SAMPLES=3, TEACHER_STEPS=6, MAX_EVALUATIONS=1000)
    constants(monkeypatch, accelerator, in_own_process=lambda function, *arguments, seconds: function(*arguments))
    constants(monkeypatch, step_cost, REPETITIONS=1)
    graph = functools.partial(torch.compile, backend="eager")
    constants(monkeypatch, real_sizes, compiled=graph)


def test_accelerator(monkeypatch, output, short):
    """On the CPU. A further run keeps what has been measured, and tries what failed or had no time."""

    def run(minutes: int) -> dict[str, dict]:
        monkeypatch.setattr(sys, "argv", ["benchmark", "--small", "--device", "cpu", "--minutes", str(minutes)])
        accelerator.main()
        text = (output / "accelerator-small.md").read_text()
        found = {row["name"]: row for row in json.loads((output / "accelerator-small.json").read_text())}
        assert list(found) == [row.name for row in accelerator.rows(small=True)]
        assert all(row.get("result", row.get("not_run")) in text for row in found.values())
        return found

    assert all("0 s were left" in row["not_run"] for row in run(minutes=0).values())
    found = run(minutes=60)
    [failed] = [name for name, row in found.items() if "not_run" in row]
    assert failed.endswith("layer by layer") and "accelerator only" in found[failed]["not_run"]
    constants(monkeypatch, real_sizes, sample_with=None, adversarial_step=None)  # a repetition would fail
    assert run(minutes=60) == found
    for name, row in found.items():
        if "tests" in name:
            assert "1 passed" in row["result"]
        elif "records" in row:
            assert {"GS", "SDM"} < row["records"].keys() and row["evaluations"] > 0
        elif "distill" in name:
            assert row["sampled_distance"] == pytest.approx(row["distance"], rel=1e-3)


def test_accelerator_on_an_emulated_one(short):
    """Everything is on the device that has to be there."""
    for row in accelerator.rows(small=True)[1:-2]:
        with Accelerator():
            assert row.measure(DEVICE)["result"]


def end_process(device: str) -> None:
    os._exit(1)


def test_accelerator_goes_on_after_failures():
    """A process that dies, one that takes too long, and an error."""
    run = functools.partial(accelerator.run, device="cpu", left=2)
    rows = [accelerator.Row("", 1, function) for function in (end_process, time.sleep, int)]
    assert "process ended" in run(rows[0])["not_run"]
    assert "process ended" in accelerator.run(rows[1], 60, left=2)["not_run"]
    assert run(rows[2])["not_run"].startswith("ValueError: invalid literal")
    assert run(accelerator.Row("", 3, int))["not_run"] == "takes about 3 s, and 2 s were left"


def test_real_sizes_are_the_published_ones(monkeypatch):
    case = real_sizes.accelerator_cases()[0]
    assert case.guided and case.model == "Stable Diffusion 1.5"
    counted = real_sizes.count(case)
    assert counted["operations"] == pytest.approx(0.8e12, rel=0.02)
    assert counted["parameters"] == pytest.approx(0.86e9, rel=0.01)
    needed = f"not run: needs {2 * counted['parameters'] / 2**30:.1f} GiB for its weights"
    assert real_sizes.obstacle(case, counted, "cuda", memory=1.0) == needed
    assert real_sizes.obstacle(case, counted, "cuda", memory=2.0) is None


def shipped(model: str, method: str) -> GASScheduler | SDMScheduler:
    scheduler_class = SDMScheduler if method == "sdm" else GASScheduler
    return scheduler_class.from_pretrained(fits.SHIPPED / model / method)


def test_transfer(monkeypatch):
    """With the shipped solvers. Those of emoji serve also with half of the LoRA, and those of digits do not."""
    models = (transfer.EMOJI, transfer.HALF, transfer.DIGITS)
    constants(monkeypatch, transfer, MODELS={model.name: model for model in models})
    constants(monkeypatch, transfer, GOOD=1.05)
    constants(monkeypatch, transfer, distilled=lambda model, n, repeat: shipped(model.teacher, "gs"))
    for name in ("text-to-emoji", "text-to-digits"):
        monkeypatch.setitem(fits.FITS, name, replace(fits.FITS[name], num_judged=4))
    argv = ["transfer.py", "--models", transfer.EMOJI.name, transfer.HALF.name]
    monkeypatch.setattr(sys, "argv", argv)
    rows = {(row["model"], transfer.label(row)): row for row in results(transfer)}
    for model in argv[2:]:
        distances = {label: row["distance"] for (name, label), row in rows.items() if name == model and "steps" in row}
        assert min(distances, key=distances.__getitem__) == "GS of text-to-emoji"
        assert distances["GS of text-to-digits"] > 2 * distances["GS of text-to-emoji"]
        assert all(0 <= row["named"] <= 1 for (name, _), row in rows.items() if name == model)
    assert rows["text-to-emoji", "GS of text-to-digits"]["more_than_own"] > 0
    assert rows["text-to-emoji", "GS of text-to-emoji"]["more_than_own"] == 0
    assert "more_than_own" not in rows[transfer.HALF.name, "GS of text-to-emoji"]  # no fit was made for it


def test_a_solver_of_another_model_gets_the_settings_of_the_pipeline():
    digits = report.load_teacher("text-to-digits").pipe
    learned = shipped("text-to-emoji", "gs")
    solver = transfer.for_pipeline(learned, digits)
    assert learned.config.prediction_type == "v_prediction" and solver.config.prediction_type == "epsilon"
    assert solver.solvers == learned.solvers
    calibrated = shipped("text-to-emoji", "sdm")
    plans = transfer.for_pipeline(calibrated, digits)
    assert plans.config.prediction_type == "epsilon" and plans.plans == calibrated.plans


def test_the_table_of_transfer_is_relative_to_the_best_of_each_model():
    def row(model, method, source, distance, named):
        measured = {"distance": distance, "distance_error": 0.02, "scheduler": "DDIM", "named": named}
        return {"model": model, "steps": 4, "method": method, **({"source": source} if source else {}), **measured}

    rows = [{"model": "a", "method": "teacher", "named": 1.0}, row("a", quality.BEST, None, 0.4, 0.25)]
    rows += [
        row("a", "GS", "a", 0.1, 0.75),
        row("a", "GS", "b", 0.6, 0.5),
        {"model": "b", "method": "teacher", "named": None},
    ]
    rows += [row("b", quality.BEST, None, 0.2, None), row("b", "GS", "a", 0.1, None), row("b", "GS", "b", 0.02, None)]
    lines = transfer.table(rows).splitlines()
    assert lines[0] == "| solver, 4 evaluations | a | b |"
    assert lines[3:5] == [
        "| GS of a | **0.250 ± 0.050** | 0.500 ± 0.100 |",
        "| GS of b | 1.500 ± 0.050 | **0.100 ± 0.100** |",
    ]
    assert lines[6] == "| named right, 4 evaluations | a |"
    assert lines[8:] == [
        "| teacher | 100.0% |",
        "| best of Diffusers | 25.0% |",
        "| GS of a | 75.0% |",
        "| GS of b | 50.0% |",
    ]


def wheel_of_galaxies(monkeypatch, output) -> list[np.ndarray]:
    """Writes a small network of one block that adds nothing, in place of the one for HSC, and returns its arrays."""
    rng = np.random.default_rng(0)
    shapes = [(6, 2, 4, 4), (6, 1, 1), (1, 6, 4, 4), (1, 1, 1)]
    block = [(5, 4), (5,), (4, 5), (4,), (5, 6), (5,), (6, 5), (6,), (6, 4), (6, 4), (4, 6), (4, 6)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in [*shapes, *block, (6, 4), (6, 4)]]
    for position in (6, 7, 10, 11):
        arrays[position][...] = 0
    file = io.BytesIO()
    for array in [*arrays, np.float32(galaxies.TIMES)]:
        np.save(file, array, allow_pickle=False)
    wheel = output / ".galaxies" / galaxies.WHEEL
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("galaxygrad/eqx_hsc_ScoreNet32.eqx", file.getvalue())
    monkeypatch.setattr(galaxies, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return arrays


def test_networks_of_galaxies_are_read_from_the_wheel(monkeypatch, output):
    """The patches, the norm, and the blocks of pixels are as the file orders them."""
    arrays, rng = wheel_of_galaxies(monkeypatch, output), np.random.default_rng(1)
    pipe, x, timestep = galaxies.load_pipeline(), rng.normal(size=(2, 1, 8, 8)).astype(np.float32), 249
    with_time = np.concatenate([x, np.full_like(x, 0.25)], axis=1).reshape(2, 2, 2, 4, 2, 4)
    patches = np.einsum("bcyixj,dcij->bdyx", with_time, arrays[0]).reshape(2, 6, 4) + arrays[1].reshape(6, 1)
    mean, deviation = (f(patches, axis=(1, 2), keepdims=True) for f in (np.mean, np.std))
    states = (patches - mean) / deviation * arrays[-2] + arrays[-1]
    score = np.einsum("bcyx,dcij->bdyixj", states.reshape(2, 6, 2, 2), arrays[2][:, :, ::-1, ::-1]).reshape(x.shape)
    expected = -math.sqrt(1 - math.exp(-2.5)) * (score + arrays[3])
    found = pipe.unet(torch.from_numpy(x), timestep).sample.numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert pipe.scheduler.alphas_cumprod[timestep].item() == pytest.approx(math.exp(-2.5), rel=1e-4)
    assert pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)


@pytest.fixture
def small_series(monkeypatch, tmp_path) -> time_series.ImputationNetwork:
    """A small network and the records of four patients, as the benchmark downloads them. All know 4 of 12 values."""
    torch.manual_seed(0)
    network = time_series.ImputationNetwork(3, 2, 8, 8, 2).eval()
    weights = {
        f"{'' if name.startswith('embed') else 'diffmodel.'}{name}": x for name, x in network.state_dict().items()
    }
    torch.save(weights, tmp_path / "weights.pth")
    lines = ["Time,Parameter,Value", "00:00,Weight,-1", "00:10,HR,0", *(f"0{h}:30,HR,{h}" for h in range(5))]
    lines += [f"0{h}:00,pH,{7 + h}" for h in range(3)]
    urls = [(tmp_path / f"{patient}.txt") for patient in range(4)]
    for path in urls:
        path.write_text("\n".join([*lines, f"03:00,K,{path.stem}", ""]))
    hashes = [
        hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
        for paths in ([tmp_path / "weights.pth"], urls)
    ]
    constants(monkeypatch, time_series, WEIGHTS=(tmp_path / "weights.pth").as_uri(), WEIGHTS_SHA256=hashes[0])
    constants(monkeypatch, time_series, RECORDS=f"{tmp_path.as_uri()}/{{}}.txt", RECORDS_SHA256=hashes[1])
    constants(monkeypatch, time_series, PATIENTS=range(4), NUM_FITTED=2, NUM_HOURS=4, NUM_KNOWN=4)
    constants(monkeypatch, time_series, MEASUREMENTS={"HR": (1, 2), "pH": (7, 1), "K": (0, 1)})
    return network


def test_time_series(monkeypatch, small_series):
    # The output of this network hardly depends on the last time, whose offset no fit determines. The solver is read again nevertheless.
    constants(monkeypatch, time_series, STEPS=(3,), NUM_SCREENED=2, DISTILLATION_SAMPLES=10, MOST_EVALUATIONS=1400)
    constants(
        monkeypatch,
        time_series,
        CALIBRATION_SAMPLES=2,
        MOST_CALIBRATION_EVALUATIONS=600,
        PICTURED={"HR": "rate"},
        PICTURED_STEPS=3,
    )
    (rows,) = results(time_series).values()
    assert [row["method"] for row in rows] == ["best of Diffusers", "SDM as it comes", "SDM, calibrated", "GS"]
    best, _, sdm, gs = (row["distance"] for row in rows)
    assert 0 < gs < best and 0 < sdm < best
    assert all(row["score"] == pytest.approx(row["teacher_score"], rel=0.1) for row in rows)


def test_time_series_are_read_and_filled_in(monkeypatch, small_series, output):
    known, measured = time_series.load_patients()
    assert measured[1, 0].tolist() == [-0.5, 0, 0.5, 1]  # the last value of an hour, and none of the fifth
    assert measured[3, 1, :3].tolist() == [0, 1, 2] and measured[3, 2, 3] == 3 and measured[3, 2, :3].isnan().all()
    is_known = known.isfinite()
    assert (is_known.flatten(1).sum(1) == 4).all() and torch.equal(known[is_known], measured[is_known])

    pipe = time_series.load_pipeline()
    filled = pipe(known, 2, [torch.Generator().manual_seed(i) for i in range(4)])
    assert torch.equal(filled[is_known], known[is_known]) and filled.isfinite().all()
    # Noise that is predicted between two times is near the mean of that at both.
    sample = torch.randn(4, 8)
    at = {t: pipe.network(sample, t, known) for t in (20, 20.5, 21)}
    apart = (at[20] - at[21]).abs().max()
    assert (at[20.5] - (at[20] + at[21]) / 2).abs().max() < 0.1 * apart
    # What one patient is filled in with depends on no other.
    torch.testing.assert_close(pipe.network(sample[2:3], 20, known[2:3]), at[20][2:3])

    (output / ".time_series" / "model.pth").unlink()
    monkeypatch.setattr(time_series, "WEIGHTS_SHA256", "another")
    with pytest.raises(OSError, match="hash differs"):
        time_series.load_pipeline()
