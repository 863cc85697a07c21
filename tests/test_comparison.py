"""Comparison of schedulers with Diffusers': the rivals, the distances, the table and the picture."""

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from saved_schedulers import STABLE_DIFFUSION, trained_scheduler
from tiny_pipelines import build

from diffusers_gas import GASScheduler, SampleInputs
from diffusers_gas.comparison import (
    MOST_RIVALS,
    Row,
    compare,
    count_parameters,
    errors_to_teacher,
    few_step_rivals,
    markdown_table,
    relative_detail,
    training_free_schedulers,
)
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.named_schedulers import load_scheduler
from diffusers_gas.pipelines.teacher import TeacherSamples, default_teacher


@pytest.mark.parametrize("family", ["stable-diffusion", "stable-diffusion-3", "stable-audio"])
def test_a_fit_has_few_rivals_with_one_evaluation_a_step(family):
    pipe = build(family).pipe
    if isinstance(pipe.scheduler, PNDMScheduler):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    rivals = few_step_rivals(pipe)
    assert 6 <= len(rivals) <= MOST_RIVALS and any(rival is pipe.scheduler for rival in rivals.values())
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    assert not any(rival is pipe.scheduler for rival in few_step_rivals(pipe).values())


@pytest.mark.parametrize("own", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, PNDMScheduler])
def test_schedulers_have_the_settings_of_their_names(own):
    """Also if the pipeline's scheduler has defaults of its own for these settings."""
    config = own(**STABLE_DIFFUSION).config
    for name, scheduler in training_free_schedulers({"_class_name": own.__name__, **config}).items():
        family, _, spacing = name.partition(", ")
        settings = {"timestep_spacing": spacing} if spacing in ("linspace", "leading", "trailing") else {}
        if spacing.endswith(("sigmas", "lambdas")):
            settings = {f"use_{spacing.replace(' ', '_')}": True}
        if family.startswith("DPM-Solver++"):
            settings["solver_order"] = int(family[-2])
        if family == "DDIM":
            settings["clip_sample"] = False
        assert settings and {key: scheduler.config[key] for key in settings} == settings, name


