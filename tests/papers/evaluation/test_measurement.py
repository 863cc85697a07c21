"""Measuring in files: what they hold, when they are made again, and when not."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import TEACHER
from diffusers import DDIMScheduler, DDPMPipeline, DPMSolverMultistepScheduler
from PIL import Image

from diffusers_gas.papers.evaluation.feature_extractors import load_feature_extractor
from diffusers_gas.papers.evaluation.measurement import Measurement, Sampler
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.sampling import sample_with_states


@pytest.fixture
def student(digits) -> Sampler:
    return Sampler("student", DPMSolverMultistepScheduler.from_config(digits.scheduler.config), 3)


@pytest.fixture
def teacher(digits) -> Sampler:
    return Sampler("teacher", DPMSolverMultistepScheduler.from_config(digits.scheduler.config), 6)


def measurement(digits, folder, num_samples=3, **arguments) -> Measurement:
    inputs = SampleInputs.create(10, num_samples)
    return Measurement(folder, digits, "digits", inputs, 2, **arguments)


def test_what_is_measured(digits, student, teacher, tmp_path):
    extract = load_feature_extractor(TEACHER / "classifier")
    run = measurement(digits, tmp_path, features=extract, teacher=teacher)
    (shard,) = run.shards
    measured = run.measure(student, shard)
    images, states = sample_with_states(digits, student.scheduler, 3, shard, 2)
    _, target = sample_with_states(digits, teacher.scheduler, 6, shard, 2)
    torch.testing.assert_close(measured["features"], extract(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(measured["distance"].float(), (states - target).square().mean((1, 2, 3)))
    torch.testing.assert_close(run.measure(teacher, shard)["state"], target)
    assert not measured["diverged"].any()


def test_files_are_made_once(digits, student, teacher, tmp_path):
    run = measurement(digits, tmp_path, num_samples=70)
    assert [len(shard) for shard in run.shards] == [64, 6]
    run.measure(student, run.shards[1])
    (path,) = tmp_path.iterdir()
    time = path.stat().st_mtime_ns
    run.measure(student, run.shards[1])
    assert path.stat().st_mtime_ns == time
    # Another sampler, model, measure or seed: another file.
    run.measure(teacher, run.shards[1])
    Measurement(tmp_path, digits, "other", run.shards[1], 2).measure(student, run.shards[1])
    measurement(digits, tmp_path, 6, extractor="digits").measure(student, run.shards[1])
    run.measure(student, run.shards[1][:5])
    assert len(list(tmp_path.iterdir())) == 5


def test_other_weights_of_the_same_name_are_measured_anew(digits, student, tmp_path):
    pipe = copy.deepcopy(digits)
    for factor, num_files in ((1, 1), (0.5, 2), (2, 2)):
        with torch.no_grad():
            pipe.unet.conv_out.weight.mul_(factor)
        run = measurement(pipe, tmp_path)
        run.measure(student, run.shards[0])
        assert len(list(tmp_path.iterdir())) == num_files


def test_arguments_that_print_alike_have_files_of_their_own(digits, student, tmp_path):
    class LabelledPipeline(DDPMPipeline):
        def __call__(self, masks, batch_size=1, **arguments):
            return super().__call__(batch_size=batch_size, **arguments)

    pipe, masks = LabelledPipeline(digits.unet, digits.scheduler), torch.zeros(2, 1, 10_000)
    masks[1, 0, 5_000] = 1
    assert str(masks[0]) == str(masks[1])
    for mask in (*masks, masks[0].clone()):
        run = Measurement(tmp_path, pipe, "digits", SampleInputs.create(0, 1, [{"masks": mask}]), 1)
        run.measure(student, run.shards[0])
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_files_are_named(digits, student, tmp_path):
    run = measurement(digits, tmp_path)
    run.measure(student, run.shards[0])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{path.name} is damaged .* Delete it"):
        run.measure(student, run.shards[0])


def test_images_are_kept(digits, student, tmp_path):
    run = measurement(digits, tmp_path / "shards")
    run.measure(student, run.shards[0])
    run = measurement(digits, tmp_path / "shards", images_folder=tmp_path / "images")
    for _ in range(2):  # missing ones are made, also if all else is there
        run.measure(student, run.shards[0])
        paths = sorted((tmp_path / "images").rglob("*.png"))
        assert [path.name for path in paths] == ["000010.png", "000011.png", "000012.png"]
        images, _ = sample_with_states(digits, student.scheduler, 3, run.shards[0], 2)
        found = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).float() / 255
        torch.testing.assert_close(found, images[:, 0], rtol=0, atol=1.01 / 255)
        paths[1].unlink()


def test_diverged_samples_are_marked(digits, teacher, tmp_path):
    class Diverging(DDIMScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            model_output[1] = math.nan
            return super().step(model_output, timestep, sample, **kwargs)

    sampler = Sampler("diverging", Diverging.from_config(digits.scheduler.config), 2)
    extract = load_feature_extractor(TEACHER / "classifier")
    run = measurement(digits, tmp_path, 2, features=extract, teacher=teacher)
    measured = run.measure(sampler, run.shards[0])
    assert measured["diverged"].tolist() == [False, True]
    assert measured["distance"][0].isfinite()
