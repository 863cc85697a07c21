"""Images and final states of one sampling, as two separate ones would give them."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from tiny_pipelines import build

from diffusers_gas import GASScheduler, SDMScheduler, calibrate, distill
from diffusers_gas.papers.evaluation.measurement import Measurement, Sampler
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.sampling import sample_images, sample_with_states


def inputs_of(tiny, num_samples: int) -> SampleInputs:
    given = tiny.inputs(num_samples)
    given.pop("batch_size", None)
    per_sample = {name: value for name, value in given.items() if isinstance(value, list | torch.Tensor)}
    rows = [
        {name: value[i : i + 1] if isinstance(value, torch.Tensor) else value[i] for name, value in per_sample.items()}
        for i in range(num_samples)
    ]
    common = {name: value for name, value in given.items() if name not in per_sample}
    return SampleInputs(range(num_samples), rows, common)


@pytest.mark.parametrize("name", ["ddpm", "stable-diffusion", "dit", "flux", "wan"])
def test_images_and_states_agree_with_separate_samplings(name):
    tiny = build(name)
    inputs, scheduler = inputs_of(tiny, 2), GASScheduler.from_config(tiny.pipe.scheduler.config)
    images, states = sample_with_states(tiny.pipe, scheduler, 3, inputs, batch_size=2)
    assert images.shape[1] == 3
    np.testing.assert_array_equal(images.movedim(1, -1), np.stack(sample_images(tiny.pipe, scheduler, 3, inputs)))
    _, final = sample_latents(tiny.pipe, scheduler, 3, **inputs.pipeline_arguments(tiny.pipe))
    torch.testing.assert_close(states, final[:2].float())
    tiny.pipe.scheduler = scheduler
    output = tiny.pipe(**inputs.pipeline_arguments(tiny.pipe), num_inference_steps=3, output_type="np")
    expected = [video[len(video) // 2] for video in output.frames] if "frames" in output else output.images
    np.testing.assert_allclose(images.movedim(1, -1), np.stack(expected), atol=0.5 / 255 + 1e-6)


def test_images_have_the_levels_of_files(digits):
    images, states = sample_with_states(
        digits, DPMSolverMultistepScheduler.from_config(digits.scheduler.config), 4, SampleInputs.create(7, 3), 3
    )
    torch.testing.assert_close((images * 255).round() / 255, images, rtol=0, atol=0)
    torch.testing.assert_close(images, (states / 2 + 0.5).clamp(0, 1), rtol=0, atol=0.5 / 255 + 1e-6)


def test_batches_and_the_pipeline_do_not_change_samples(digits):
    own = digits.scheduler
    scheduler = DDIMScheduler.from_config(own.config, timestep_spacing="trailing", clip_sample=False)
    inputs = SampleInputs.create(50_000, 5)
    whole, parts = (sample_with_states(digits, scheduler, 2, inputs, batch_size)[1] for batch_size in (5, 2))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
    assert digits.scheduler is own
    assert "step" not in vars(scheduler)


def test_divergence_shows(digits):
    class Diverging(DDIMScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            return super().step(model_output * math.nan, timestep, sample, **kwargs)

    scheduler = Diverging.from_config(digits.scheduler.config)
    images, states = sample_with_states(digits, scheduler, 2, SampleInputs.create(0, 2), 2)
    assert images.isnan().all() and states.isnan().all()


def test_samples_of_several_calls():
    """Guidance scales that differ make calls of their own; samples stay in order."""
    tiny = build("stable-diffusion")
    inputs = inputs_of(tiny, 3)
    scales = [{**row, "guidance_scale": scale} for row, scale in zip(inputs.per_sample, (2.0, 5.0, 2.0))]
    common = {name: value for name, value in inputs.common.items() if name != "guidance_scale"}
    inputs = SampleInputs([0, 1, 2], scales, common)
    scheduler = DDIMScheduler.from_config(tiny.pipe.scheduler.config)
    images, states = sample_with_states(tiny.pipe, scheduler, 2, inputs, 3)
    for i in range(3):
        image, state = sample_with_states(tiny.pipe, scheduler, 2, inputs[i : i + 1], 1)
        torch.testing.assert_close(states[i : i + 1], state, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(images[i : i + 1], image, rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler, HeunDiscreteScheduler])
def test_pixels_in_half_precision_with_second_order_steps(scheduler_class):
    """The last two evaluations of a Heun step may be at the same time. Only the last state is one to draw."""
    tiny = build("ddpm")
    pipe = tiny.pipe.to(torch.bfloat16)
    scheduler = scheduler_class.from_config(pipe.scheduler.config)
    images = sample_images(pipe, scheduler, 8, inputs_of(tiny, 2))
    assert len(images) == 2 and all(np.isfinite(image).all() for image in images)


@pytest.fixture
def small_memory(digits, monkeypatch) -> list[int]:
    """A network that runs out of memory with more than two samples. The list has the sizes of all batches."""
    sizes, own = [], digits.unet.forward

    def forward(sample, *args, **kwargs):
        sizes.append(len(sample))
        if len(sample) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return own(sample, *args, **kwargs)

    monkeypatch.setattr(digits.unet, "forward", forward)
    return sizes


QUICK = {"teacher_num_inference_steps": 2, "max_iterations": 1}
JOBS = {
    "distill": lambda pipe, folder: distill(pipe, 2, inputs=SampleInputs.create(0, 9), **QUICK),
    "calibrate": lambda pipe, folder: calibrate(pipe, 3, inputs=SampleInputs.create(0, 4), most_evaluations=224),
    "evaluate": lambda pipe, folder: Measurement(folder, pipe, "", SampleInputs.create(0, 9), 32).measure(
        Sampler("", pipe.scheduler, 2), SampleInputs.create(0, 9)
    ),
    "pictures": lambda pipe, folder: sample_images(pipe, pipe.scheduler, 2, SampleInputs.create(0, 9)),
}


@pytest.mark.parametrize("name", JOBS)
def test_defaults_do_what_memory_allows(digits, small_memory, tmp_path, name):
    """It is found out once for each part of a job, by a few calls that fail."""
    JOBS[name](digits, tmp_path)
    assert {1, 2} >= set(small_memory[-10:])
    assert sum(size > 2 for size in small_memory) <= 4


def test_other_errors_and_one_sample_that_does_not_fit_are_raised(digits, monkeypatch):
    for error, number in ((torch.OutOfMemoryError("out of memory"), 1), (RuntimeError("shapes"), 4)):
        sizes = []

        def forward(sample, *args, error=error, sizes=sizes, **kwargs):
            sizes.append(len(sample))
            raise error

        monkeypatch.setattr(digits.unet, "forward", forward)
        with pytest.raises(type(error), match=str(error)):
            sample_images(digits, digits.scheduler, 2, SampleInputs.create(0, 4))
        assert sizes[-1] == number
