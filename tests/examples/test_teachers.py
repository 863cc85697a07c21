"""The shipped teachers load, are small, and draw what the prompts say."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDPMPipeline, DiffusionPipeline, DPMSolverMultistepScheduler, ModelMixin
from transformers import PreTrainedModel


sys.path.append(str(ROOT / "examples" / "teachers"))
import digit_prompts
import motion_prompts
from digit_prompts import COLOURS, Judge, draw_digits, example_prompts, make_tokenizer, paint, prompt_accuracy
from motion_prompts import MOTIONS, MotionJudge, add_motion, film, motion_accuracy


TEACHERS = ROOT / "examples" / "teachers"
SHIPPED = ("digits", "text-to-digits", "flow-digits", "moving-digits", "text-to-emoji")
MOST_BYTES = {"moving-digits": 8e6, "text-to-emoji": 13.2e6}
PROMPTED = ("text-to-digits", "flow-digits")
FAST = {"flow-digits": {"max_sequence_length": 8}}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


@pytest.fixture(scope="module", params=PROMPTED)
def teacher(request: pytest.FixtureRequest) -> tuple[DiffusionPipeline, dict]:
    """A teacher that follows prompts, with a scheduler for few steps, and its call arguments."""
    pipe = DiffusionPipeline.from_pretrained(TEACHERS / request.param)
    if request.param == "text-to-digits":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"num_inference_steps": 10, **FAST.get(request.param, {})}


@pytest.fixture(scope="module")
def video_teacher() -> tuple[DiffusionPipeline, dict]:
    """The teacher that makes videos, and its call arguments."""
    pipe = DiffusionPipeline.from_pretrained(TEACHERS / "moving-digits")
    pipe.set_progress_bar_config(disable=True)
    arguments = (TEACHERS / "moving-digits" / "pipeline_arguments.json").read_text(encoding="utf-8")
    return pipe, {**json.loads(arguments), "num_inference_steps": 10}


@pytest.mark.parametrize("name", SHIPPED)
def test_folder_is_small_and_complete(name):
    folder = TEACHERS / name
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES.get(name, 5e6)
    assert {"README.md", "samples.png", "train_teacher.py", "model_index.json"} <= {path.name for path in files}
    assert {path.suffix for path in files if path.stat().st_size > 150_000} == {".safetensors"}


@pytest.mark.parametrize("name", SHIPPED)
def test_loads_in_one_precision(name):
    components = DiffusionPipeline.from_pretrained(TEACHERS / name).components.values()
    networks = [c for c in components if isinstance(c, (ModelMixin, PreTrainedModel))]
    assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for network in networks for p in network.parameters())


def test_judge_knows_digits_and_colours(judge):
    drawings, digits = draw_digits(copies=1, seed=2)
    images, colours = paint(drawings, seed=2)
    judged_digits, judged_colours = judge(images / 2 + 0.5)
    assert np.mean(judged_digits == digits.numpy()) > 0.98
    assert np.mean(judged_colours == colours.numpy()) > 0.99


def test_unconditional_samples_are_all_ten_digits(digits: DDPMPipeline, judge):
    own_scheduler = digits.scheduler
    digits.scheduler = DPMSolverMultistepScheduler.from_config(own_scheduler.config)
    images = digits(100, torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images
    digits.scheduler = own_scheduler
    assert np.isfinite(images).all()
    drawn = torch.nn.functional.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2), scale_factor=2)
    judged, _ = judge(drawn.expand(-1, 3, -1, -1))
    assert len(set(judged)) == 10


@pytest.mark.parametrize("name", (*PROMPTED, "moving-digits"))
def test_prompts_file_holds_the_example_prompts(name):
    lines = (TEACHERS / name / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert lines == (motion_prompts if name == "moving-digits" else digit_prompts).example_prompts()


def test_tokenizers_know_every_word(teacher):
    pipe, _ = teacher
    assert pipe.tokenizer.get_vocab() == make_tokenizer().get_vocab()
    for prompt in example_prompts():
        assert len(pipe.tokenizer(prompt).input_ids) == len(prompt.split()) + 2
    if "tokenizer_3" in pipe.components:
        assert all(pipe.tokenizer_3.unk_token_id not in ids for ids in pipe.tokenizer_3(example_prompts()).input_ids)


def test_guided_samples_follow_their_prompts(teacher):
    pipe, call = teacher
    digits, colours = prompt_accuracy(pipe, batches=1, guidance_scale=4.0, **call)
    assert digits >= 0.9
    assert colours >= 0.9


def test_only_prompts_say_what_to_draw(teacher, judge):
    pipe, call = teacher
    images = pipe([""] * 60, generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    digits, colours = judge(images)
    assert images.isfinite().all()
    assert len(set(digits)) >= 8 and len(set(colours)) == len(COLOURS)
    assert max(np.bincount(digits)) <= 20


def test_guidance_changes_the_samples(teacher):
    pipe, call = teacher

    def images(guidance_scale: float) -> torch.Tensor:
        call_again = {**call, "guidance_scale": guidance_scale, "generator": torch.Generator().manual_seed(0)}
        return pipe(example_prompts()[:20], output_type="pt", **call_again).images

    unguided, guided = images(1.0), images(4.0)
    assert (unguided - guided).square().mean() > 0.005
    torch.testing.assert_close(images(4.0), guided)


def test_flow_digits_draws_the_same_with_padding_of_any_length(judge):
    pipe = DiffusionPipeline.from_pretrained(TEACHERS / "flow-digits")
    pipe.set_progress_bar_config(disable=True)

    def images(length: int) -> torch.Tensor:
        call = {"num_inference_steps": 8, "guidance_scale": 4.0, "max_sequence_length": length, "output_type": "pt"}
        return pipe(example_prompts()[:8], generator=torch.Generator().manual_seed(0), **call).images

    short, long = images(8), images(256)
    assert (short - long).square().mean() < 0.01
    np.testing.assert_array_equal(judge(short)[0], judge(long)[0])


def test_motion_judge_knows_digits_colours_and_motions():
    drawings, digits = draw_digits(copies=1, seed=2)
    images, colours = paint(drawings, seed=2)
    videos, motions = film(images, torch.Generator().manual_seed(2))
    judged_digits, judged_colours, judged_motions = MotionJudge()(videos.transpose(1, 2)[::4] / 2 + 0.5)
    assert np.mean(judged_digits == digits[::4, None].numpy()) > 0.98
    assert np.mean(judged_colours == colours[::4, None].numpy()) > 0.99
    np.testing.assert_array_equal(judged_motions, motions[::4])


def test_video_tokenizer_knows_every_word(video_teacher):
    pipe, call = video_teacher
    for prompt in motion_prompts.example_prompts():
        ids = pipe.tokenizer(prompt).input_ids
        assert len(ids) == len(prompt.split()) + 1 <= call["max_sequence_length"]
        assert pipe.tokenizer.unk_token_id not in ids


def test_the_training_decodes_as_the_autoencoder_does(video_teacher):
    vae = video_teacher[0].vae
    decode_unclamped = runpy.run_path(str(TEACHERS / "moving-digits" / "train_teacher.py"))["decode_unclamped"]
    latents = torch.randn(2, vae.config.z_dim, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = decode_unclamped(vae, latents)
        torch.testing.assert_close(decoded.clamp(-1, 1), vae.decode(latents).sample)
    assert decoded.min() < -1  # where `vae.decode` has no gradient


def test_guided_videos_follow_their_prompts(video_teacher):
    pipe, call = video_teacher
    digits, colours, motions = motion_accuracy(pipe, batches=1, **call)
    assert digits >= 0.9
    assert colours >= 0.9
    assert motions >= 0.95


def test_the_same_noise_moves_where_the_prompt_says(video_teacher):
    pipe, call = video_teacher
    prompts = [add_motion("red three", motion) for motion in MOTIONS]
    call = {**call, "num_inference_steps": 20, "generator": [torch.Generator().manual_seed(0) for _ in prompts]}
    videos = pipe(prompts, output_type="pt", **call).frames
    assert videos.shape == (len(prompts), 9, 3, 32, 32) and videos.isfinite().all()
    assert MotionJudge()(videos)[2].tolist() == list(range(len(MOTIONS)))
