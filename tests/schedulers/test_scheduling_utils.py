"""What both schedulers share: settings, the numbers of a sampling, counts of steps."""

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from saved_schedulers import CONFIGS, FLOW, STABLE_DIFFUSION, load_sampler, planned_scheduler, trained_scheduler
from torch import Tensor

from diffusers_gas import GASScheduler, SDMPlan, SDMScheduler
from diffusers_gas.generalized_solver import GeneralizedSolver
from diffusers_gas.schedulers import scheduling_utils
from diffusers_gas.schedulers.configs import translate_config


both = pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])


@pytest.fixture
def built(monkeypatch) -> list:
    """Arguments of every noise schedule that is built from a config."""
    calls = []
    original = scheduling_utils.noise_schedule_from_config

    def build(config, *arguments):
        calls.append(arguments)
        return original(config, *arguments)

    monkeypatch.setattr(scheduling_utils, "noise_schedule_from_config", build)
    return calls


def test_loading_many_solvers_builds_the_noise_schedule_once(tmp_path, built):
    trained_scheduler(4, 6, 8, 10).save_pretrained(tmp_path)
    built.clear()
    scheduler = GASScheduler.from_pretrained(tmp_path)
    for n in (4, 6, 8, 10, 4):
        scheduler.set_timesteps(n)
    copy.deepcopy(scheduler).set_timesteps(6)
    assert len(built) == 1


@both
def test_a_changed_setting_changes_the_noise_schedule(scheduler_class):
    scheduler = scheduler_class()
    scheduler.set_timesteps(6)
    before = scheduler.sigmas.clone()
    scheduler.register_to_config(beta_end=0.012)
    scheduler.set_timesteps(6)
    assert not torch.equal(scheduler.sigmas, before)
    fresh = scheduler_class(beta_end=0.012)
    fresh.set_timesteps(6)
    torch.testing.assert_close(scheduler.sigmas, fresh.sigmas)


@both
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_second_sampling_uses_the_numbers_of_the_first(scheduler_class, config):
    scheduler = scheduler_class(**config)
    mu = 0.7 if config.get("use_dynamic_shifting") else None
    scheduler.set_timesteps(6, mu=mu)
    steps, timesteps = scheduler._steps, scheduler.timesteps.clone()
    scheduler.timesteps.zero_()  # whatever a pipeline does to its tensor
    scheduler.set_timesteps(6, mu=mu)
    assert scheduler._steps is steps and torch.equal(scheduler.timesteps, timesteps)
    scheduler.set_timesteps(7, mu=mu)
    assert scheduler._steps is not steps and len(scheduler.timesteps) == 7
    if mu is not None:
        scheduler.set_timesteps(6, mu=1.2)
        assert not torch.equal(scheduler.timesteps, timesteps)


def test_a_solver_that_learns_between_samplings_is_not_forgotten():
    """Also where PyTorch does not count the change of a parameter, as in `EMAModel.copy_to`."""
    scheduler = trained_scheduler(4)
    scheduler.set_timesteps(4)
    before = scheduler.timesteps.clone()
    scheduler.solvers[4].timestep_logits.data.add_(0.3)
    scheduler.set_timesteps(4)
    assert not torch.equal(scheduler.timesteps, before)


def test_a_plan_that_is_replaced_is_not_forgotten():
    scheduler = SDMScheduler()
    plan = scheduler.plan_for(8)
    scheduler.add_plan(plan)
    scheduler.set_timesteps(8)
    before = scheduler.timesteps.clone()
    scheduler.add_plan(SDMPlan(plan.sigmas * 0.9, plan.switch_index, plan.solver))
    scheduler.set_timesteps(8)
    assert not torch.equal(scheduler.timesteps, before)


def test_plans_are_equal_if_they_sample_alike():
    plan = SDMScheduler().plan_for(8)
    same = SDMPlan(plan.sigmas.clone(), plan.switch_index, plan.solver, {"distance": 1.0})
    assert plan == same and len({plan, same}) == 1
    assert plan != SDMPlan(plan.sigmas * 0.9, plan.switch_index, plan.solver)
    assert plan != "a plan"


def lists_of_sigmas(config: dict) -> list[float]:
    """What Diffusers pipelines pass for 8 steps."""
    if config.get("use_flow_sigmas"):
        return torch.linspace(1, 1 / 8, 8).tolist()
    return [*torch.linspace(10, 1, 8).tolist(), 0.0]


