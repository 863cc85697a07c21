"""The converters on files in the layouts of the papers' code."""

import io
import json
import math
import pickle
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler, EDMDPMSolverMultistepScheduler
from official_files import GOLDEN, Reduced, edm_case_snapshot, edm_reference, edm_weights, r3gan_snapshot, written
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffusers_gas import EDMPipeline, GASScheduler
from diffusers_gas.commands import convert as convert_command
from diffusers_gas.commands.arguments import PipelineSettings
from diffusers_gas.distillation.discriminator import R3GANDiscriminator


FORMATS = ("gas", "edm", "r3gan")
SCRIPTS = {
    "gas": "convert_official_checkpoint.py",
    "edm": "convert_edm_checkpoint.py",
    "r3gan": "convert_r3gan_checkpoint.py",
}
OFFICIAL = GOLDEN / "official_format_n5.pt"


def convert(format: str, checkpoint: Path, output_dir: Path, *arguments: str) -> Path:
    convert_command.main([format, "--checkpoint", str(checkpoint), "--output_dir", str(output_dir), *arguments])
    return output_dir


# Training checkpoints of GS / GAS


def toy_noise(x: Tensor, timestep: Tensor) -> Tensor:
    """The noise prediction of tests/golden/README.md."""
    tau = timestep / 1000
    return 0.8 * torch.sin(1.3 * x + 2 * tau) + 0.3 * x * torch.cos(3 * tau)


