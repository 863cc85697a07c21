"""Pipelines whose states, outputs or calls of `step` are of a kind of their own."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    Cosmos2TextToImagePipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LTXConditionPipeline,
    SchedulerMixin,
    StableCascadePriorPipeline,
)
from first_order import at_times
from saved_schedulers import STABLE_DIFFUSION
from tiny_components import SIZE, TinyPipeline, embeddings
from tiny_pipelines import build, record_steps
from tiny_video_and_audio import ltx_network
from torch import Tensor

from diffusers_gas import GASScheduler, GeneralizedSolver, SampleInputs, SDMPlan, SDMScheduler, calibrate, distill
from diffusers_gas.comparison import training_free_schedulers
from diffusers_gas.pipelines.driving import differentiable_rollout, drive
from diffusers_gas.pipelines.teacher import default_teacher
from diffusers_gas.schedulers.scheduling_utils import REFUSED_PIPELINES


both = pytest.mark.parametrize("scheduler_class", [GASScheduler, SDMScheduler])


class Guard:
    """In the place of Cosmos' guardrail models."""

    def to(self, device: Any) -> "Guard":
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True


def cosmos(pipeline_class: type[DiffusionPipeline], scheduler: SchedulerMixin) -> TinyPipeline:
    torch.manual_seed(0)
    network = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    components = {"text_encoder": None, "tokenizer": None, "vae": None, "safety_checker": Guard()}
    pipe = pipeline_class(transformer=network.eval(), scheduler=scheduler, **components)

    def inputs(batch_size: int) -> dict[str, Any]:
        return {**embeddings(pipe, batch_size), "height": 64, "width": 64, "output_type": "latent"}

    return TinyPipeline(pipe, inputs, (4, 1, SIZE, SIZE))


@pytest.fixture
def cosmos_2() -> TinyPipeline:
    return cosmos(Cosmos2TextToImagePipeline, FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True))


def test_cosmos_2_samples_variance_exploding_states(cosmos_2):
    euler = cosmos_2.pipe.scheduler
    # The pipeline lets Euler's last step lead nowhere, so that 8 steps end at the lowest level after 7.
    expected = record_steps(cosmos_2, euler, num_inference_steps=8)[6].prev_sample
    first_order = GASScheduler.from_config(euler.config, solver_order=1, t_end=0.0)
    steps = record_steps(cosmos_2, first_order, num_inference_steps=7)
    assert steps[0].sample.std() == pytest.approx(80, rel=0.2)
    torch.testing.assert_close(steps[-1].prev_sample, expected, rtol=1e-3, atol=1e-3)
    levels = torch.tensor(steps_levels := euler.sigmas[:8].tolist(), dtype=torch.float64)
    sdm = SDMScheduler.from_config(euler.config)
    sdm.add_plan(SDMPlan(torch.cat([levels, levels.new_zeros(1)]), len(steps_levels) - 1))
    torch.testing.assert_close(
        record_steps(cosmos_2, sdm, num_inference_steps=8)[6].prev_sample, expected, rtol=1e-3, atol=1e-3
    )


@both
def test_cosmos_2_can_be_sampled_and_keeps_what_its_pipeline_reads(cosmos_2, scheduler_class):
    scheduler = scheduler_class.from_config(cosmos_2.pipe.scheduler.config)
    assert len(record_steps(cosmos_2, scheduler, num_inference_steps=8)) == 8
    assert (scheduler.config.sigma_data, scheduler.config.sigma_max) == (1.0, 80.0)
    again = scheduler_class.from_config(scheduler.config)
    assert again.noise_schedule(mu=1.0).sigma(torch.tensor(1.0)).item() == pytest.approx(80)


def test_cosmos_2_is_distilled_and_calibrated(cosmos_2):
    pipe = cosmos_2.pipe
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(default_teacher(pipe), FlowMatchEulerDiscreteScheduler)
    assert list(training_free_schedulers(pipe.scheduler.config)) == ["Euler"]
    arguments = {name: value[:1] for name, value in embeddings(pipe, 1).items()}
    inputs = SampleInputs.create(0, 5, [arguments], height=64, width=64)
    record = distill(pipe, 3, inputs=inputs, teacher_num_inference_steps=8, max_iterations=2).solvers[3].provenance
    assert record["distance"] < record["initial_distance"]
    assert record["sampled_distance"] == pytest.approx(record["distance"], rel=1e-3)  # one held-out sample
    assert calibrate(pipe, 8, inputs=inputs, most_evaluations=600).plans[8].num_inference_steps == 8


