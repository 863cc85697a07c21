"""The trainings of the emoji teacher and its LoRA on a few synthetic pictures, and those that are shipped."""

import json
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, SchedulerMixin
from PIL import Image
from safetensors.torch import load_file
from scripts import Script, run_script

from diffusers_gas import GASScheduler
from diffusers_gas.papers.evaluation.feature_extractors import SmallClassifier


sys.path.append(str(ROOT / "examples" / "teachers"))
sys.path.append(str(ROOT / "examples" / "teachers" / "text-to-emoji"))
from emoji_data import GOOGLE, MAX_TOKENS, TWITTER, fetch, list_emoji, load_pictures, move, pictures_of, words_of
from teacher_training import encode, make_byte_pair_tokenizer


pytestmark = pytest.mark.slow

TEACHER = ROOT / "examples" / "teachers" / "text-to-emoji"
SCRIPT, LORA_SCRIPT = TEACHER / "train_teacher.py", TEACHER / "train_lora.py"
LORA_FILE = "pytorch_lora_weights.safetensors"
ENTRIES = [  # name, short name, subcategory, colour
    ("RED APPLE", "apple", "food-fruit", (255, 0, 0)),
    ("GREEN APPLE", "green_apple", "food-fruit", (0, 255, 0)),  # held out
    ("UPSIDE-DOWN FACE", "upside_down_face", "face-smiling", (255, 255, 0)),
    ("CAT FACE", "cat", "cat-face", (255, 128, 0)),
    ("CAT", "cat2", "animal-mammal", (128, 64, 0)),
    ("Norway Flag", "flag-no", "country-flag", (0, 0, 255)),
]


def package(folder: Path, vendor: str) -> Path:
    """A folder like a vendor's npm package, with a disc (Google) or a square in another colour for every emoji."""
    (folder / pictures_of(vendor)).mkdir(parents=True)
    entries, (y, x) = [], abs(np.mgrid[:64, :64] - 31.5)
    shape = x**2 + y**2 < 900 if vendor == GOOGLE else np.maximum(x, y) < 24
    for i, (name, short_name, subcategory, colour) in enumerate(ENTRIES):
        image = f"1f60{i}.png"
        drawn = np.dstack([np.full((64, 64), c) for c in colour] + [255 * shape])
        Image.fromarray(drawn.astype(np.uint8)).save(folder / pictures_of(vendor) / image)
        entry = {"name": name, "short_names": [short_name], "subcategory": subcategory, "image": image}
        entries.append({**entry, "unified": f"1F60{i}", "has_img_google": True, "has_img_twitter": True})
    (folder / "emoji.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(tmp_path_factory.mktemp("emoji") / "package", GOOGLE)


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(tmp_path_factory.mktemp("emoji") / "package", TWITTER)


def train(data: Path, output: Path, **options: object) -> Script:
    """The training, short, as a process that is still running."""
    options = {
        "data_dir": data,
        "output_dir": output,
        "max_train_steps": 8,
        "train_batch_size": 2,
        "autoencoder_train_steps": 3,
        "autoencoder_train_batch_size": 2,
        "classifier_train_steps": 3,
        "classifier_train_batch_size": 2,
        "lr_warmup_steps": 1,
        "num_sample_steps": 1,
        "num_judged_samples": 4,
        "checkpointing_steps": 2,
        **options,
    }
    return Script(SCRIPT, *words(options))


def train_lora(teacher: Path, data: Path, other_data: Path, output: Path, **options: object) -> Script:
    """The training of the LoRA, short, as a process that is still running."""
    options = {
        "teacher": teacher,
        "data_dir": other_data,
        "teacher_data_dir": data,
        "output_dir": output,
        "max_train_steps": 8,
        "train_batch_size": 2,
        "lr_warmup_steps": 1,
        "num_sample_steps": 1,
        "num_judged_samples": 4,
        "checkpointing_steps": 2,
        **options,
    }
    return Script(LORA_SCRIPT, *words(options))


def words(options: dict[str, object]) -> list[object]:
    return [word for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A teacher whose training nobody killed."""
    output = tmp_path_factory.mktemp("trained") / "teacher"
    with train(data, output) as script:
        assert script.wait().returncode == 0, script.stderr
    return output


def test_training_saves_a_complete_teacher(trained):
    files = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert {"samples.png", "prompts.txt", "pipeline_arguments.json", "classifier/config.json"} <= files
    assert (trained / "prompts.txt").read_text(encoding="utf-8").splitlines() == [
        "red apple",
        "upside-down face",
        "cat face",
        "cat",
    ]
    pipe = DiffusionPipeline.from_pretrained(trained)
    assert len(pipe("red apple", num_inference_steps=1, output_type="pt").images) == 1
    assert pipe.tokenizer("upside-down").input_ids[1:-1] == pipe.tokenizer("upside - down").input_ids[1:-1]


def test_a_killed_training_goes_on_as_if_it_had_not_been(data, trained, tmp_path):
    output, checkpoint = tmp_path / "teacher", tmp_path / "teacher.checkpoints" / "unet.pt"
    with train(data, output) as script:
        script.wait_for(checkpoint.exists)
        script.kill()
    assert not output.exists()
    with train(data, output) as script:
        assert script.wait().returncode == 0, script.stderr
        assert "3 of them are done" in script.stdout  # of the autoencoder
    weights = ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
    for name in [*weights, "text_encoder/model.safetensors", "classifier/diffusion_pytorch_model.safetensors"]:
        expected, actual = load_file(trained / name), load_file(output / name)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_other_settings_do_not_go_on_with_a_checkpoint(data, trained, tmp_path):
    checkpoints = shutil.copytree(f"{trained}.checkpoints", tmp_path / "checkpoints")
    with train(data, tmp_path / "teacher", checkpoint_dir=checkpoints, learning_rate=0.1) as script:
        assert script.wait().returncode == 1
        assert "another --checkpoint_dir" in script.stderr


@pytest.mark.parametrize("missing", ["emoji.json", str(pictures_of(GOOGLE))])
def test_a_folder_without_the_data_is_an_error(data, tmp_path, missing):
    folder = shutil.copytree(data, tmp_path / "package")
    shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
    with pytest.raises(ValueError, match=r"has no .*--data_dir"):
        fetch(folder)


def test_a_lora_is_trained_and_goes_on_after_it_was_killed(data, other_data, trained, tmp_path):
    """Its pictures are another vendor's, and the teacher stays as it is."""
    weights = []
    for name in ("killed", "whole"):
        output = tmp_path / name
        if name == "killed":
            with train_lora(trained, data, other_data, output) as script:
                script.wait_for((tmp_path / "killed.checkpoints" / "unet.pt").exists)
                script.kill()
            assert not output.exists()
        with train_lora(trained, data, other_data, output) as script:
            assert script.wait().returncode == 0, script.stderr
        assert ("of them are done" in script.stdout) == (name == "killed")
        assert "without: {" in script.stdout and (output / "samples.png").exists()
        weights.append(load_file(output / LORA_FILE))
    killed, whole = weights
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[name], whole[name]) and whole[name].dtype == torch.float16 for name in whole)
    pipe = DiffusionPipeline.from_pretrained(trained)
    call = {"num_inference_steps": 2, "output_type": "latent"}
    before = pipe("red apple", generator=torch.Generator().manual_seed(0), **call).images
    pipe.load_lora_weights(output)
    assert not torch.equal(pipe("red apple", generator=torch.Generator().manual_seed(0), **call).images, before)