@both
@pytest.mark.parametrize("name", ["scaled-linear", "flow"])
def test_lists_of_sigmas_mean_the_same_number_of_steps_to_both(scheduler_class, name):
    scheduler = scheduler_class(**CONFIGS[name])
    sigmas = lists_of_sigmas(CONFIGS[name])
    if name == "scaled-linear" and scheduler_class is SDMScheduler:
        sigmas = torch.linspace(10, 0, 9).tolist()  # evenly spaced, which is all that SDM takes
    scheduler.set_timesteps(sigmas=sigmas)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 8
    with pytest.raises(ValueError, match="`num_inference_steps` is 9, but"):
        scheduler.set_timesteps(9, sigmas=sigmas)


@both
@pytest.mark.parametrize("number", [None, 0, -3, 4.5, "4", torch.tensor(0)])
def test_no_steps_are_refused(scheduler_class, number):
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler_class().set_timesteps(number)


@pytest.mark.parametrize("number", [torch.tensor(8), np.int64(8), np.float32(8), 8.0])
def test_a_number_of_steps_of_any_kind_finds_what_was_learned(number, caplog):
    gas, sdm = trained_scheduler(8, use_theory_for_untrained_steps=True), planned_scheduler(8)
    for scheduler in (gas, sdm):
        scheduler.set_timesteps(8)
        expected = scheduler.timesteps
        scheduler.set_timesteps(number)
        assert torch.equal(scheduler.timesteps, expected) and not caplog.text


def test_the_last_of_the_online_times_is_the_last_that_is_planned():
    scheduler = SDMScheduler(solver="heun", online=True)
    scheduler.set_timesteps(12)
    times = scheduler.timesteps
    assert len(times) < 12 and times[-1] == list(times)[-1] and times[len(times) - 1].isfinite()
    with pytest.raises(IndexError):
        times[len(times)]
    assert list(times[2:]) == list(times)[2:]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"entropy_bound": 1, "beta_schedule": "linear"}, r"^The config has `entropy_bound`"),
        ({"num_train_timesteps": 10}, r"^The config has none of"),
        ({"_class_name": "SomeScheduler"}, r"^The config of SomeScheduler has none of"),
    ],
)
def test_errors_name_a_config_only_if_it_has_a_name(config, message):
    with pytest.raises(ValueError, match=message):
        translate_config(config)


@pytest.mark.parametrize("n", [8, 20])
def test_theory_of_second_order_remembers_two_predictions(n):
    """As `DPMSolverMultistepScheduler` does: memory must not grow with the number of steps."""
    ours, theirs = GASScheduler(), DPMSolverMultistepScheduler(solver_order=2)
    ours.set_timesteps(n)
    x = torch.randn(1, 3, 4, 4)
    for t in ours.timesteps[:-1]:
        x = ours.step(0.1 * x, t, x).prev_sample
        assert sum(tensor.numel() > 0 for tensor in ours._history.terms) <= theirs.config.solver_order


def test_a_plan_remembers_two_predictions():
    scheduler = SDMScheduler()
    scheduler.set_timesteps(20)
    x = torch.randn(1, 3, 4, 4)
    for t in scheduler.timesteps[:-1]:
        x = scheduler.step(0.1 * x, t, x).prev_sample
        assert sum(tensor.numel() > 0 for tensor in scheduler._history.terms) <= 2