@both
def test_cosmos_1_is_refused_before_any_evaluation(scheduler_class):
    tiny = cosmos(CosmosTextToWorldPipeline, EDMEulerScheduler(sigma_data=1.0))
    called = []
    tiny.denoiser.register_forward_hook(lambda *_: called.append(1))
    with pytest.raises(ValueError, match="CosmosTextToWorldPipeline works with its own scheduler only"):
        record_steps(tiny, scheduler_class.from_config(tiny.pipe.scheduler.config), num_inference_steps=8)
    with pytest.raises(ValueError, match="CosmosTextToWorldPipeline works with its own scheduler only"):
        drive(tiny.pipe, lambda *_: iter(()), **tiny.inputs(1))
    assert not called


def test_pipelines_that_are_refused_exist():
    for name in REFUSED_PIPELINES:
        assert issubclass(getattr(diffusers, name), DiffusionPipeline)


def test_a_pipeline_with_a_scheduler_of_another_kind_is_refused_in_distillation():
    tiny = build("stable-diffusion-3")
    tiny.pipe.scheduler = HeliosScheduler()
    with pytest.raises(ValueError, match="sampled in a way of their own"):
        distill(tiny.pipe, 4, **tiny.inputs(1))


# Times of tokens


@pytest.fixture
def ltx_condition() -> TinyPipeline:
    torch.manual_seed(0)
    network = ltx_network()
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        down_block_types=("LTXVideoDownBlock3D",),
        spatio_temporal_scaling=(False,),
        decoder_spatio_temporal_scaling=(False,),
        decoder_inject_noise=(False, False),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=8,
    )
    pipe = LTXConditionPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=network.eval(),
    )

    def inputs(batch_size: int) -> dict[str, Any]:
        mask = torch.ones(batch_size, 5)
        masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        size = {"height": 32, "width": 32, "num_frames": 2, "output_type": "latent"}
        return {**embeddings(pipe, batch_size), **masks, **size}

    return TinyPipeline(pipe, inputs, (4, 2, 4, 4))


@both
def test_first_order_with_times_of_tokens_is_diffusers_euler(ltx_condition, scheduler_class):
    times = [999.0, 800.0, 500.0, 300.0, 100.0, 50.0]
    euler = at_times(FlowMatchEulerDiscreteScheduler(), timesteps=times)
    expected = record_steps(ltx_condition, euler, num_inference_steps=6)
    config = ltx_condition.pipe.scheduler.config
    if scheduler_class is GASScheduler:
        ours = at_times(GASScheduler.from_config(config, solver_order=1, t_end=0.0), timesteps=times)
    else:
        levels = torch.tensor(times, dtype=torch.float64) / 1000
        ours = SDMScheduler.from_config(config)
        ours.add_plan(SDMPlan(torch.cat([levels / (1 - levels), levels.new_zeros(1)]), len(times) - 1))
    steps = record_steps(ltx_condition, ours, num_inference_steps=6)
    for step, other in zip(steps, expected, strict=True):
        torch.testing.assert_close(step.prev_sample, other.prev_sample, rtol=0, atol=1e-5)


def test_driving_knows_the_sign_of_the_output_beside_times_of_tokens(ltx_condition):
    scheduler = GASScheduler.from_config(ltx_condition.pipe.scheduler.config, solver_order=1)
    (step, *_) = record_steps(ltx_condition, scheduler, num_inference_steps=4, batch_size=1)

    def ask(noise_schedule, prediction_type):
        answer = yield None, noise_schedule.inverse_timestep(step.timestep.double()).item()
        return answer

    answer = drive(
        ltx_condition.pipe, ask, **ltx_condition.inputs(1), generator=torch.manual_seed(0), num_inference_steps=4
    )
    torch.testing.assert_close(answer.model_output, -step.model_output, rtol=1e-4, atol=1e-4)