@pytest.mark.parametrize(
    "own",
    [
        CogVideoXDDIMScheduler(**STABLE_DIFFUSION, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        CogVideoXDPMScheduler(**STABLE_DIFFUSION, snr_shift_scale=1.0),
        DDPMScheduler(beta_schedule="sigmoid"),
        DDPMScheduler(beta_schedule="laplace"),
    ],
)
def test_teacher_and_rivals_have_the_noise_levels_of_the_network(own):
    """Also where a setting describes them that only the pipeline's own scheduler knows."""
    pipe = SimpleNamespace(scheduler=own)
    names = ["DDIMScheduler", "GASScheduler"] + ["CogVideoXDDIMScheduler"] * ("snr_shift_scale" in own.config)
    named = [load_scheduler(name, pipe) for name in names]
    rivals = training_free_schedulers(own.config)
    assert len(rivals) > 10
    for scheduler in [default_teacher(pipe), *named, *rivals.values()]:
        levels = scheduler.alphas_cumprod.float()
        torch.testing.assert_close(levels, own.alphas_cumprod.float(), rtol=1e-3, atol=1e-4)


def test_teacher_and_rivals_of_stable_video_diffusion_know_its_preconditioning():
    own = EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous", sigma_max=700.0)
    pipe = SimpleNamespace(scheduler=own)
    state, output = torch.randn(2, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    own.set_timesteps(10)
    for scheduler in [default_teacher(pipe), *training_free_schedulers(own.config).values()]:
        scheduler.set_timesteps(10)
        sigma = scheduler.sigmas[0]
        expected = (
            state / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()
        )  # as `EulerDiscreteScheduler` has it
        prediction = scheduler.precondition_outputs(state, output, sigma)
        torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-4)


def test_no_rival_tells_a_network_wrong_times():
    """Diffusers' only scheduler with Stable Audio's times adds noise."""
    config = {**EDMDPMSolverMultistepScheduler(sigma_data=1.0, prediction_type="v_prediction").config}
    own = type("CosineDPMSolverMultistepScheduler", (), {"config": config})()
    assert training_free_schedulers({**config, "_class_name": type(own).__name__}) == {}
    teacher, ours = default_teacher(SimpleNamespace(scheduler=own)), GASScheduler.from_config(config)
    assert ours.config.edm_timestep == "log" and teacher.config.edm_timestep == "atan"
    teacher.set_timesteps(20)
    assert teacher.timesteps.min() > 0 and teacher.timesteps.max() < 1


def test_no_process_waits_for_one_that_fails(digits):
    """Each process reaches `reduce` once, and all know that one has failed."""
    samples, sums = TeacherSamples(SampleInputs.create(0, 2), torch.zeros(2, 1, 1), torch.zeros(2, 1, 1)), []

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        sums.append(tensor)
        return tensor

    with pytest.raises(ValueError, match="No solver for 5"):
        errors_to_teacher(digits, trained_scheduler(4), 5, samples, 2, reduce)
    assert len(sums) == 1 and sums[0][-1] == 1
    ours = GASScheduler.from_config(digits.scheduler.config)
    _, final = sample_latents(digits, ours, 3, **samples.inputs.pipeline_arguments(digits))
    with pytest.raises(RuntimeError, match="another process"):
        errors_to_teacher(
            digits, ours, 3, TeacherSamples(samples.inputs, final, final), 2, lambda tensor: tensor + torch.eye(4)[3]
        )


def test_distances_are_those_of_final_states(digits):
    inputs = SampleInputs.create(0, 3)
    schedulers = {
        name: training_free_schedulers(digits.scheduler.config)[name] for name in ("UniPC, leading", "DEIS, leading")
    }
    ours = GASScheduler.from_config(digits.scheduler.config)
    first, exact = sample_latents(digits, schedulers["UniPC, leading"], 4, **inputs.pipeline_arguments(digits))
    samples = TeacherSamples(inputs, first, exact)
    assert max(errors_to_teacher(digits, schedulers["UniPC, leading"], 4, samples, 2)) < 1e-5
    _, final = sample_latents(digits, ours, 4, **inputs.pipeline_arguments(digits))
    expected = (final - exact).square().mean().item(), (final - exact).abs().mean().item()
    assert errors_to_teacher(digits, ours, 4, samples, 2) == pytest.approx(expected, rel=1e-4)
    rows = compare(digits, schedulers, [4, 3], samples, 2)
    assert [(row.num_inference_steps, row.scheduler) for row in rows[2:]] == [
        (4, "UniPC, leading"),
        (4, "DEIS, leading"),
    ]
    assert rows[0].distance < rows[1].distance


def test_table_is_relative_to_the_best_other():
    others = [Row(4, "a", 2.0, 0.5, 1.5), Row(4, "b", 4.0), Row(4, "c", math.inf)]
    lines = markdown_table([Row(4, "ours", 1.0)], others, num_others=2).splitlines()[2:]
    assert lines == [
        "| 4 | ours | 1.00000 | 0.50 | - | - |",
        "| 4 | a | 2.00000 | 1.00 | 0.5000 | 1.50 |",
        "| 4 | b | 4.00000 | 2.00 | - | - |",
    ]


def test_grain_on_even_ground_and_blur_show_in_the_detail():
    """Where one sees them: a strong edge beside them does not hide them."""
    rng = np.random.default_rng(0)
    reference = [np.full((18, 18, 3), 0.5) + 0.02 * rng.normal(size=(18, 18, 3)) for _ in range(4)]
    for image in reference:
        image[:, 9:] += 0.5
    grainy = [image + 0.04 * rng.normal(size=image.shape) for image in reference]
    blurred = [(image + np.roll(image, 1, axis=0)) / 2 for image in reference]
    assert relative_detail(reference, reference) == 1
    assert relative_detail(grainy, reference) > 2 and relative_detail(blurred, reference) < 0.8
    white = [np.ones_like(image) for image in reference]
    assert relative_detail(white, white) == 1 and relative_detail(white, reference) < 0.1


def test_count_parameters(digits):
    assert count_parameters(digits) == sum(parameter.numel() for parameter in digits.unet.parameters())


class Undrivable(DDIMScheduler):
    """Some pipelines want what not every scheduler has."""

    def step(self, *args, **kwargs):
        raise AttributeError("this scheduler has no attribute 'sigma_shift'")


def test_rivals_that_a_pipeline_cannot_drive_are_left_out(digits, caplog):
    root = logging.getLogger("diffusers_gas")
    root.addHandler(caplog.handler)
    inputs = SampleInputs.create(0, 2)
    noise, final = sample_latents(digits, digits.scheduler, 20, **inputs.pipeline_arguments(digits))
    config = digits.scheduler.config
    schedulers = {"DDIM": DDIMScheduler.from_config(config), "odd": Undrivable.from_config(config)}
    rows = compare(digits, schedulers, [4, 5], TeacherSamples(inputs, noise, final), 2)
    root.removeHandler(caplog.handler)
    assert [(row.num_inference_steps, row.scheduler) for row in rows] == [(4, "DDIM"), (5, "DDIM")]
    assert "odd is left out: DDPMPipeline cannot sample with it (AttributeError: this scheduler has no" in caplog.text


def test_a_table_says_what_diverged():
    lines = markdown_table([Row(4, "a", 0.25), Row(4, "b", num_diverged=3)]).splitlines()
    assert (
        lines[0] == "| steps | scheduler | distance to teacher |" and lines[-1] == "| 4 | b, 3 samples diverged | - |"
    )
    assert markdown_table([Row(4, "b", num_diverged=3)]).splitlines()[-1] == "| 4 | b, 3 samples diverged |"


def test_a_table_without_rivals():
    assert markdown_table([Row(4, "ours", 0.25)]).splitlines()[-1] == "| 4 | ours | 0.25000 |"


def test_no_rival_shifts_times_in_another_way():
    """Diffusers' multistep schedulers know the exponential shift only."""
    own = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    assert {name.partition(",")[0] for name in training_free_schedulers(own.config)} == {"Euler"}
    own.register_to_config(time_shift_type="exponential")
    assert {"UniPC", "DPM-Solver++ 2M"} <= training_free_schedulers(own.config).keys()