@both
def test_a_network_may_be_told_noise_levels_before_the_shift(scheduler_class):
    """CogView4 passes both lists. Its network is told the integer timesteps, while its states are shifted."""
    scheduler = scheduler_class(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    timesteps = np.linspace(1000, 1, 8).astype(np.int64).astype(np.float32)
    scheduler.set_timesteps(sigmas=timesteps / 1000, timesteps=timesteps)
    told, levels = scheduler.timesteps.double() / 1000, torch.tensor(scheduler._steps.noise_levels[:-1]).double()
    assert len(told) == 8
    torch.testing.assert_close(levels, 3 * told / (1 + 2 * told), rtol=1e-4, atol=1e-4)
    scheduler.set_timesteps(8)
    torch.testing.assert_close(
        scheduler.timesteps.double() / 1000,
        torch.tensor(scheduler._steps.noise_levels[:-1]).double(),
        rtol=1e-4,
        atol=1e-4,
    )
    with pytest.raises(ValueError, match="not the same noise levels"):
        scheduler.set_timesteps(sigmas=timesteps / 1000, timesteps=timesteps / 2)


@both
def test_ascending_lists_are_refused(scheduler_class):
    """Cosmos' pipelines pass them for a parametrization of their own."""
    scheduler = scheduler_class(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="sigmas"):
        scheduler.set_timesteps(sigmas=torch.linspace(0, 1, 8).tolist())


@both
def test_truncated_timesteps_are_found(scheduler_class):
    """Some pipelines hand back integers."""
    scheduler = scheduler_class(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=7.0)
    scheduler.set_timesteps(6)
    times = scheduler.timesteps.tolist()
    for k, t in enumerate(times):
        assert scheduler.index_for_timestep(int(t)) == scheduler.index_for_timestep(torch.tensor(t)) >= k
        assert times[scheduler.index_for_timestep(t)] == t
    with pytest.raises(ValueError, match="is not one of"):
        scheduler.index_for_timestep(2000)


@both
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_training_code_finds_the_betas(scheduler_class, beta_schedule):
    ours, theirs = scheduler_class(beta_schedule=beta_schedule), DDPMScheduler(beta_schedule=beta_schedule)
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert not hasattr(scheduler_class(use_flow_sigmas=True, prediction_type="flow_prediction"), "betas")


@pytest.mark.parametrize(
    "scheduler_class, change",
    [
        (GASScheduler, {"solver_order": 3}),
        (GASScheduler, {"use_karras_sigmas": True}),
        (GASScheduler, {"t_start": 0.9}),
        (GASScheduler, {"prediction_type": "v_prediction"}),
        (SDMScheduler, {"prediction_type": "v_prediction"}),
        (SDMScheduler, {"solver": "dpmsolver++"}),
        (SDMScheduler, {"t_end": 0.01}),
        (SDMScheduler, {"online": True}),
    ],
)
def test_a_setting_that_changes_between_samplings_is_followed(scheduler_class, change):
    scheduler, fresh = scheduler_class(), scheduler_class(**change)
    scheduler.set_timesteps(8)
    scheduler.register_to_config(**change)
    for one in (scheduler, fresh):
        one.set_timesteps(8)
    torch.testing.assert_close(scheduler.timesteps, fresh.timesteps, rtol=0, atol=0, equal_nan=True)
    generator = torch.Generator().manual_seed(0)
    output, sample = torch.randn(2, 1, 1, 8, 8, generator=generator)
    states = [one.step(output, one.timesteps[0], sample).prev_sample for one in (scheduler, fresh)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{"t_start": 0.9}, {"order": 2}, {"parameterization": "linear_multistep"}])
def test_a_solver_with_equal_parameters_and_another_config_is_another(settings):
    assert GeneralizedSolver(3).content() != GeneralizedSolver(3, **settings).content()
    assert GeneralizedSolver(3, **settings).content() == GeneralizedSolver(3, **settings).content()


@both
def test_shifts_may_be_tensors_and_are_not_kept_for_ever(scheduler_class, built):
    scheduler = scheduler_class(use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True)
    built.clear()
    for _ in range(3):
        scheduler.set_timesteps(8, mu=torch.tensor(0.5))
    assert len(built) == 1
    for k in range(100):
        scheduler.noise_schedule(mu=k / 100)
    assert len(vars(scheduler)["_noise_schedules"]) <= 20


NEW_SHIFTS: dict[str, Callable[[Any, str], Any]] = {
    "from_config": lambda old, name: type(old).from_config(old.config, **{name: 9.0}),
    "register": lambda old, name: old.register_to_config(**{name: 9.0}),
    "set_shift": lambda old, name: old.set_shift(np.float32(9)),
    "attribute": lambda old, name: setattr(old.config, name, torch.tensor(9.0)),
}


@both
@pytest.mark.parametrize("name", ["shift", "flow_shift"])
@pytest.mark.parametrize("way", NEW_SHIFTS.values(), ids=NEW_SHIFTS)
def test_a_new_shift_replaces_the_old_one_under_both_names(way, name, scheduler_class, tmp_path):
    old = scheduler_class.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    new = way(old, name) or old
    new.save_pretrained(tmp_path)
    for one in (new, scheduler_class.from_pretrained(tmp_path)):
        assert one.config.flow_shift == one.config.shift == one.noise_schedule().shift == 9.0
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path).shift == 9.0