@both
def test_tokens_at_other_times_stay(scheduler_class):
    scheduler = scheduler_class(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(8)
    x, t = torch.randn(2, 5, 3), scheduler.timesteps[0]
    times = t.expand(2, 5).clone()
    times[0, 1] = 0
    after = scheduler.step(torch.ones_like(x), t, x, per_token_timesteps=times).prev_sample
    assert torch.equal(after[0, 1], x[0, 1])
    assert (after != x).any(-1).sum() == 9


# Dynamic thresholding


def thresholded(scheduler: SchedulerMixin, x: Tensor) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step((3 * x).sin(), t, x).prev_sample
    return x


@pytest.mark.parametrize("sample_max_value", [1.0, 1.5])
def test_dynamic_thresholding_is_diffusers(sample_max_value):
    theirs = DPMSolverMultistepScheduler(
        **STABLE_DIFFUSION,
        thresholding=True,
        dynamic_thresholding_ratio=0.9,
        sample_max_value=sample_max_value,
        solver_order=1,
        timestep_spacing="trailing",
    )
    ours, plain = (
        SDMScheduler.from_config(theirs.config, solver="heun", tau=1e9),
        SDMScheduler.from_config(theirs.config, solver="heun", thresholding=False),
    )
    theirs.set_timesteps(8)
    times = theirs.timesteps
    for scheduler in (ours, plain):
        scheduler.set_timesteps(timesteps=times.tolist())
    x = torch.randn(3, 3, SIZE, SIZE, generator=torch.manual_seed(0))
    expected = thresholded(theirs, x)
    torch.testing.assert_close(thresholded(ours, x), expected, rtol=0, atol=2e-3)
    assert (thresholded(plain, x) - expected).abs().max() > 0.1


@both
def test_a_pipeline_with_thresholding_samples_but_is_not_distilled(scheduler_class):
    tiny = build("ddpm")
    config = tiny.pipe.scheduler.config
    scheduler = scheduler_class.from_config(config, thresholding=True)
    last = record_steps(tiny, scheduler, num_inference_steps=6)[-1].prev_sample
    assert last.abs().max() <= 1.1
    tiny.pipe.scheduler = DDPMScheduler.from_config(config, thresholding=True)
    with pytest.raises(ValueError, match="neither distilled nor calibrated"):
        drive(tiny.pipe, lambda *_: iter(()), **tiny.inputs(1), num_inference_steps=4)
    with pytest.raises(ValueError, match="neither distilled nor calibrated"):
        differentiable_rollout(tiny.pipe, GeneralizedSolver(4), **tiny.inputs(1))


# Noise that only some of Diffusers' schedulers know


@both
@pytest.mark.parametrize("scaler", [1.0, 0.5, 2.0])
def test_stable_cascade_is_told_the_ratio_of_its_noise_level(scheduler_class, scaler):
    theirs = DDPMWuerstchenScheduler(scaler=scaler)
    ours = scheduler_class.from_config(theirs.config)
    ours.set_timesteps(8)
    alphas_cumprod = (1 - ours.betas).cumprod(0)
    for t, alpha in zip(ours.timesteps, ours._steps.alphas, strict=False):
        # As the pipeline does for all schedulers but its own. It rounds times down.
        ratio = StableCascadePriorPipeline.get_timestep_ratio_conditioning(None, t.long(), alphas_cumprod)
        if scaler == 1:
            assert theirs._alpha_cumprod(ratio, "cpu").item() == pytest.approx(alpha**2, rel=0.02, abs=2e-3)
        expected = theirs._alpha_cumprod((t + 1) / 1000, "cpu").item()
        assert alpha**2 == pytest.approx(expected, rel=2e-3, abs=1e-5)


@both
@pytest.mark.parametrize(
    "make",
    [HeunDiscreteScheduler, KDPM2DiscreteScheduler, DDIMScheduler, lambda: HeunDiscreteScheduler(beta_schedule="exp")],
)
def test_defaults_of_another_class_are_kept(scheduler_class, make):
    theirs = make()
    for config in (theirs.config, {**theirs.config, "_class_name": type(theirs).__name__}):
        ours = scheduler_class.from_config(config)
        torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(ours.alphas, theirs.alphas, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "settings", [{"use_karras_sigmas": True}, {"use_lu_lambdas": True}, {"prediction_type": "epsilon"}]
)
def test_flow_matching_that_needs_data_in_its_first_state_starts_a_little_later(settings):
    scheduler = GASScheduler(**{"use_flow_sigmas": True, "prediction_type": "flow_prediction", **settings})
    scheduler.set_timesteps(6)
    assert scheduler.sigmas[0].item() == pytest.approx(0.999)
    assert (
        GASScheduler(**{"use_flow_sigmas": True, "prediction_type": "flow_prediction"}).theory_solver(6).t_start == 1
    )


def test_arguments_that_need_a_scheduler_of_diffusers_are_refused():
    class ChronoEditPipeline(DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, num_inference_steps: int = 8, enable_temporal_reasoning: bool = False):
            self.scheduler.set_timesteps(num_inference_steps)

    pipe = ChronoEditPipeline(GASScheduler(**STABLE_DIFFUSION))
    pipe(6)
    with pytest.raises(ValueError, match="With `enable_temporal_reasoning` ChronoEditPipeline works with its own"):
        pipe(enable_temporal_reasoning=True)
