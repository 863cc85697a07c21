"""The training script as a user runs it: real processes, a small job on the shipped teacher."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from conftest import ROOT, TEACHER
from diffusers import DDPMPipeline, UNet2DModel
from PIL import Image
from scripts import TWO_PROCESSES, Script, launch, run_script
from tensorboard.backend.event_processing import event_accumulator

from diffusers_gas import GASScheduler
from diffusers_gas.commands import train as train_gas
from diffusers_gas.commands import train_report
from diffusers_gas.distillation.discriminator import R3GANDiscriminator
from diffusers_gas.distillation.distill import distill
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, SampleInputs
from diffusers_gas.utils.files import load_state


SCRIPT = ROOT / "training" / "train_gas.py"
SMALL = ["--num_teacher_samples", "32", "--num_validation_samples", "16", "--teacher_num_inference_steps", "10"]
SMALL += ["--num_compared_samples", "8", "--discriminator_width", "16", "--max_train_evaluations", "6000"]
# Where a comparison need not be good.
FEW = ["--num_teacher_samples", "8", "--num_validation_samples", "4", "--teacher_num_inference_steps", "4"]
FEW += ["--num_compared_samples", "2", "--discriminator_width", "16"]
# The default teacher's class with another setting.
OTHER_TEACHER = "DPMSolverMultistepScheduler:timestep_spacing=leading"
# The script chooses this model itself.
MODEL = ["--pretrained_model_name_or_path", str(TEACHER)]


@pytest.mark.slow
def test_main_job(tmp_path):
    arguments = [
        "--output_dir",
        str(tmp_path),
        "--num_inference_steps",
        "3",
        "4",
        "--max_train_iterations",
        "8",
        *SMALL,
    ]
    result = launch("accelerate.commands.launch --num_processes 1 --cpu", SCRIPT, *arguments)
    assert result.returncode == 0, result.stderr
    for expected in (
        "DDPMPipeline",
        "0.65 M weights",
        "at most 32 to learn from, 16 held out, 8 more for",
        "network evaluations",
    ):
        assert expected in result.stdout
    table = (tmp_path / "comparison.md").read_text()
    assert table.strip() in result.stdout
    results = json.loads((tmp_path / "comparison.json").read_text())
    for row in results["ours"]:
        rivals = [
            other["distance"]
            for other in results["others"]
            if other["num_inference_steps"] == row["num_inference_steps"]
        ]
        assert len(rivals) >= 6
        assert row["distance"] < min(rivals) and row["absolute"] > 0 and row["detail"] > 0
    picture = np.asarray(Image.open(tmp_path / "comparison.png"))
    assert picture.std() > 10

    scheduler = GASScheduler.from_pretrained(tmp_path / "scheduler")
    assert sorted(scheduler.solvers) == [3, 4]
    for n, fit in results["fits"].items():
        record = scheduler.solvers[int(n)].provenance
        assert record["teacher_num_inference_steps"] == 10 and record["num_teacher_samples"] == 32
        assert fit.items() <= record.items()
        assert 0 < fit["distance"] < fit["initial_distance"] and fit["evaluations"] > 0

    # A second run adds a step count, keeps the others, and does not sample the teacher again.
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "teacher_samples").iterdir()}
    arguments[3:5] = ["5"]
    assert run_script(SCRIPT, *arguments).returncode == 0
    assert sorted(GASScheduler.from_pretrained(tmp_path / "scheduler").solvers) == [3, 4, 5]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "teacher_samples").iterdir()} == cached

    # Another teacher's solvers do not go into the same folder.
    other = run_script(SCRIPT, *arguments, "--teacher_num_inference_steps", "12")
    assert other.returncode != 0
    assert "3-step solver made with" in other.stderr and "--output_dir" in other.stderr


METHODS = {
    "several fits": ["--num_inference_steps", "3", "4", "--max_train_iterations", "1", "--report_to", "tensorboard"],
    "a teacher of two evaluations a step": [
        "--max_train_iterations",
        "0",
        "--teacher_scheduler",
        "HeunDiscreteScheduler",
    ],
    "nothing to compare": ["--max_train_iterations", "1", "--num_compared_samples", "0"],
    "adam": ["--optimizer", "adam", "--max_train_steps", "3", "--validation_steps", "2"],
    "gas": ["--loss", "gas", "--max_train_iterations", "1", "--max_train_steps", "2", "--gradient_checkpointing"],
}


@pytest.mark.parametrize(
    "name", [name if name == "adam" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_a_training_costs_what_it_says_and_less_than_announced(name, tmp_path, monkeypatch, capsys):
    """In evaluations that the network really made, none of them of more samples than asked for, no picture sampled twice."""
    sizes, own, pictured, sample_images = [], UNet2DModel.forward, [], train_report.sample_images

    def forward(network, sample, *args, **kwargs):
        sizes.append(len(sample))
        return own(network, sample, *args, **kwargs)

    def sampled(pipe, scheduler, num_inference_steps, *args):
        pictured.append((scheduler, num_inference_steps))
        return sample_images(pipe, scheduler, num_inference_steps, *args)

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    monkeypatch.setattr(train_report, "sample_images", sampled)
    arguments = ["--num_inference_steps", "3", "--num_teacher_samples", "24", "--num_validation_samples", "5"]
    arguments += ["--teacher_num_inference_steps", "4", "--num_compared_samples", "3", "--train_batch_size", "4"]
    train_gas.main([*MODEL, *arguments, *METHODS[name], "--discriminator_width", "16", "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    announced = sum(map(int, re.findall(r"at most (\d+)(?: network evaluations,| \(|\n)", printed)))
    said = sum(map(int, re.findall(r"(?:This solver cost |Cost: +)(\d+) network evaluations", printed)))
    assert max(sizes) == 4
    assert len({(id(scheduler), n) for scheduler, n in pictured}) == len(pictured)
    assert sum(sizes) <= said <= announced
    if name not in ("several fits", "gas"):  # whose fits share the teacher's samples
        assert sum(sizes) == said
    assert (tmp_path / "comparison.png").exists() == (name != "nothing to compare")


def test_interrupt_leaves_a_usable_solver(tmp_path):
    solver = tmp_path / "scheduler" / "4_steps.solver"
    with Script(SCRIPT, "--output_dir", tmp_path, "--num_inference_steps", "4", *SMALL) as script:
        script.wait_for(solver.exists)
        script.interrupt()
    assert script.returncode == 0, script.stderr
    assert "Interrupted: keeping the best solver so far." in script.stdout
    assert "relative to best" in script.stdout
    GASScheduler.from_pretrained(tmp_path / "scheduler").set_timesteps(4)


def test_a_finished_fit_is_left_as_it_is(tmp_path, capsys):
    """Also if a later fit of the same run was not finished. Under other limits another fit goes on from its solver."""
    arguments = [*MODEL, "--output_dir", str(tmp_path), *FEW, "--num_compared_samples", "0"]

    def run(steps, iterations):
        limits = ["--num_inference_steps", *steps.split(), "--max_train_iterations", str(iterations)]
        train_gas.main([*arguments, *limits])
        return GASScheduler.from_pretrained(tmp_path / "scheduler").solvers[3]

    first, again = run("3", 4), run("3 2", 4)
    assert (again.content(), again.provenance) == (first.content(), first.provenance)
    assert capsys.readouterr().out.count("3 steps: finished by an earlier run\n") == 1
    assert run("3", 5).provenance["evaluations"] > first.provenance["evaluations"]


@pytest.mark.parametrize("detail", [False, True])
def test_a_resumed_fit_keeps_its_phases_or_is_refused(tmp_path, monkeypatch, capsys, detail):
    checkpoint, save_state = tmp_path / "checkpoints" / "2_steps_gauss_newton.pt", train_gas.save_state

    def save(state, path):
        save_state(state, path)
        shutil.copy(path, tmp_path / "newest.pt")

    monkeypatch.setattr(train_gas, "save_state", save)
    arguments = [*MODEL, "--output_dir", str(tmp_path), "--num_inference_steps", "2", "--max_train_iterations", "4"]
    arguments += [*FEW, "--num_compared_samples", "0"]
    switch = {True: [], False: ["--no-detail"]}
    train_gas.main([*arguments, *switch[detail]])
    # As if the fit had been killed before its end.
    shutil.copy(tmp_path / "newest.pt", checkpoint)
    shutil.rmtree(tmp_path / "scheduler")
    others = {
        f"detail was {detail}, is {not detail}": switch[not detail],
        "first_inputs was .*": [*switch[detail], "--seed", "7"],
        "teacher_settings was .*": [*switch[detail], "--teacher_scheduler", OTHER_TEACHER],
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"{name}. Go on with the same"):
            train_gas.main([*arguments, *other])
    train_gas.main([*arguments, *switch[detail]])
    assert "2 steps: resumed after iteration 4\n" in capsys.readouterr().out


def test_killed_while_collecting_keeps_the_samples(tmp_path):
    folder = tmp_path / "teacher_samples"
    with Script(
        SCRIPT, "--output_dir", tmp_path, "--num_validation_samples", "2048", "--max_train_iterations", "1"
    ) as script:
        script.wait_for(lambda: len(list(folder.glob("*.safetensors"))) >= 2)
    assert len(list(folder.glob("*.safetensors"))) >= 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--pretrained_model_name_or_path", "{tmp}/nothing"], "nothing"),
        (["--teacher_scheduler", "BestScheduler"], "BestScheduler is neither a scheduler class"),
        (["--config", "{tmp}/config.yaml"], r"unknown arguments ['learning_speed']"),
        (["--pipeline_arguments", "{"], "--pipeline_arguments"),
        (["--num_inference_steps", "0"], "at least 1"),
        (["--prompts_file", "{tmp}/empty.txt"], "empty.txt is empty"),
        (["--seed", "49999"], "overlap the held-out ones"),
        (["--features", "lpips", "--loss", "l1"], "needs 'l2', not 'l1'"),
        (["--lr_scheduler", "piecewise_constant"], "invalid choice"),
        (["--loss", "gas", "--optimizer", "gauss_newton"], "needs `--optimizer adam`"),
        (["--loss", "gas", "--discriminator_size", "8"], "needs `--discriminator_features pixels`"),
        (["--initialize_from", "{tmp}/nothing"], "nothing"),
        (["--loss", "gas", "--discriminator_model_name_or_path", "{tmp}/small"], "(1, 16, 16), the teacher's are of"),
    ],
)
def test_bad_input(tmp_path, arguments, message, capsys):
    (tmp_path / "config.yaml").write_text("learning_speed: 3\n")
    (tmp_path / "empty.txt").write_text("\n")
    R3GANDiscriminator.for_samples((1, 16, 16), width=16).save_pretrained(tmp_path / "small")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    with pytest.raises((ValueError, OSError, SystemExit)) as caught:
        train_gas.main([*MODEL, *arguments, "--output_dir", str(tmp_path / "out"), *SMALL])
    assert message in f"{caught.value} {capsys.readouterr().err}"
    assert not list(tmp_path.glob("out/*/*_steps.*"))  # before a fit


def test_errors_are_one_line(tmp_path):
    result = run_script(
        SCRIPT, "--pretrained_model_name_or_path", str(tmp_path / "nothing"), "--output_dir", str(tmp_path)
    )
    assert result.returncode != 0
    assert "train_gas.py: " in result.stderr
    assert "Traceback" not in result.stderr


def test_published_set_ups_are_configs():
    """The paper's six, for GS and for GAS: parsed, with what differs between the two."""
    configs = sorted((ROOT / "training" / "configs").glob("*.yaml"))
    assert len(configs) == 6
    for config in configs:
        gs, gas = (train_gas.parse_args(["--config", str(config), *more]) for more in ([], ["--loss", "gas"]))
        assert gs.optimizer == gas.optimizer == "adam"
        assert gs.learning_rate == 1e-3 and gs.ema_decay == 0.999 and gs.max_grad_norm == 1
        assert gs.num_teacher_samples == 1400
        assert gas.num_teacher_samples == (1400 if config.stem == "cifar10" else 5000)
        assert gas.adversarial_weight == (0.1 if config.stem == "cifar10" else 1)
        assert (gs.loss, gs.features) in (("l2", "lpips"), ("l1", "states"))