FLOW_MATCHING = {
    "unipc": lambda ours: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "euler": lambda ours: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "ours": lambda ours: ours(use_flow_sigmas=True, prediction_type="flow_prediction"),
    "ours with both names": lambda ours: ours.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config),
}


@both
@pytest.mark.parametrize("original", FLOW_MATCHING.values(), ids=FLOW_MATCHING)
def test_a_config_that_says_two_things_is_refused(original, scheduler_class):
    """An attribute was set, or an entry replaced: the config does not say which. The shift has two names."""
    names = {"flow_shift", "shift"}
    for name in names & original(scheduler_class).config.keys():
        config = original(scheduler_class).config
        merged, copied = config | {name: 9.0}, copy.deepcopy(config)
        copied[name] = 9.0
        setattr(config, name, 9.0)
        for edited in (merged, copied, config):
            with pytest.raises(ValueError, match=r"shift` is .* as an entry of the config and .* as its attribute"):
                scheduler_class.from_config(edited)
            for given in names:
                assert scheduler_class.from_config(edited, **{given: 9.0}).noise_schedule().shift == 9.0
        plain = {**config, **dict.fromkeys(names & config.keys(), 9.0)}
        assert scheduler_class.from_config(plain).noise_schedule().shift == 9.0


@both
def test_settings_of_other_classes_may_say_two_things(scheduler_class):
    """Users and pipelines set them, for the steps of Diffusers' scheduler."""
    euler = EulerDiscreteScheduler(beta_end=0.015)
    euler.config.timestep_spacing = "trailing"
    for config in (euler.config, EulerDiscreteScheduler(beta_end=0.015).config | {"timestep_spacing": "trailing"}):
        assert scheduler_class.from_config(config).config.beta_end == 0.015


@pytest.mark.parametrize("learned", [trained_scheduler, planned_scheduler])
@pytest.mark.parametrize(
    "name, value", [("beta_end", 0.03), ("prediction_type", "v_prediction"), ("use_flow_sigmas", True)]
)
def test_what_was_learned_stays_with_its_noise_schedule(name, value, learned, tmp_path):
    scheduler, edited = learned(8), learned(8)
    setattr(edited.config, name, value)
    uses = [lambda: edited.set_timesteps(8), lambda: edited.save_pretrained(tmp_path)]
    for use in (*uses, lambda: scheduler.register_to_config(**{name: value})):
        with pytest.raises(ValueError, match=rf"`{name}` cannot be .*, as the solvers are for"):
            use()
    scheduler.register_to_config(**{name: scheduler.config[name]})
    scheduler.set_timesteps(8)
    assert getattr(type(scheduler).from_config(scheduler.config, **{name: value}).config, name) == value


@pytest.mark.parametrize("scheduler, name", [(GASScheduler(), "solvers"), (SDMScheduler(), "plans")])
def test_what_was_learned_is_not_replaced_beside_what_is_saved(scheduler, name):
    """A mapping put in its place would be sampled with and not saved, or the reverse."""
    assert getattr(scheduler, name) is scheduler.learned and getattr(copy.deepcopy(scheduler), name) == {}
    with pytest.raises(AttributeError):
        setattr(scheduler, name, {})


def test_the_end_of_learned_solvers_stays(tmp_path):
    """Another one was not sampled to, and the saved folder did not load. Plans have noise levels instead."""
    with pytest.raises(ValueError, match=r"`t_end` cannot be 0\.02, as the solvers are for 0\.001"):
        trained_scheduler(8).register_to_config(t_end=0.02)
    to_data = GASScheduler()
    for scheduler, add in ((planned_scheduler(8), None), (to_data, to_data.untrained_solver(30))):
        if add is not None:
            scheduler.add_solver(add)
        scheduler.register_to_config(t_end=0.02)
        scheduler.save_pretrained(tmp_path)
        assert type(scheduler).from_pretrained(tmp_path).config.t_end == 0.02


