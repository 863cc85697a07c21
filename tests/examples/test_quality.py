"""Choices and measures of the quality benchmark."""

import math
import sys

import pytest
import torch
from conftest import ROOT
from diffusers import DDPMPipeline
from diffusers.schedulers.scheduling_utils import AysSchedules
from saved_schedulers import STABLE_DIFFUSION
from tiny_pipelines import build

from diffusers_gas.papers.evaluation.frechet import Gaussian, frechet_distance
from diffusers_gas.pipelines.driving import recording_copy


sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
import fits
import quality
import report


def test_rivals_take_the_evaluations_that_they_are_asked_for(digits):
    """Counted on the network. Schedulers with two evaluations per step have one evaluation less."""
    pipe = DDPMPipeline(digits.unet, digits.scheduler)
    pipe.set_progress_bar_config(disable=True)
    count = 0

    def counting(*_):
        nonlocal count
        count += 1

    samplers = quality.rivals(pipe, 4)
    assert len(samplers) == len({sampler.name for sampler in samplers}) > 35
    handle = pipe.unet.register_forward_hook(counting)
    for sampler in samplers:
        pipe.scheduler, count = recording_copy(sampler.scheduler), 0
        pipe(num_inference_steps=sampler.num_inference_steps, output_type="np")
        assert count == 4, sampler.name
    handle.remove()


def test_align_your_steps_is_the_published_schedule_and_reaches_other_counts():
    scheduler = quality.AlignYourStepsScheduler(**STABLE_DIFFUSION, solver_order=2)
    scheduler.set_timesteps(10)
    published = torch.tensor(AysSchedules["StableDiffusionTimesteps"])
    assert (scheduler.timesteps - published).abs().max() <= 1  # rounded
    for n in (3, 4, 7, 20):
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n and scheduler.timesteps[0] == 999
        assert (scheduler.timesteps.diff() < 0).all() and scheduler.sigmas[-1] == 0


def test_schedulers_of_scaled_states_are_rivals_where_inputs_are_scaled():
    families = {sampler.name.split(",")[0] for sampler in quality.rivals(build("stable-diffusion").pipe, 6)}
    assert {"Euler", "LMS", "Heun", "DPM2", "PNDM", "DPM-Solver++ 2S", "UniPC", "DEIS", "DDIM"} <= families


def test_the_best_are_found_by_distance():
    distances = {"a, leading": 2.0, "b, karras sigmas": 1.5, "c, karras sigmas": 3.0, "d": math.inf}
    assert quality.best_of(distances) == {quality.BEST: "b, karras sigmas", quality.KARRAS: "b, karras sigmas"}


def test_jackknife_tells_the_spread_of_the_frechet_distance():
    """Compared with the standard deviation over new samples, where every part has prompts, here a mean, of its own."""
    generator = torch.Generator().manual_seed(0)
    places = torch.linspace(-2, 2, 16)

    def parts(shift: float) -> list[torch.Tensor]:
        draws = torch.randn(16, 32, 2, generator=generator) + places[:, None, None] + torch.tensor([shift, 0.0])
        return list(draws)

    found = [quality.jackknife(parts(1.0), parts(0.0)) for _ in range(60)]
    distances, errors = torch.tensor(found).T
    assert distances.mean() == pytest.approx(1, abs=0.1)
    assert errors.mean() == pytest.approx(distances.std().item(), rel=0.3)
    samples, reference = parts(1.0), parts(0.0)
    together = [Gaussian.of_features(torch.cat(some)) for some in (samples, reference)]
    assert quality.jackknife(samples, reference)[0] == pytest.approx(frechet_distance(*together))


def test_fits_that_have_ended_are_not_made_again(monkeypatch, tmp_path):
    """The training script is interrupted in its second run. Afterwards only the missing runs are made."""
    asked = []

    def script(name, teacher, output_dir, *arguments):
        n = arguments[arguments.index("--num_inference_steps") + 1]
        asked.append(n)
        if asked == [4, 6]:
            raise KeyboardInterrupt
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "comparison.json").write_text(f"{n} steps")

    monkeypatch.setenv(report.OUTPUT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(fits, "run_script", script)
    monkeypatch.setitem(fits.FITS, "digits", fits.Fit(steps=(4, 6, 8)))
    with pytest.raises(KeyboardInterrupt):
        fits.gauss_newton("digits", (4, 6, 8))
    output_dir = fits.gauss_newton("digits", (4, 6, 8))
    assert [fits.record_of(output_dir, n).read_text() for n in (4, 6, 8)] == ["4 steps", "6 steps", "8 steps"]
    assert asked == [4, 6, 6, 8]
    folders = {fits.gauss_newton("digits", [4], repeat) for repeat in range(3)}
    assert len(folders) == 3 and asked[4:] == [4] * 2