def test_a_lora_needs_the_pictures_of_its_vendor(data, trained, tmp_path):
    with train_lora(trained, data, data, tmp_path / "lora") as script:
        assert script.wait().returncode == 1
        assert "emoji-datasource-twitter" in script.stderr and "Traceback" not in script.stderr


def test_without_npm_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    output = tmp_path / "teacher"
    script = run_script(SCRIPT, "--data_dir", tmp_path / "package", "--output_dir", output)
    assert script.returncode == 1
    assert "install Node.js" in script.stderr and "Traceback" not in script.stderr
    assert not output.exists()


def test_npm_that_fails_is_an_error(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho no network >&2\nexit 1\n", encoding="utf-8")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ValueError, match="no network"):
        fetch(tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_emoji_have_names_that_tell_them_apart(data):
    emoji = list_emoji(data)
    assert [one.prompts for one in emoji] == [
        ("red apple", "apple"),
        ("green apple",),
        ("upside-down face", "upside down face"),
        ("cat face",),  # "cat" is another emoji
        ("cat",),
    ]
    assert [one.name for one in emoji if not one.trained] == ["green apple"]


def test_every_word_is_a_token(data):
    emoji = list_emoji(data)
    tokenizer = make_byte_pair_tokenizer(words_of(emoji), MAX_TOKENS)
    assert len(tokenizer("upside-down face").input_ids) == 4 + 2
    assert len(tokenizer("green apple").input_ids) == 2 + 2


def test_pictures_lie_on_white(data):
    pictures = load_pictures(list_emoji(data))
    assert pictures.shape == (5, 3, 64, 64)
    assert (pictures[:, :, :2] == 1).all()
    assert pictures[0, :, 32, 32].tolist() == [1, 0, 0]
    moved = move(pictures, torch.Generator().manual_seed(0), degrees=8.0, shift=3.0, zoom=(0.8, 0.9))
    assert (moved[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] == 1).all()
    assert (moved[0, 0] == 1).all() and moved[0, 1].mean() > pictures[0, 1].mean() + 0.05  # smaller, and still red


def test_moving_nothing_changes_nothing(data):
    pictures = load_pictures(list_emoji(data))
    same = move(pictures, torch.Generator(), degrees=0.0, shift=0.0, zoom=(1.0, 1.0))
    torch.testing.assert_close(same, pictures, atol=1e-4, rtol=0)


def test_whitening_changes_latents_and_not_pictures(data):
    whiten = runpy.run_path(str(SCRIPT))["whiten"]
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, scaling_factor=1.0).eval()
    vae.quant_conv.bias.data += torch.arange(8.0)
    vae.quant_conv.bias.data[4:] -= 30  # hardly any noise
    pictures = load_pictures(list_emoji(data))
    with torch.no_grad():
        before = vae.decode(encode(vae, pictures * 2 - 1)).sample
        latents = whiten(vae, pictures)
        again = encode(vae, pictures * 2 - 1)
        torch.testing.assert_close(vae.decode(again).sample, before, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(again, latents, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(again.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(again.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def shipped() -> tuple[DiffusionPipeline, SmallClassifier, list[str], dict]:
    """The teacher, its classifier, the classifier's names and the arguments of a call."""
    pipe = DiffusionPipeline.from_pretrained(TEACHER)
    pipe.set_progress_bar_config(disable=True)
    arguments = json.loads((TEACHER / "pipeline_arguments.json").read_text(encoding="utf-8"))
    names = (TEACHER / "classifier" / "names.txt").read_text(encoding="utf-8").splitlines()
    call = {**arguments, "num_inference_steps": 20, "output_type": "pt"}
    return pipe, SmallClassifier.from_pretrained(TEACHER / "classifier"), names, call


def test_prompts_are_names_that_are_not_held_out(shipped):
    _, classifier, names, _ = shipped
    prompts, held_out = (
        (TEACHER / name).read_text(encoding="utf-8").splitlines() for name in ("prompts.txt", "held_out.txt")
    )
    assert [name for name in names if name not in held_out] == prompts
    assert set(held_out) < set(names)
    assert len(names) == len(set(names)) == classifier.config.num_classes
    assert set(runpy.run_path(str(SCRIPT))["SHOWN"]) < set(prompts)


def test_samples_are_what_the_prompts_name(shipped):
    pipe, classifier, names, call = shipped
    prompts = (TEACHER / "prompts.txt").read_text(encoding="utf-8").splitlines()[::12]
    images = pipe(prompts, generator=torch.Generator().manual_seed(0), **call).images
    labels = torch.tensor([names.index(prompt) for prompt in prompts])
    assert images.shape == (len(prompts), 3, 64, 64)
    assert classifier.accuracy(images, labels) >= 0.7
    assert classifier.accuracy(images, labels.roll(1)) < 0.1


def test_without_guidance_samples_differ(shipped):
    pipe, _, _, call = shipped
    guided, unguided = (
        pipe("red apple", generator=torch.Generator().manual_seed(0), **{**call, "guidance_scale": scale}).images
        for scale in (call["guidance_scale"], 1.0)
    )
    assert (guided - unguided).square().mean() > 1e-4


@pytest.fixture
def styled(shipped) -> Iterator[DiffusionPipeline]:
    """The teacher with its LoRA."""
    pipe = shipped[0]
    pipe.load_lora_weights(TEACHER / "lora")
    yield pipe
    pipe.unload_lora_weights()


def test_the_lora_draws_the_same_in_another_style(shipped, styled):
    _, classifier, names, call = shipped
    assert (TEACHER / "lora" / LORA_FILE).stat().st_size < 1e6
    prompts = (TEACHER / "prompts.txt").read_text(encoding="utf-8").splitlines()[::25]
    labels = torch.tensor([names.index(prompt) for prompt in prompts])
    images = {}
    for scale in (1.0, 0.0):
        styled.set_adapters(styled.get_active_adapters(), scale)
        images[scale] = styled(prompts, generator=torch.Generator().manual_seed(0), **call).images
    assert (images[1.0] - images[0.0]).square().mean() > 0.02
    others = classifier.accuracy(images[1.0], labels.roll(1))
    assert classifier.accuracy(images[1.0], labels) > others + 0.1  # it knows the other style


def test_the_teachers_solver_serves_the_teacher_with_half_of_its_lora(shipped, styled):
    styled.set_adapters(styled.get_active_adapters(), 0.5)
    call = {**shipped[3], "output_type": "latent"}
    prompts = (TEACHER / "prompts.txt").read_text(encoding="utf-8").splitlines()[::50]
    own = styled.scheduler

    def sample(scheduler: SchedulerMixin, steps: int) -> torch.Tensor:
        styled.scheduler = scheduler
        generator = torch.Generator().manual_seed(0)
        return styled(prompts, generator=generator, **{**call, "num_inference_steps": steps}).images

    teacher = sample(own, 50)
    solver = GASScheduler.from_pretrained(ROOT / "examples" / "solvers" / "text-to-emoji" / "gs")
    ddim = DDIMScheduler.from_config(own.config, timestep_spacing="trailing")
    distances = [(sample(scheduler, 4) - teacher).square().mean() for scheduler in (solver, ddim)]
    styled.scheduler = own
    assert distances[0] < 0.7 * distances[1]