@both
@pytest.mark.parametrize("name", ["flow_shift", "shift"])
def test_printing_a_scheduler_leaves_it_as_it_is(name, scheduler_class):
    scheduler = scheduler_class(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    config = scheduler.config
    setattr(config, name, 9.0)
    assert scheduler.noise_schedule().shift == 9.0
    assert f'"{name}": 9.0' in repr(scheduler)
    assert scheduler.config is config
    assert scheduler.noise_schedule().shift == 9.0


@both
def test_a_subclass_may_have_settings_of_its_own(scheduler_class):
    class Own(scheduler_class):
        @register_to_config
        def __init__(self, extra: int = 1, num_train_timesteps: int = 1000):
            super().__init__(num_train_timesteps=num_train_timesteps)

    assert Own(extra=2).config.extra == 2
    with pytest.raises(ValueError, match="`num_train_timesteps` must be"):
        Own(num_train_timesteps=1e9)


@both
@pytest.mark.parametrize(
    "settings",
    [{"t_end": "x"}, {"beta_start": None}, {"num_train_timesteps": 1e9}, {"prediction_type": "v-prediction"}],
)
def test_wrong_settings_are_refused_whenever_they_are_set(settings, scheduler_class):
    scheduler = scheduler_class()
    for way in (scheduler_class, scheduler.register_to_config):
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be"):
            way(**settings)
    assert scheduler.config == scheduler_class().config
    scheduler.config.prediction_type = "v-prediction"
    with pytest.raises(ValueError, match=r"`prediction_type` must be one of .*, got 'v-prediction'"):
        scheduler.set_timesteps(8)


@both
def test_a_kind_of_noise_that_was_set_as_an_attribute_is_followed(scheduler_class):
    scheduler, expected = scheduler_class(), scheduler_class(**FLOW)
    for name, value in FLOW.items():
        setattr(scheduler.config, name, value)
    for one in (scheduler, expected):
        one.set_timesteps(5, sigmas=[1.0, 0.9, 0.6, 0.4, 0.2])
    assert torch.equal(scheduler.timesteps, expected.timesteps)


@both
def test_a_file_in_which_one_of_two_names_was_changed_is_a_warning(scheduler_class, tmp_path, caplog):
    scheduler_class(**FLOW).save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"shift": 9.0}))
    assert scheduler_class.from_pretrained(tmp_path).config.shift == settings["flow_shift"]
    assert "and `shift` 9.0 are one setting" in caplog.text


NUMBERS = {
    "float": {"beta_end": np.float32(0.015)},
    "integer": {"num_train_timesteps": np.int64(900)},
    "tensor": {"beta_start": torch.tensor(3e-4)},
    "array": {"trained_betas": np.linspace(1e-4, 0.015, 1000)},
    "list": {"trained_betas": [np.float32(beta) for beta in np.linspace(1e-4, 0.015, 1000)]},
}


@both
@pytest.mark.parametrize("as_attributes", [False, True], ids=["set", "attributes"])
@pytest.mark.parametrize("settings", NUMBERS.values(), ids=NUMBERS)
def test_settings_of_any_kind_are_saved_as_they_are_followed(settings, as_attributes, scheduler_class, tmp_path):
    scheduler = scheduler_class(**({} if as_attributes else settings))
    for name, value in settings.items() if as_attributes else ():
        setattr(scheduler.config, name, value)
    scheduler.save_pretrained(tmp_path)
    samplings = [scheduler, scheduler_class.from_pretrained(tmp_path), scheduler_class()]
    for one in samplings:
        one.set_timesteps(8)
    followed, saved, default = (one.sigmas for one in samplings)
    assert torch.equal(followed, saved) and not torch.equal(followed, default)


@both
def test_noise_of_edm_networks_does_not_depend_on_the_steps(scheduler_class):
    """Their times are within -2 and 2, so that 0 is the integer part of many."""
    scheduler = scheduler_class(sigma_data=0.5)
    zeros, ones, times = torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0.0])
    before = scheduler.add_noise(zeros, ones, times)
    scheduler.set_timesteps(8)
    torch.testing.assert_close(scheduler.add_noise(zeros, ones, times), before)


@both
def test_noise_of_integer_timesteps_does_not_depend_on_the_steps(scheduler_class):
    scheduler = scheduler_class()
    zeros, ones, times = torch.zeros(1000, 1), torch.ones(1000, 1), torch.arange(1000)
    before = scheduler.add_noise(zeros, ones, times)
    scheduler.set_timesteps(8)
    torch.testing.assert_close(scheduler.add_noise(zeros, ones, times), before, rtol=1e-5, atol=1e-6)


