"""Lists of noise levels and times: a pipeline's own ones, and those that a user chose."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import AysSchedules
from saved_schedulers import FLOW
from tiny_pipelines import build, final_state, plugged, record_steps

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMScheduler
from diffusers_gas.commands.convert import main
from diffusers_gas.schedulers.scheduling_utils import RequestedSteps


both = pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])
UNEVEN = [1.0, 0.9, 0.5, 0.1]
# How pipelines make their own lists.
OWN_LISTS = {
    "even": lambda n: np.linspace(1, 1 / n, n),
    "to 0.001": lambda n: np.linspace(1, 1e-3, n),
    "linear-quadratic (Mochi)": lambda n: 1 - np.linspace(0, 0.9, n) ** 2,
    "uniform in log SNR (Stable Audio 3)": lambda n: np.r_[1, 1 / (1 + np.exp(np.linspace(-6, 2, n + 1)[1:n]))],
    "shifted (ACE-Step)": lambda n: 3 * np.linspace(1, 1 / n, n) / (1 + 2 * np.linspace(1, 1 / n, n)),
}


def prepared(scheduler_class, config, n):
    """A scheduler with a solver or plan for n evaluations."""
    scheduler = scheduler_class.from_config(config)
    if scheduler_class is GASScheduler:
        scheduler.add_solver(GeneralizedSolver(n))
    else:
        scheduler.add_plan(scheduler.plan_for(n, mu=1.0))
    return scheduler


def asked_with(monkeypatch, tiny, scheduler, sigmas):
    """Samples with a pipeline that makes this list by itself, in the place of its own even one."""
    own = scheduler.set_timesteps

    def set_timesteps(num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        own(num_inference_steps, device, sigmas=given, mu=mu)

    given = list(sigmas)
    monkeypatch.setattr(scheduler, "set_timesteps", set_timesteps, raising=False)
    return final_state(tiny, scheduler, num_inference_steps=len(given), output_type="latent")


@both
@pytest.mark.parametrize("make", OWN_LISTS.values(), ids=OWN_LISTS)
def test_a_pipelines_own_list_says_how_many_steps_are_meant(make, scheduler_class, monkeypatch):
    tiny = build("stable-diffusion-3")
    scheduler = prepared(scheduler_class, tiny.pipe.scheduler.config, 6)
    expected = final_state(tiny, scheduler, num_inference_steps=6, output_type="latent")
    with monkeypatch.context() as patch:
        assert torch.equal(asked_with(patch, tiny, scheduler, make(6)), expected)
    with monkeypatch.context() as patch:
        if scheduler_class is GASScheduler:
            with pytest.raises(ValueError, match=r"5.*\[6\]"):
                asked_with(patch, tiny, scheduler, make(5))
        else:
            fewer = final_state(tiny, scheduler, num_inference_steps=5, output_type="latent")
            assert torch.equal(asked_with(patch, tiny, scheduler, make(5)), fewer)


@both
def test_a_pipeline_that_starts_in_the_middle_is_refused_by_a_trained_scheduler_and_followed_by_others(
    scheduler_class, monkeypatch
):
    """Stable Audio 3 makes variations of a sound by a list that begins at a lower noise level."""
    tiny = build("stable-diffusion-3")
    levels = np.linspace(0.6, 0.1, 6)
    scheduler = scheduler_class.from_config(tiny.pipe.scheduler.config)
    with monkeypatch.context() as patch:
        asked_with(patch, tiny, scheduler, levels)
    shift = tiny.flow_shift
    assert scheduler._steps.noise_levels[0] == pytest.approx(shift * 0.6 / (1 + (shift - 1) * 0.6), rel=1e-5)
    trained = prepared(scheduler_class, tiny.pipe.scheduler.config, 6)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"starts at noise level 0\.6"):
        asked_with(patch, tiny, trained, levels)


@both
@pytest.mark.parametrize("name", ["stable-diffusion-3", "flux"])  # Flux drops the list if it reads `use_flow_sigmas`
@pytest.mark.parametrize("sigmas", [UNEVEN, np.linspace(1, 0.25, 4).tolist()], ids=["uneven", "even"])
def test_a_users_list_is_followed_or_refused(sigmas, name, scheduler_class):
    tiny = build(name)
    config = tiny.pipe.scheduler.config
    untrained = scheduler_class.from_config(config)
    steps = record_steps(tiny, untrained, sigmas=sigmas, num_inference_steps=4, output_type="latent")
    told = list(dict.fromkeys(step.timestep.item() for step in steps))  # Heun steps ask twice at one time
    expected = [tiny.network_time(min(t, 0.999 if scheduler_class is SDMScheduler else 1)) for t in sigmas]
    assert told == pytest.approx(expected, abs=0.2)
    with pytest.raises(ValueError, match=r"cannot be chosen for a (trained|calibrated)"):
        final_state(tiny, prepared(scheduler_class, config, 4), sigmas=sigmas, num_inference_steps=4)


@both
@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl"])
@pytest.mark.parametrize(
    "lists", [{"timesteps": [999, 850, 600, 200]}, {"sigmas": [14.0, 6.0, 2.0, 0.4, 0.0]}], ids=["timesteps", "sigmas"]
)
def test_a_users_list_in_a_pipeline_with_betas(lists, name, scheduler_class):
    tiny = build(name)
    scheduler = scheduler_class.from_config(tiny.pipe.scheduler.config)
    steps = record_steps(tiny, scheduler, **lists, output_type="latent")
    told = [step.timestep.item() for step in steps]
    if "timesteps" in lists:
        assert list(dict.fromkeys(told)) == pytest.approx(lists["timesteps"], abs=1e-3)
    assert len(dict.fromkeys(told)) == 4
    trained = prepared(scheduler_class, tiny.pipe.scheduler.config, 4)
    with pytest.raises(ValueError, match="cannot be chosen"):
        final_state(tiny, trained, **lists)


def test_times_that_are_passed_to_sdm_are_those_of_gas():
    gas, sdm = GASScheduler(**FLOW), SDMScheduler(**FLOW, solver="dpmsolver++")
    for scheduler in (gas, sdm):
        scheduler.set_timesteps(timesteps=[990, 800, 500, 100])
    torch.testing.assert_close(gas.timesteps, sdm.timesteps)
    sdm = SDMScheduler(**FLOW)
    sdm.set_timesteps(timesteps=[990, 800, 500, 100])
    assert sdm.timesteps.unique_consecutive().tolist() == pytest.approx([990, 800, 500, 100], rel=1e-5)


def test_a_list_for_an_edm_network_begins_at_the_initial_noise():
    scheduler = SDMScheduler(sigma_data=0.5, sigma_max=80.0)
    scheduler.set_timesteps(sigmas=[80.0, 10.0, 1.0, 0.1, 0.0])
    with pytest.raises(ValueError, match=r"initial noise, 80\.0, got 40"):
        scheduler.set_timesteps(sigmas=[40.0, 10.0, 1.0, 0.1, 0.0])


def test_online_sampling_follows_a_list():
    scheduler = SDMScheduler(**FLOW, solver="heun", online=True, tau=1e-9)  # switches as early as it can
    scheduler.set_timesteps(sigmas=UNEVEN)
    x, told = torch.randn(1, 3, 4, 4, generator=torch.manual_seed(0)), []
    for t in scheduler.timesteps:
        told.append(t.item())
        x = scheduler.step((x.sin() + 0.1) * t / 1000, t, x).prev_sample
    assert len(dict.fromkeys(told)) == 4 < len(told) == scheduler.num_inference_steps <= 6


@both
@pytest.mark.parametrize("num_train_timesteps", [1, 1000])
def test_both_lists_must_be_the_same_noise_levels(num_train_timesteps, scheduler_class):
    config = {**FLOW, "num_train_timesteps": num_train_timesteps}
    scheduler, times = scheduler_class(**config), np.linspace(1, 0.1, 8)
    scheduler.set_timesteps(sigmas=times, timesteps=times * num_train_timesteps)
    with pytest.raises(ValueError, match="not the same noise levels"):
        scheduler.set_timesteps(sigmas=times, timesteps=0.9 * times * num_train_timesteps)


@both
def test_networks_may_be_told_times_from_0_to_1(scheduler_class):
    euler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=3.0)
    scheduler, usual = (scheduler_class.from_config(euler.config), scheduler_class(**{**FLOW, "flow_shift": 3.0}))
    for each in (scheduler, usual):
        each.set_timesteps(8)
    torch.testing.assert_close(1000 * scheduler.timesteps, usual.timesteps)
    assert scheduler.sigmas.tolist() == usual.sigmas.tolist()
    with pytest.raises(ValueError, match="from 2 to"):
        scheduler_class(num_train_timesteps=1)


def test_arguments_of_a_call_are_found_however_they_are_passed():
    tiny, seen = build("stable-diffusion-3"), []

    class Recorder(GASScheduler):
        def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
            seen.append(RequestedSteps.of(self, num_inference_steps, sigmas, timesteps).chosen)
            super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)

    with plugged(tiny.pipe, Recorder.from_config(tiny.pipe.scheduler.config)):
        inputs = {**tiny.inputs(1), "num_inference_steps": 3, "output_type": "latent"}
        tiny.pipe(**inputs)
        tiny.pipe(**inputs, sigmas=[1.0, 0.5, 0.2])
        tiny.pipe.__call__(**{**inputs, "sigmas": None})
        del inputs["num_inference_steps"]
        tiny.pipe(None, None, None, None, None, 3, [1.0, 0.5, 0.2], **inputs)
    assert seen == [False, True, False, True]


STABLE_DIFFUSION = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
SVD = EulerDiscreteScheduler(
    timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.002, sigma_max=700.0
)
FLUX = FlowMatchEulerDiscreteScheduler(shift=3.0)
MOCHI = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
OPTIMAL_STEPS = [0.9968, 0.9886, 0.9819, 0.975, 0.966, 0.9471, 0.9158, 0.8287, 0.5512, 0.2808, 0.001]
EDM_GRID = [80.0, 57.6, 27.0, 9.72, 2.92, 0.654, 0.085, 0.002]
LOWEST = 0.02916714  # that of timestep 0
TIMES, LEVELS, VIDEO = (AysSchedules[f"StableDiffusion{name}"] for name in ("Timesteps", "Sigmas", "VideoSigmas"))
# Published lists, with the number of their steps and the noise level at their end.
PUBLISHED = {
    "align your steps, times": (STABLE_DIFFUSION, {"timesteps": TIMES}, 10, 0),
    "times to 0": (STABLE_DIFFUSION, {"timesteps": [*TIMES, 0]}, 11, 0),
    "align your steps, levels": (STABLE_DIFFUSION, {"sigmas": LEVELS}, 10, 0),
    "their own last level": (STABLE_DIFFUSION, {"sigmas": [*LEVELS[:-1], 0.029]}, 10, 0.029),
    "a last level": (STABLE_DIFFUSION, {"sigmas": LEVELS[:-1]}, 9, 0.152),
    "the schedule's last level, then 0": (STABLE_DIFFUSION, {"sigmas": [*LEVELS[:-1], LOWEST, 0]}, 11, 0),
    "rounded last level, then 0": (STABLE_DIFFUSION, {"sigmas": [*LEVELS[:-1], 0.029, 0]}, 11, 0),
    "optimal steps": (FLUX, {"sigmas": OPTIMAL_STEPS}, 11, 0),
    "optimal steps, then 0": (FLUX, {"sigmas": [*OPTIMAL_STEPS, 0.0]}, 11, 0),
    "flow, times to 0": (FLUX, {"timesteps": [1000, 900, 500, 0]}, 3, 0),
    "inverted, times to the end": (MOCHI, {"timesteps": [0, 100, 500, 1000]}, 3, 1),
    "edm to its lowest level": (EDMEulerScheduler(), {"sigmas": EDM_GRID}, 7, 0.002),
    "edm to its lowest level, then 0": (EDMEulerScheduler(), {"sigmas": [*EDM_GRID, 0.0]}, 8, 0),
    "align your steps, video": (SVD, {"sigmas": VIDEO}, 10, 0),
}


@both
@pytest.mark.parametrize("theirs, lists, n, end", PUBLISHED.values(), ids=PUBLISHED)
def test_published_lists_end_where_they_end(scheduler_class, theirs, lists, n, end):
    settings = {} if scheduler_class is GASScheduler else {"solver": "dpmsolver++"}
    scheduler = scheduler_class.from_config(theirs.config, **settings)
    scheduler.set_timesteps(**lists)
    assert len(scheduler.timesteps) == n and scheduler.timesteps.isfinite().all()
    sigmas = scheduler.step_numbers().sigmas
    of_gas = scheduler_class is GASScheduler and end == 0 and sigmas[-2] > sigmas[-1] > 0
    assert sigmas[-1] == pytest.approx(end, rel=1e-2) or of_gas  # or t_end
    if "timesteps" in lists:
        assert scheduler.timesteps.tolist() == pytest.approx(lists["timesteps"][:n], abs=2)
    elif theirs is not FLUX:  # whose lists are those before the shift
        first = 1 if scheduler_class is GASScheduler and theirs is SVD else 0  # begins at its own highest level
        assert sigmas[first:n] == pytest.approx(lists["sigmas"][first:n], rel=1e-2)


@pytest.mark.parametrize("theirs, lists, n, end", PUBLISHED.values(), ids=PUBLISHED)
def test_published_lists_are_converted(tmp_path, theirs, lists, n, end):
    theirs.save_pretrained(tmp_path / "theirs")
    ((name, values),) = lists.items()
    flow_levels = theirs is FLUX and name == "sigmas"  # here with the final one, and after the shift
    arguments = ["--scheduler_config", str(tmp_path / "theirs" / "scheduler_config.json"), f"--{name}"]
    main(["times", *arguments, *map(str, values), "--output_dir", str(tmp_path / "ours")])
    scheduler = GASScheduler.from_pretrained(tmp_path / "ours")
    n -= flow_levels and values[-1] > 0
    scheduler.set_timesteps(n)
    sigmas = scheduler.step_numbers().sigmas
    if flow_levels:
        assert sigmas[:n] == pytest.approx(values[:n], rel=1e-4)
        end = values[-1]
    assert sigmas[-1] == pytest.approx(end, rel=1e-2) or (end == 0 and sigmas[-2] > sigmas[-1] > 0)


@both
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_noise_before_set_timesteps_is_not_shifted_by_a_resolution(scheduler_class, kind):
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, shift=3.0)
    ours = scheduler_class.from_config(theirs.config)
    sample, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    timestep = torch.tensor([700.0, 20.0])
    torch.testing.assert_close(ours.scale_noise(sample, timestep, noise), theirs.scale_noise(sample, timestep, noise))
