"""Schedulers by short descriptions, and what tells samplers apart."""

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from tiny_pipelines import build

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMPlan, SDMScheduler
from diffusers_gas.comparison import few_step_rivals
from diffusers_gas.pipelines.driving import scheduler_config
from diffusers_gas.pipelines.named_schedulers import check_step_counts, load_scheduler
from diffusers_gas.pipelines.teacher import default_teacher, fingerprint_of_scheduler


def learned_scheduler(pipe, *step_counts: int, scale: float = 1.0) -> GASScheduler:
    scheduler = GASScheduler.from_config(pipe.scheduler.config)
    for n in step_counts:
        solver = GeneralizedSolver(n)
        with torch.no_grad():
            for parameter in solver.parameters():
                parameter.add_(0.01 * scale)
        scheduler.add_solver(solver)
    return scheduler


def test_classes_and_their_settings(digits):
    scheduler = load_scheduler("DPMSolverMultistepScheduler:timestep_spacing=trailing,solver_order=3", digits)
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    assert (scheduler.config.timestep_spacing, scheduler.config.solver_order) == ("trailing", 3)
    assert scheduler.config.beta_end == digits.scheduler.config.beta_end
    assert load_scheduler("UniPCMultistepScheduler:use_karras_sigmas=true", digits).config.use_karras_sigmas is True
    assert isinstance(load_scheduler("SDMScheduler", digits), SDMScheduler)
    assert isinstance(load_scheduler("GASScheduler", digits), GASScheduler)


@pytest.mark.parametrize("name", ("stable-diffusion-3", "wan"))
def test_flow_matching_settings_are_translated(name):
    pipe = build(name).pipe
    config = load_scheduler("UniPCMultistepScheduler", pipe).config
    assert (config.use_flow_sigmas, config.prediction_type, config.flow_shift) == (True, "flow_prediction", 3.0)
    assert load_scheduler("FlowMatchEulerDiscreteScheduler", pipe).config.shift == 3.0


def test_folders(digits, tmp_path):
    learned_scheduler(digits, 4).save_pretrained(tmp_path / "ours")
    ours = load_scheduler(str(tmp_path / "ours"), digits)
    assert isinstance(ours, GASScheduler) and list(ours.solvers) == [4]
    UniPCMultistepScheduler(solver_order=3).save_pretrained(tmp_path / "theirs")
    assert load_scheduler(str(tmp_path / "theirs"), digits).config.solver_order == 3


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic shift"])
@pytest.mark.parametrize("kind", ["GAS", "GAS with theory for the others", "SDM"])
def test_refused_step_counts_are_those_that_sampling_refuses(kind, dynamic):
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": dynamic}
    if kind == "SDM":
        scheduler = SDMScheduler(**config)
        check_step_counts("untrained", scheduler, [4, 7])
        scheduler.add_plan(SDMPlan(torch.tensor([0.9, 0.5, 0.2, 0.1, 0.0], dtype=torch.float64), 3, "heun"))
    else:
        scheduler = GASScheduler(**config, use_theory_for_untrained_steps="theory" in kind)
        check_step_counts("untrained", scheduler, [4, 7])
        scheduler.add_solver(GeneralizedSolver(4, t_end=scheduler.theory_solver(4, mu=1.0).t_end))
    check_step_counts("mine", scheduler, [4])
    if kind == "GAS":
        with pytest.raises(ValueError, match=r"^mine: .* 7 .*\[4\]"):
            check_step_counts("mine", scheduler, [4, 7])
        with pytest.raises(ValueError, match="7"):
            scheduler.set_timesteps(7, mu=1.0 if dynamic else None)
    else:
        check_step_counts("mine", scheduler, [4, 7])
        scheduler.set_timesteps(7, mu=1.0 if dynamic else None)


def test_schedulers_of_diffusers_have_all_step_counts():
    check_step_counts("UniPC", UniPCMultistepScheduler(), [7])


@pytest.mark.parametrize("given", ["by position", "later"])
def test_settings_that_diffusers_counts_as_defaults_are_kept(digits, monkeypatch, given):
    scheduler = DDPMScheduler(50) if given == "by position" else DDPMScheduler()
    if given == "later":
        scheduler.config.num_train_timesteps = 50
    monkeypatch.setattr(digits, "scheduler", scheduler)
    assert scheduler_config(digits)["num_train_timesteps"] == 50
    others = [
        default_teacher(digits),
        load_scheduler("UniPCMultistepScheduler", digits),
        *few_step_rivals(digits).values(),
    ]
    assert [other.config.num_train_timesteps for other in others] == [50] * len(others)


def test_description_tells_samplers_apart(digits):
    def description(scheduler, n=4):
        return fingerprint_of_scheduler(scheduler, n)

    ours = learned_scheduler(digits, 4)
    assert description(ours) == description(learned_scheduler(digits, 4))
    again = learned_scheduler(digits, 4)
    again.register_to_config(_use_default_values=list(reversed(again.config["_use_default_values"])))
    assert description(ours) == description(again)  # another process has them in another order
    assert description(ours) == description(learned_scheduler(digits, 4, 5))  # others' step counts do not matter
    assert description(ours) != description(learned_scheduler(digits, 4, scale=2.0))
    unipc = [load_scheduler(f"UniPCMultistepScheduler:solver_order={order}", digits) for order in (2, 3)]
    different = [description(ours), description(unipc[0]), description(unipc[1]), description(unipc[0], 5)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


@pytest.mark.parametrize(
    "entry, message",
    [
        ("BestScheduler", "neither a scheduler class of Diffusers or of this package nor a folder"),
        ("UNet2DModel", "neither a scheduler class"),
        ("UniPCMultistepScheduler:speed=3", r"'speed=3' is not name=value with .*'solver_order'"),
        ("UniPCMultistepScheduler:solver_order", "'solver_order' is not name=value"),
    ],
)
def test_bad_entries(digits, entry, message):
    with pytest.raises(ValueError, match=message):
        load_scheduler(entry, digits)


def test_bad_folders(digits, tmp_path):
    with pytest.raises(OSError):
        load_scheduler(str(tmp_path / "nothing"), digits)
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "BestScheduler"}')
    with pytest.raises(ValueError, match="has a BestScheduler, which is not a scheduler"):
        load_scheduler(str(tmp_path), digits)