def test_data_predictions_are_those_of_the_first_step_of_an_image_to_image_pipeline():
    scheduler = GASScheduler()
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(3)
    generator = torch.Generator().manual_seed(0)
    output, sample = torch.randn(2, 1, 1, 8, 8, generator=generator)
    alpha = scheduler.alphas_cumprod.sqrt()
    t = float(scheduler.timesteps[3])
    low, high = int(t), int(t) + 1
    log_alpha = alpha[low].log() + (t - low) * (alpha[high] / alpha[low]).log()
    expected = (sample - (1 - (2 * log_alpha).exp()).sqrt() * output) / log_alpha.exp()
    torch.testing.assert_close(scheduler.convert_model_output(output, sample), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_copies_warn_of_lost_solvers_and_the_package_itself_does_not(copied, caplog):
    scheduler, plans = copied(trained_scheduler(4)), SDMScheduler()
    GASScheduler.from_config(scheduler.config)
    assert "[4] steps" in caplog.text
    caplog.clear()
    plans.add_plan(plans.plan_for(8))
    plans.initial_solver(4)
    assert not caplog.text


# Loops that are not Diffusers'


def of_all_kinds() -> dict[str, tuple[Any, int]]:
    """Schedulers and their numbers of steps."""
    return {
        "gas": (trained_scheduler(5, **STABLE_DIFFUSION), 5),
        "gas-whole": (trained_scheduler(5, round_timesteps=True), 5),
        "gas-flow": (trained_scheduler(5, **FLOW), 5),
        "gas-edm": (trained_scheduler(5, sigma_data=0.5), 5),
        "heun": (SDMScheduler(**STABLE_DIFFUSION), 9),
        "heun-early": (SDMScheduler(**STABLE_DIFFUSION, tau=1e-9, round_timesteps=True), 9),
        "heun-flow": (SDMScheduler(**FLOW), 8),
        "heun-edm": (SDMScheduler(sigma_data=0.5), 8),
        "heun-exploding": (SDMScheduler(exploding_sigmas=[0.01, 80.0]), 8),
        "heun-plan": (planned_scheduler(8, **STABLE_DIFFUSION), 8),
        "dpmsolver++": (SDMScheduler(**STABLE_DIFFUSION, solver="dpmsolver++"), 6),
        "unipc": (SDMScheduler(**FLOW, solver="unipc"), 6),
    }


def whole_numbers(times: Tensor) -> Any:
    return times.numpy().astype(np.int64) if torch.equal(times, times.round()) else times.numpy()


COPIES = {
    "view": lambda times: times,
    "clone": torch.clone,
    "moved": lambda times: times.to("cpu", copy=True),
    "list": lambda times: times.tolist(),
    "numpy": whole_numbers,
}


def loop(
    scheduler: Any, n: int, begin: int, copied: Callable[[Tensor], Any] | None = None, replaces: bool = False
) -> Tensor:
    """A host's own image-to-image loop over a part of `timesteps` or a copy of it. Without a copy it sets the begin index.

    Some hosts put what they loop over in the place of `timesteps`.
    """
    scheduler.set_timesteps(n)
    times = scheduler.timesteps[begin:] if copied is None else copied(scheduler.timesteps[begin:])
    if copied is None:
        scheduler.set_begin_index(begin)
    if replaces:
        scheduler.timesteps = torch.as_tensor(times)
    data, noise = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    x = scheduler.add_noise(data, noise, times[:1])
    assert torch.equal(scheduler.scale_noise(data, times[:1], noise), x)
    for t in times:
        given = scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.sin(1.3 * given + float(t) / 500), t, x).prev_sample
    return x


@pytest.mark.parametrize("exported", [False, True], ids=["scheduler", "exported"])
@pytest.mark.parametrize("kind", of_all_kinds())
def test_copied_timesteps_may_be_cut_anywhere(kind, exported, tmp_path):
    """Also at either half of a Heun step, where two timesteps are the same."""
    scheduler, n = of_all_kinds()[kind]
    if exported:
        scheduler.export(tmp_path / "solver.json", [n])
        scheduler = load_sampler().from_json(tmp_path / "solver.json")
    for begin in range(n):
        expected = loop(scheduler, n, begin)
        for name, copied in COPIES.items():
            for replaces in (False, True):
                result = loop(scheduler, n, begin, copied, replaces)
                torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6, msg=f"{name}, {begin}, {replaces}")