def sample(scheduler: GASScheduler, x: Tensor, num_inference_steps: int) -> Tensor:
    scheduler.set_timesteps(num_inference_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(toy_noise(x, t.to(x.dtype)), t, x).prev_sample
    return x


def test_official_checkpoint_samples_as_published(tmp_path, capsys):
    expected = load_file(GOLDEN / "official_format_n5_expected.safetensors")
    folder = convert("gas", OFFICIAL, tmp_path / "scheduler")
    printed = capsys.readouterr().out
    for text in ("5 steps, order 5, training step 40", str(folder), "GASScheduler.from_pretrained"):
        assert text in printed
    scheduler = GASScheduler.from_pretrained(folder)
    assert list(scheduler.solvers) == [5]
    solver = scheduler.solvers[5]
    torch.testing.assert_close(solver.times(), expected["t_steps"], rtol=0, atol=1e-9)
    torch.testing.assert_close(solver.timestep_offsets.data.float(), expected["ema.t_couple"], rtol=0, atol=0)
    for i in range(5):
        assert torch.equal(solver.data_coefficients[:, i].float(), expected[f"ema.c{i + 1}_diff"])
        assert torch.equal(solver.state_coefficients[:, i].float(), expected[f"ema.a{i + 1}_diff"])
    result = sample(scheduler, expected["x_T"], 5)
    assert (result - expected["x_final"]).abs().max() < 1e-5 * expected["x_final"].abs().max()


def official(order: int = 4, n: int = 4, **changes: Any) -> dict[str, Any]:
    """A checkpoint with weights that say where they came from."""
    names = ["mu_logit", "t_couple", *(f"{kind}{i}_diff" for i in range(1, order + 1) for kind in "ca")]
    weights = [torch.full((n - (name == "mu_logit"),), 0.01 * k) for k, name in enumerate(names)]
    ema = {"decay": 0.999, "num_updates": 3, "shadow_params": weights, "collected_params": None}
    return {"ema": ema, "model": [torch.nn.Parameter(w + 1) for w in weights], "optim": {}, "step": 7} | changes


def saved(folder: Path, checkpoint: Any, name: str = "checkpoint.pt") -> Path:
    torch.save(checkpoint, folder / name)
    return folder / name


def test_several_official_checkpoints_make_one_folder(tmp_path):
    paths = [saved(tmp_path, official(order, n), f"{n}.pt") for n, order in ((4, 4), (6, 3))]
    convert("gas", paths[0], tmp_path / "one")
    arguments = ["--checkpoint", *map(str, paths), "--output_dir", str(tmp_path / "both")]
    convert_command.main(["gas", *arguments])
    scheduler = GASScheduler.from_pretrained(tmp_path / "both")
    assert sorted(scheduler.solvers) == [4, 6]
    solver = scheduler.solvers[6]
    assert solver.order == 3 and solver.theory_orders.tolist() == [1, 2, 3, 3, 3, 3]
    torch.testing.assert_close(
        solver.data_coefficients[0].data, torch.tensor([0.02, 0.04, 0.06]).double(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        solver.state_coefficients[0].data, torch.tensor([0.03, 0.05, 0.07]).double(), rtol=1e-6, atol=0
    )
    assert solver.provenance == {"converted_from": "6.pt", "training_step": 7}
    with pytest.raises(ValueError, match="4 steps, as another"):
        convert_command.main(["gas", "--checkpoint", *map(str, [*paths, paths[0]]), "--output_dir", "x"])


def test_the_schedule_of_an_official_checkpoint(tmp_path):
    path = saved(tmp_path, official())
    scheduler = GASScheduler.from_pretrained(convert("gas", path, tmp_path / "sd"))
    values = [scheduler.config[name] for name in ("beta_start", "beta_end", "beta_schedule", "t_end")]
    assert values == [0.00085, 0.012, "scaled_linear", 1e-3]

    DDIMScheduler(beta_end=0.015, prediction_type="v_prediction").save_pretrained(tmp_path / "ddim")
    for name in ("ddim", "ddim/scheduler_config.json"):
        arguments = ["--scheduler_config", str(tmp_path / name), "--t_end", "2e-3"]
        scheduler = GASScheduler.from_pretrained(convert("gas", path, tmp_path / f"from_{len(name)}", *arguments))
        assert (scheduler.config.beta_end, scheduler.config.prediction_type) == (0.015, "v_prediction")
        assert scheduler.config.t_end == scheduler.solvers[4].t_end == 2e-3

    EDMDPMSolverMultistepScheduler().save_pretrained(tmp_path / "edm_teacher")
    arguments = ["--scheduler_config", str(tmp_path / "edm_teacher"), "--t_end", "1e-4"]
    folder = convert("gas", path, tmp_path / "edm", *arguments)
    scheduler = GASScheduler.from_pretrained(folder)
    assert scheduler.config.sigma_data == EDMDPMSolverMultistepScheduler().config.sigma_data
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[0] > 152 and scheduler.sigmas[-1] == pytest.approx(0.00318, rel=1e-3)

    folder = convert("gas", path, tmp_path / "ms", "--parameterization", "linear_multistep")
    assert GASScheduler.from_pretrained(folder).solvers[4].parameterization == "linear_multistep"


def damaged_ema(**changes: Any) -> dict[str, Any]:
    weights = official()["ema"]["shadow_params"]
    for position, weight in changes.pop("at", {}).items():
        weights[position] = weight
    return official(ema={"shadow_params": weights[: changes.pop("length", None)]} | changes)


@pytest.mark.parametrize(
    "checkpoint, message",
    [
        ({"model": []}, r"no averaged weights.*\['model'\]"),
        ([torch.ones(2)], "no averaged weights.*list"),
        (official(ema={"decay": 0.9}), "no averaged weights"),
        (damaged_ema(length=9), "two tensors and two more for each order"),
        (damaged_ema(at={0: torch.ones(4)}), r"'mu_logit' should be of shape \(3,\), got \(4,\)"),
        (damaged_ema(at={5: torch.ones(3)}), r"'a2_diff' should be of shape \(4,\), got \(3,\)"),
        (damaged_ema(at={4: torch.tensor([1.0, math.nan, 0, 0])}), "'c2_diff' should be a tensor of finite numbers"),
        (damaged_ema(at={4: 3}), "'c2_diff' should be a tensor"),
    ],
)
def test_damaged_official_checkpoints(tmp_path, checkpoint, message):
    path = saved(tmp_path, checkpoint)
    with pytest.raises(ValueError, match=message) as error:
        convert("gas", path, tmp_path / "out")
    assert str(path) in str(error.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_bad_schedule_files(tmp_path):
    path = saved(tmp_path, official())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config.json.* is not a valid JSON file"):
        convert("gas", path, tmp_path / "out", "--scheduler_config", f"{tmp_path}/config.json")


# EDM's networks


CASES, _ = edm_reference()


@pytest.mark.parametrize("name", CASES)
def test_edm_snapshot_becomes_a_pipeline(tmp_path, capsys, name):
    case = CASES[name]
    path = written(tmp_path, edm_case_snapshot(case))
    folder = convert("edm", path, tmp_path / "pipeline")
    printed = capsys.readouterr().out
    for text in ("M weights", "3 x 8 x 8", str(folder), "from_pretrained"):
        assert text in printed
    pipe = PipelineSettings(pretrained_model_name_or_path=str(folder)).load_pipeline(torch.device("cpu"))
    assert type(pipe) is EDMPipeline and pipe.unet.config.architecture in printed
    assert (pipe.unet.config.num_class_embeds == 3) == ("3 classes" in printed)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, num_inference_steps=3, output_type="pt").images
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    assert (pipe.scheduler.config.sigma_min, pipe.scheduler.config.sigma_max) == (0.002, 80.0)
    assert (folder / "model_index.json").exists() and not list(tmp_path.glob("*.partial*"))


def changed(case: str, **changes: Any) -> bytes:
    return edm_case_snapshot(CASES[case], **changes)


def weights(case: str, without: str = "", **more: Tensor) -> dict[str, Tensor]:
    """The weights of a case with some more, of which names have `__` for dots, or without one."""
    tensors = edm_weights(CASES[case]["layout"])
    if without:
        del tensors[without]
    return tensors | {name.replace("__", "."): tensor for name, tensor in more.items()}


def arguments(case: str, without: str = "", **more: Any) -> dict[str, Any]:
    given = CASES[case]["arguments"] | more
    given.pop(without, None)
    return given


# As long as 2^100 items, for those that go through all of them.
BRANCHING: tuple = ()
for _ in range(100):
    BRANCHING = (BRANCHING, BRANCHING)

DAMAGED_EDM = {
    "no network": (lambda: pickle.dumps({"G_ema": 1}), r"no network 'ema', only \['G_ema'\]"),
    "a list": (lambda: pickle.dumps([1]), "no network 'ema', only list"),
    "unknown wrapper": (lambda: changed("ddpmpp", wrapper="EDM2Precond"), "EDM2Precond, not an EDMPrecond"),
    "unknown network": (lambda: changed("ddpmpp", model="UNet"), "is a UNet, not one of"),
    "missing": (
        lambda: changed("ddpmpp", tensors=weights("ddpmpp", "enc.8x8_block0.norm0.weight")),
        r"missing tensors \['enc.8x8_block0.norm0.weight'\], unexpected tensors \[\]",
    ),
    "unexpected": (
        lambda: changed("ddpmpp", tensors=weights("ddpmpp", enc__8x8_block0__more__weight=torch.ones(1))),
        r"missing tensors \[\], unexpected tensors \['enc.8x8_block0.more.weight'\]",
    ),
    "misshapen": (
        lambda: changed("adm_classes", tensors=weights("adm_classes", dec__4x4_in0__qkv__weight=torch.ones(7, 2))),
        r"'dec.4x4_in0.qkv.weight' should be of shape \(384, 128, 1, 1\), got \(7, 2\)",
    ),
    "labels": (
        lambda: changed("ddpmpp_classes", tensors=weights("ddpmpp_classes", "map_label.bias")),
        r"missing tensors \['map_label.bias'\]",
    ),
    "infinite": (
        lambda: changed("ddpmpp", tensors=weights("ddpmpp", map_layer0__bias=torch.full((64,), math.inf))),
        "'map_layer0.bias' should be a tensor of finite numbers",
    ),
    "filter": (
        lambda: changed(
            "ddpmpp", tensors=weights("ddpmpp", enc__4x4_down__conv0__resample_filter=torch.ones(1, 1, 2, 2))
        ),
        r"'enc.4x4_down.conv0.resample_filter' is not the filter \[1, 1\]",
    ),
    "other depth": (
        lambda: changed("ddpmpp", arguments=arguments("ddpmpp", num_blocks=2)),
        r"missing tensors \['dec.4x4_block2.affine.bias'|should be of shape",
    ),
    "default depth": (
        lambda: changed("ddpmpp", arguments=arguments("ddpmpp", without="num_blocks")),
        r"missing tensors|should be of shape",
    ),
    "other encoder": (
        lambda: changed("ddpmpp", arguments=arguments("ddpmpp", encoder_type="skip")),
        r"neither DDPM\+\+, NCSN\+\+ nor ADM",
    ),
    "unknown argument": (
        lambda: changed("ddpmpp", arguments=arguments("ddpmpp", without="img_resolution", xi=3)),
        r"unknown arguments \['xi'\] and lacks \['img_resolution'\]",
    ),
    "strange argument": (
        lambda: changed("ddpmpp", arguments=arguments("ddpmpp", model_channels="16")),
        "model_channels = '16', of another type than 128",
    ),
    "another preconditioning": (lambda: changed("ddpmpp", wrapper="VPPrecond"), "VPPrecond, not an EDMPrecond"),
    "tensors for numbers": (
        lambda: changed("ddpmpp", sigma_data=[torch.ones(2)]),
        "sigma_data = .*not a positive number",
    ),
    "data that nothing may hash or print whole": (
        lambda: changed("ddpmpp", arguments=arguments("ddpmpp", resample_filter=[BRANCHING, BRANCHING])),
        r"resample_filter = .*of another type than \[1, 1\]",
    ),
    "sigma_data": (lambda: changed("ddpmpp", sigma_data="half"), "sigma_data = 'half'"),
}


@pytest.mark.parametrize("name", DAMAGED_EDM)
def test_damaged_edm_snapshots(tmp_path, name):
    build, message = DAMAGED_EDM[name]
    path = written(tmp_path, build())
    with pytest.raises(ValueError, match=message) as error:
        convert("edm", path, tmp_path / "out")
    assert str(path) in str(error.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_default_arguments_are_left_out_by_snapshots(tmp_path):
    """`init_kwargs` has only what was passed: here nothing that is a default of NCSN++'s and DDPM++'s common class."""
    case = CASES["ddpmpp"]
    defaults = {"embedding_type", "encoder_type", "decoder_type", "resample_filter", "channel_mult_noise", "label_dim"}
    given = {name: value for name, value in case["arguments"].items() if name not in defaults}
    for name, arguments in (("without", given), ("with", given | {"embedding_type": "positional", "label_dim": 0})):
        path = written(tmp_path, edm_case_snapshot(case, arguments=arguments))
        pipe = EDMPipeline.from_pretrained(convert("edm", path, tmp_path / name))
        assert pipe.unet.config.architecture == "ddpm++"


# R3GAN's discriminator


@pytest.fixture(scope="module")
def r3gan():
    with safe_open(GOLDEN / "r3gan_reference.safetensors", framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    state = {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")}
    return config, state, tensors


@pytest.mark.parametrize("package", ["R3GAN", "BaselineGAN"])
def test_r3gan_snapshot_becomes_a_discriminator(tmp_path, capsys, r3gan, package):
    config, state, tensors = r3gan
    content = r3gan_snapshot({name: value.float() for name, value in state.items()}, package)
    folder = convert("r3gan", written(tmp_path, content), tmp_path / "discriminator")
    printed = capsys.readouterr().out
    for text in ("3 x 16 x 16", str(folder)):
        assert text in printed
    network = R3GANDiscriminator.from_pretrained(folder)
    assert list(network.config.widths) == config["WidthPerStage"]
    assert list(network.config.cardinalities) == config["CardinalityPerStage"]
    assert list(network.config.blocks_per_stage) == config["BlocksPerStage"]
    with torch.no_grad():
        logits = network.double()(tensors["input"])
    # The reference's weights are float64.
    assert (logits - tensors["logits"]).abs().max() < 1e-6 * tensors["logits"].abs().max()


def test_r3gan_weights_of_mixed_precision(tmp_path, r3gan):
    _, state, tensors = r3gan
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    mixed = {name: value.to(dtypes[k % 3]) for k, (name, value) in enumerate(state.items())}
    exact = {name: value.to(torch.float64) for name, value in mixed.items()}
    mixed |= {name: value for name, value in state.items() if name.endswith("Kernel")}
    folder = convert("r3gan", written(tmp_path, r3gan_snapshot(mixed)), tmp_path / "out")
    network = R3GANDiscriminator.from_pretrained(folder)
    assert network.dtype == torch.float32
    name = "MainLayers.2.Layers.1.LinearLayer2.Layer.weight"
    assert torch.equal(network.stages[2][1].conv2.weight.double(), exact[name])
    with torch.no_grad():
        logits = network.double()(tensors["input"])
    assert (logits - tensors["logits"]).abs().max() < 0.05 * tensors["logits"].abs().max()


def test_class_conditional_r3gan(tmp_path, r3gan):
    _, state, _ = r3gan
    last = "MainLayers.2.Layers.2.LinearLayer.weight"
    conditional = {name: value.float() for name, value in state.items()}
    conditional[last] = torch.randn(5, conditional[last].shape[1])
    conditional["EmbeddingLayer.weight"] = torch.randn(5, 10)
    path = written(tmp_path, r3gan_snapshot(conditional))
    mean = (
        R3GANDiscriminator.from_pretrained(convert("r3gan", path, tmp_path / "mean")).stages[2][2].linear.weight.data
    )
    torch.testing.assert_close(mean[0], conditional["EmbeddingLayer.weight"].mean(1) @ conditional[last])


def test_damaged_r3gan_snapshots(tmp_path, r3gan):
    _, state, _ = r3gan
    without = {name: value for name, value in state.items() if name != "ExtractionLayer.Layer.weight"}
    for content, message in (
        (pickle.dumps({"ema": 1}), r"no discriminator 'D', only \['ema'\]"),
        (r3gan_snapshot(state, D=None), "no discriminator 'D'"),
        (r3gan_snapshot(without), "ExtractionLayer.Layer.weight"),
    ):
        path = written(tmp_path, content)
        with pytest.raises(ValueError, match=message) as error:
            convert("r3gan", path, tmp_path / "out")
        assert str(path) in str(error.value)
        assert sorted(tmp_path.iterdir()) == [path]


# All of them


def hostile(kind: str, trace: Path) -> bytes:
    call = Reduced(exec, f"open({str(trace)!r}, 'w')")
    if kind == "edm":
        return edm_case_snapshot(CASES["ddpmpp"], more=call)
    if kind == "r3gan":
        return r3gan_snapshot({"ExtractionLayer.Layer.weight": torch.ones(1, 1, 1, 1)}, augment_pipe=call)
    stream = io.BytesIO()
    torch.save(official(step=call), stream)
    return stream.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_hostile_files_run_nothing_and_leave_nothing(tmp_path, kind):
    trace = tmp_path / "trace"
    path = written(tmp_path, hostile(kind, trace))
    with pytest.raises(ValueError, match="exec"):
        convert(kind, path, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", FORMATS)
def test_an_output_folder_with_content_is_left_alone(tmp_path, kind, r3gan):
    contents = {"edm": edm_case_snapshot(CASES["ddpmpp"]), "r3gan": r3gan_snapshot(r3gan[1])}
    path = saved(tmp_path, official()) if kind == "gas" else written(tmp_path, contents[kind])
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        convert(kind, path, output)
    assert [file.name for file in output.iterdir()] == ["mine.txt"]
    (output / "mine.txt").unlink()
    convert(kind, path, output)  # an empty one is filled
    assert any(output.iterdir())


@pytest.mark.parametrize("kind", FORMATS)
def test_an_interrupted_conversion_leaves_nothing(tmp_path, kind, r3gan, monkeypatch):
    contents = {"edm": edm_case_snapshot(CASES["ddpmpp"]), "r3gan": r3gan_snapshot(r3gan[1])}
    path = saved(tmp_path, official()) if kind == "gas" else written(tmp_path, contents[kind])
    saver = {"gas": GASScheduler, "edm": EDMPipeline, "r3gan": R3GANDiscriminator}[kind]
    save = saver.save_pretrained

    def interrupted(self, folder, **kwargs):
        save(self, folder, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(saver, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(kind, path, tmp_path / "new" / "out")
    assert {file.name for file in tmp_path.iterdir()} == {"new", path.name}
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("kind", FORMATS)
def test_errors_are_one_line_for_users(tmp_path, kind, monkeypatch):
    script = ROOT / "training" / SCRIPTS[kind]
    for checkpoint in ("missing.pkl", str(written(tmp_path, b"nothing of the kind"))):
        monkeypatch.setattr(
            sys, "argv", [script.name, "--checkpoint", checkpoint, "--output_dir", str(tmp_path / "out")]
        )
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(script), run_name="__main__")
        assert exit.value.code.startswith(f"{script.name}: ") and "\n" not in exit.value.code
        assert checkpoint in exit.value.code