@pytest.mark.slow
def test_configs_are_arguments(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("num_inference_steps: [3]\nmax_train_iterations: 1\nloss: l2\ngradient_checkpointing: true\n")
    arguments = ["train", *MODEL, "--config", str(config), "--loss", "l1", "--output_dir", str(tmp_path), *SMALL]
    result = launch("accelerate.commands.launch --num_processes 1 --cpu -m", "diffusers_gas", *arguments)
    assert result.returncode == 0, result.stderr
    assert "[3] steps, Gauss-Newton on the l1 distance" in result.stdout
    assert json.loads((tmp_path / "comparison.json").read_text())["arguments"]["gradient_checkpointing"] is True


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    """Each process samples its share of the teacher; the result is one folder that the main process wrote."""
    arguments = ["--output_dir", str(tmp_path), "--num_inference_steps", "3", "--max_train_iterations", "2", *SMALL]
    result = launch(TWO_PROCESSES, SCRIPT, *arguments, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    shards = list((tmp_path / "teacher_samples").glob("*.safetensors"))
    assert len(shards) == 3  # of learning, held-out and compared samples
    assert list(GASScheduler.from_pretrained(tmp_path / "scheduler").solvers) == [3]


@pytest.mark.slow
def test_a_lost_process_is_named_and_the_fit_goes_on(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--num_inference_steps", "3", *SMALL]
    command = [sys.executable, "-m", *TWO_PROCESSES.split(), str(SCRIPT), *arguments]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        checkpoint = tmp_path / "checkpoints" / "3_steps_gauss_newton.pt"
        while not checkpoint.exists():
            assert run.poll() is None, run.communicate()
            time.sleep(0.02)
        processes = [p for p in psutil.Process(run.pid).children(recursive=True) if str(tmp_path) in p.cmdline()]
        (lost,) = (p for p in processes if p.environ()["RANK"] == "1")
        lost.kill()
        _, errors = run.communicate(timeout=900)
    assert run.returncode != 0 and f"(pid: {lost.pid})" in errors and "SIGKILL" in errors
    result = run_script(SCRIPT, *arguments)  # one process goes on with the work of two
    assert result.returncode == 0, result.stderr
    assert "3 steps: resumed after iteration " in result.stdout
    assert list(GASScheduler.from_pretrained(tmp_path / "scheduler").solvers) == [3]
    assert not checkpoint.exists()


STARTED = """
import torch
from diffusers_gas.commands.processes import start_accelerator

print(start_accelerator().num_processes, "of", torch.get_num_threads(), "threads")
"""


def test_a_process_alone_has_all_cores_unless_somebody_chose(tmp_path, monkeypatch):
    """Whether Accelerate's launcher has started it shows in the environment, as does what it chose for want of a choice."""
    script = tmp_path / "script.py"
    script.write_text(STARTED)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_script(script).stdout == "1 of 1 threads\n"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert run_script(script).stdout == f"1 of {len(os.sched_getaffinity(0))} threads\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert run_script(script).stdout == "1 of 1 threads\n"  # as PyTorch has read it before


GAS = ["--loss", "gas", "--initialization", "theory", "--num_inference_steps", "3", "--max_train_steps", "6"]


def solver_of(folder):
    return GASScheduler.from_pretrained(folder / "scheduler").solvers[3]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path):
    """With the same number of samples per step."""
    arguments = [*GAS, "--train_batch_size", "4", "--output_dir", str(tmp_path / "two"), *SMALL]
    two = launch(TWO_PROCESSES, SCRIPT, *arguments, ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr
    assert "Processes: 2 on cpu" in two.stdout
    one = run_script(SCRIPT, *GAS, "--train_batch_size", "8", "--output_dir", str(tmp_path / "one"), *SMALL)
    assert one.returncode == 0, one.stderr
    solvers = [solver_of(tmp_path / name) for name in ("one", "two")]
    for (name, expected), found in zip(solvers[0].named_parameters(), solvers[1].parameters()):
        # Adam's steps are of 1e-3 whatever the gradient; float32 networks leave a thousandth of that.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=name)
    states = [load_state(tmp_path / name / "checkpoints" / "3_steps.pt") for name in ("one", "two")]
    for name, expected in states[0]["discriminator"].items():
        # Entries whose gradients are all but zero follow rounding, by some of Adam's six steps of 1e-4: few of them.
        difference = (states[1]["discriminator"][name] - expected).abs()
        assert (difference > 1e-5).double().mean() < 0.05, name
        assert difference.mean() < 1e-5, name


@pytest.mark.slow
def test_killed_three_times_and_resumed_is_the_uninterrupted_run(tmp_path):
    arguments = [
        *GAS,
        "--checkpointing_steps",
        "1",
        "--train_batch_size",
        "4",
        *SMALL,
    ]
    arguments[arguments.index("--max_train_steps") + 1] = "16"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script(SCRIPT, *arguments, "--output_dir", str(whole)).returncode == 0
    rng = np.random.default_rng(0)
    checkpoint = killed / "checkpoints" / "3_steps.pt"
    resumed = [*arguments, "--output_dir", str(killed)]
    reached = []
    for goal in (2, 5, 8):
        with Script(SCRIPT, *resumed) as script:
            script.wait_for(lambda goal=goal: checkpoint.exists() and load_state(checkpoint)["steps_done"] >= goal)
            time.sleep(rng.uniform(0, 0.2))
        reached.append(load_state(checkpoint)["steps_done"])
    assert 0 < reached[0] < reached[1] < reached[2] < 16
    result = run_script(SCRIPT, *resumed)
    assert result.returncode == 0, result.stderr
    assert f"resumed after optimizer step {reached[2]}" in result.stdout
    for expected, found in zip(solver_of(whole).parameters(), solver_of(killed).parameters()):
        assert torch.equal(found, expected)
    first, second = (load_state(folder / "checkpoints" / "3_steps.pt") for folder in (whole, killed))
    assert all(
        torch.equal(first["discriminator"][name], second["discriminator"][name]) for name in first["discriminator"]
    )


def test_adam_goes_on_with_its_own_work_only(tmp_path, monkeypatch):
    """A finished training is left as it is, a longer one counts what was before, and no other takes its solver."""

    def interrupted(*_):
        raise KeyboardInterrupt

    few = [
        "--num_teacher_samples",
        "4",
        "--num_validation_samples",
        "2",
        "--train_batch_size",
        "2",
        "--num_compared_samples",
        "0",
    ]
    few += ["--teacher_num_inference_steps", "5", "--optimizer", "adam", "--num_inference_steps", "3"]
    theory = ["--initialization", "theory", "--output_dir", str(tmp_path / "out")]

    def record() -> dict:
        return GASScheduler.from_pretrained(tmp_path / "out" / "scheduler").solvers[3].provenance

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_gas, "check_by_sampling", interrupted)
        train_gas.main([*MODEL, *few, *theory, "--max_train_steps", "2"])
    train_gas.main([*MODEL, *few, *theory, "--max_train_steps", "2"])
    first = record()
    assert first["sampled_distance"] == pytest.approx(first["distance"], rel=0.02)
    train_gas.main([*MODEL, *few, *theory, "--max_train_steps", "2"])
    assert record() == first
    train_gas.main([*MODEL, *few, *theory, "--max_train_steps", "3"])
    longer = record()
    assert longer["initial_distance"] == first["initial_distance"] and longer["distance"] != first["distance"]
    assert longer["evaluations"] > first["evaluations"]

    other = tmp_path / TEACHER.name
    pipe = DDPMPipeline.from_pretrained(TEACHER)
    with torch.no_grad():
        next(pipe.unet.parameters()).mul_(1.01)
    pipe.save_pretrained(other)
    of_others = {
        "initialize_from": [
            *MODEL,
            *theory,
            "--initialize_from",
            str(ROOT / "examples" / "solvers" / "digits" / "gs"),
        ],
        "weights": ["--pretrained_model_name_or_path", str(other), *theory],
        "seed": [*MODEL, *theory, "--seed", "7"],
        "teacher_settings": [*MODEL, *theory, "--teacher_scheduler", OTHER_TEACHER],
    }
    for name, arguments in of_others.items():
        with pytest.raises(ValueError, match=f"{name} was .*Go on with the same"):
            train_gas.main([*arguments, *few, "--max_train_steps", "3"])
    assert record() == longer


@pytest.mark.slow
def test_training_leaves_a_trail(tmp_path):
    """Trackers get losses; Ctrl-C keeps a solver and a checkpoint; other settings do not go on with it."""
    arguments = [
        *[
            "--optimizer",
            "adam",
            "--num_inference_steps",
            "3",
            "--report_to",
            "tensorboard",
            "--validation_steps",
            "4",
        ],
        *["--output_dir", str(tmp_path), "--train_batch_size", "4", "--gradient_checkpointing", *SMALL],
    ]
    checkpoint = tmp_path / "checkpoints" / "3_steps.pt"
    with Script(SCRIPT, *arguments, "--checkpointing_steps", "8") as script:
        script.wait_for(checkpoint.exists)
        script.interrupt()
    assert script.returncode == 0, script.stderr
    output = script.stdout
    assert "Adam on the l1, 10000 optimizer steps of 4 samples, from the published solver" in output
    assert "Interrupted: the same command goes on.\n" in output
    assert "relative to best" in output
    record = solver_of(tmp_path).provenance
    assert record["optimizer"] == "adam" and record["sampled_distance"] > 0

    log = event_accumulator.EventAccumulator(str(tmp_path / "logs" / "gas"))
    log.Reload()
    assert {"3_steps/loss/distillation", "3_steps/gradient_norm", "3_steps/validation/distance"} <= set(
        log.Tags()["scalars"]
    )
    assert len(log.Scalars("3_steps/loss/distillation")) >= 8

    other = run_script(SCRIPT, *arguments, "--learning_rate", "0.1")
    assert other.returncode != 0
    assert "learning_rate was 0.001, is 0.1" in other.stderr
    done = str(load_state(checkpoint)["steps_done"])
    finished = run_script(SCRIPT, *arguments, "--max_train_steps", done)
    assert finished.returncode == 0, finished.stderr


def test_a_gauss_newton_result_is_the_start_of_gas(tmp_path):
    arguments = [
        "--loss",
        "gas",
        "--num_inference_steps",
        "3",
        "--max_train_steps",
        "2",
        "--max_train_iterations",
        "1",
    ]
    arguments += [
        "--output_dir",
        str(tmp_path),
        "--train_batch_size",
        "8",
        "--reuse_fakes",
        "--ema_decay",
        "1",
        *FEW,
    ]
    result = run_script(SCRIPT, *arguments)
    assert result.returncode == 0, result.stderr
    assert "from the gauss_newton solver" in result.stdout
    start = GASScheduler.from_pretrained(tmp_path / "gauss_newton").solvers[3]
    moved = [
        (a - b).abs().max().item() for a, b in zip(start.parameters(), solver_of(tmp_path).parameters()) if a.numel()
    ]
    assert 0 < max(moved) < 5e-3  # two steps of Adam away, no more
    assert json.loads((tmp_path / "comparison.json").read_text())["arguments"]["optimizer"] == "adam"


@pytest.mark.slow
def test_a_discriminator_of_images_moves_the_solver_of_a_latent_pipeline(tmp_path, capsys):
    arguments = [
        "--pretrained_model_name_or_path",
        str(TEACHER.parent / "text-to-digits"),
        "--loss",
        "gas",
        "--initialization",
        "theory",
        "--max_train_steps",
        "1",
    ]
    arguments += ["--num_inference_steps", "3", "--train_batch_size", "4", "--num_teacher_samples", "4"]
    arguments += ["--num_validation_samples", "2", "--num_compared_samples", "2", "--teacher_num_inference_steps", "5"]
    arguments += ["--discriminator_features", "pixels", "--discriminator_size", "12", "--discriminator_width", "16"]
    gradients = []
    for weight in ("0", "1000"):
        train_gas.main([*arguments, "--adversarial_weight", weight, "--output_dir", str(tmp_path / weight)])
        assert "weights for (3, 12, 12)" in capsys.readouterr().out
        gradients.append([parameter.detach() for parameter in solver_of(tmp_path / weight).parameters()])
    # One step of Adam shows the signs of the gradients.
    assert any((plain - adversarial).abs().max() > 1e-3 for plain, adversarial in zip(*gradients) if plain.numel())


def test_other_features_and_weights_of_a_loss(tmp_path):
    arguments = ["--features", "pixels", "--num_inference_steps", "3", "--max_train_iterations", "1", *FEW]
    result = run_script(SCRIPT, *arguments, "--output_dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "Gauss-Newton on the l2 distance of pixels" in result.stdout
    assert solver_of(tmp_path).provenance["features"] == "pixels"


@pytest.mark.slow
def test_the_script_and_the_call_make_the_same_solver(digits, tmp_path):
    """One driver: the same starts, the same fit, the same record."""
    arguments = ["--num_teacher_samples", "16", "--num_validation_samples", "4", "--num_compared_samples", "4"]
    arguments += [
        "--teacher_num_inference_steps",
        "10",
        "--max_train_iterations",
        "4",
        "--num_inference_steps",
        "3",
        "4",
    ]
    train_gas.main([*MODEL, *arguments, "--output_dir", str(tmp_path)])
    found = GASScheduler.from_pretrained(tmp_path / "scheduler").solvers
    # The call holds the last fifth of its samples out, the script samples of other seeds.
    inputs = SampleInputs([*range(16), *range(EVALUATION_SEED, EVALUATION_SEED + 4)], [{}] * 20, {})
    settings = {"teacher_num_inference_steps": 10, "max_iterations": 4, "batch_size": 128}
    expected = distill(digits, [3, 4], inputs=inputs, **settings).solvers
    for n, solver in expected.items():
        for a, b in zip(solver.parameters(), found[n].parameters()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        records = [
            {name: value for name, value in provenance.items() if name != "seconds" and value is not None}
            for provenance in (solver.provenance, found[n].provenance)
        ]
        of_the_script = {"prompts_file", "fingerprint"}
        assert records[0] == {name: value for name, value in records[1].items() if name not in of_the_script}


def test_what_cannot_be_pictured_is_pushed_without_a_picture(tmp_path, monkeypatch, capsys):
    def no_picture() -> None:
        raise ValueError("No picture: nothing to see.")

    pushed = []
    monkeypatch.setattr(train_report, "figures", no_picture)
    monkeypatch.setattr(train_gas, "push_to_hub", lambda *arguments: pushed.append(arguments))
    monkeypatch.setattr(train_gas.TrainSettings, "create_repository", lambda *arguments: None)
    (tmp_path / "comparison.png").write_bytes(b"of an earlier run")
    arguments = ["--output_dir", str(tmp_path), "--num_inference_steps", "3", "--max_train_iterations", "0", *FEW]
    train_gas.main([*MODEL, *arguments, "--push_to_hub"])
    assert "No picture: nothing to see." in capsys.readouterr().out
    ((_, _, _, results, samples),) = pushed
    assert samples is None and "| 3 | GS (ours) |" in results and "same noise" not in results


@pytest.mark.parametrize("part", ["compare", "figures"])
def test_a_report_that_fails_costs_nothing_else(tmp_path, monkeypatch, capsys, part):
    def fail(*_, **__):
        raise RuntimeError("no such thing here")

    monkeypatch.setattr(train_report, part, fail)
    arguments = ["--output_dir", str(tmp_path), "--num_inference_steps", "3", "--max_train_iterations", "1", *FEW]
    train_gas.main([*MODEL, *arguments])
    assert sorted(GASScheduler.from_pretrained(tmp_path / "scheduler").solvers) == [3]
    name = {"compare": "table", "figures": "picture"}[part]
    printed = capsys.readouterr().out
    assert f"Warning: no {name} (RuntimeError: no such thing here)" in printed and printed.count("Warning") == 1
    assert (tmp_path / "comparison.md").exists() == (part != "compare")
    assert (tmp_path / "comparison.png").exists() == (part != "figures")


@pytest.mark.parametrize("part", ["log", "finish"])
def test_a_tracker_that_fails_costs_nothing_else(tmp_path, monkeypatch, capsys, part):
    def fail(*_, **__):
        raise ConnectionError("nobody listens")

    monkeypatch.setattr(TensorBoardTracker, part, fail)
    arguments = ["--output_dir", str(tmp_path), "--num_inference_steps", "3", "--max_train_iterations", "2", *FEW]
    train_gas.main([*MODEL, *arguments, "--report_to", "tensorboard"])
    assert sorted(GASScheduler.from_pretrained(tmp_path / "scheduler").solvers) == [3]
    assert (tmp_path / "comparison.md").exists()
    printed = capsys.readouterr().out
    assert "trackers (ConnectionError: nobody listens)" in printed and printed.count("Warning") == 1


def test_a_fit_that_adam_starts_from_has_room_for_iterations(tmp_path, monkeypatch):
    """The 512 held-out samples of Adam alone would take more evaluations than a fit by Gauss-Newton may."""
    judged_by = []
    monkeypatch.setattr(train_gas, "distill_solver", lambda *args, **_: judged_by.append(len(args[4])) or 1 / 0)
    words = ["--loss", "gas", "--output_dir", str(tmp_path), "--num_teacher_samples", "32", *MODEL]
    training = train_gas.Training(train_gas.parse_args([*words, "--teacher_num_inference_steps", "2"]))
    assert training.settings.num_validation_samples == 512
    with pytest.raises(ZeroDivisionError):
        train_gas.initial_solver(training, 4)
    assert judged_by == [32]
    training.teacher_evaluations = 50
    train_gas.most_evaluations_of_fit(training, 4)  # does not find the limit too low