@both
def test_other_timesteps_than_those_of_the_sampling_are_refused(scheduler_class):
    scheduler, sample = scheduler_class(), torch.randn(1, 1, 2, 2)
    scheduler.set_timesteps(6)
    scheduler.timesteps = scheduler.timesteps - 20.5
    with pytest.raises(ValueError, match="is not one of those"):
        scheduler.step(sample, scheduler.timesteps[0], sample)


def test_equal_timesteps_are_those_of_diffusers_heun():
    ours, theirs = SDMScheduler(), HeunDiscreteScheduler()
    for scheduler, n in ((ours, 9), (theirs, 5)):
        scheduler.set_timesteps(n)
        times = scheduler.timesteps.tolist()
        found = [scheduler.index_for_timestep(t) for t in times]
        assert found == [0, *(k + 1 if times[k + 1 : k + 2] == [times[k]] else k for k in range(1, len(times)))]


def test_timesteps_that_rounding_made_equal_are_sampled_from_the_first():
    scheduler = trained_scheduler(4, round_timesteps=True)
    scheduler.solvers[4].timestep_offsets.data[1] = scheduler.solvers[4].times().diff()[0].abs()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    for copied in COPIES.values():
        torch.testing.assert_close(loop(scheduler, 4, 0, copied), loop(scheduler, 4, 0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("copied", [name for name in COPIES if name != "view"])
def test_online_times_cannot_be_copied(copied):
    """They are decided during sampling."""
    scheduler = SDMScheduler(solver="heun", online=True)
    with pytest.raises(ValueError, match=r"loop over `scheduler\.timesteps` itself"):
        loop(scheduler, 12, 0, lambda times: COPIES[copied](times.as_subclass(Tensor)))
    torch.testing.assert_close(loop(scheduler, 12, 0, COPIES["view"]), loop(scheduler, 12, 0))
    multistep = SDMScheduler(online=True, solver="unipc")
    torch.testing.assert_close(loop(multistep, 8, 0, COPIES[copied]), loop(multistep, 8, 0))


# Noise in a training loop


@pytest.mark.parametrize("steps", [False, True], ids=["fresh", "after-set-timesteps"])
@pytest.mark.parametrize(
    "config", [*CONFIGS.values(), {"exploding_sigmas": [0.01, 80.0]}], ids=[*CONFIGS, "exploding"]
)
def test_noise_levels_of_a_batch_of_times(config, steps):
    """At steps of the sampling they are those of its states. Precision is float32 on a device, float64 otherwise."""
    scheduler = trained_scheduler(5, **config)
    noise_schedule = scheduler.noise_schedule(mu=1.0)
    t = torch.linspace(0.01, 1, 37, dtype=torch.float64)
    times, alphas, sigmas = noise_schedule.timestep(t), noise_schedule.alpha(t), noise_schedule.sigma(t)
    if steps:
        scheduler.set_timesteps(5, mu=0.3)
        numbers = scheduler.step_numbers()
        times = torch.cat([times, scheduler.timesteps.double()])
        alphas, sigmas = (
            torch.cat([alphas, torch.tensor(numbers.alphas[:-1]).double()]),
            torch.cat([sigmas, torch.tensor(numbers.noise_levels[:-1]).double()]),
        )
    data, noise = torch.randn(2, len(times), 3, generator=torch.Generator().manual_seed(0)).double()
    expected = alphas[:, None] * data + sigmas[:, None] * noise
    torch.testing.assert_close(scheduler.add_noise(data, noise, times), expected, rtol=1e-5, atol=1e-6)
    source = scheduler.step_numbers() if steps else noise_schedule
    for level, exact in zip(source.levels_at(times.float()), (alphas, sigmas)):
        assert level.dtype == torch.float32
        torch.testing.assert_close(level.double(), exact, rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_noising_a_batch_reads_nothing_of_the_device(config, dtype):
    """A meta tensor has nothing to read."""
    scheduler = trained_scheduler(5, **config)
    data = torch.randn(6, 3, 4, 4, device="meta", dtype=torch.float16)
    times = torch.zeros(6, device="meta", dtype=dtype)
    for _ in range(2):
        result = scheduler.add_noise(data, data, times)
        assert result.device.type == "meta" and result.dtype == torch.float16 and result.shape == data.shape
        scheduler.set_timesteps(5, mu=0.3)
