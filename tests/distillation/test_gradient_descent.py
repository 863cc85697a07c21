"""Gradient-based training: the split of a step's work changes nothing, resuming is exact, failures lose nothing."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler
from tiny_pipelines import build
from torch.nn.utils import parameters_to_vector

from diffusers_gas import GASScheduler, GeneralizedSolver
from diffusers_gas.distillation.adversarial import AdversarialRecipe, Adversary
from diffusers_gas.distillation.discriminator import R3GANDiscriminator
from diffusers_gas.distillation.gradient_descent import FRESH_NOISE_SEED, GradientDescent, Recipe, _shuffled
from diffusers_gas.generalized_solver import MOST_OFFSET
from diffusers_gas.least_squares import Loss
from diffusers_gas.pipelines.driving import differentiable_rollout, frozen
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache, TeacherSamples


@pytest.fixture(scope="module")
def samples(digits, tmp_path_factory) -> TeacherSamples:
    scheduler = DPMSolverMultistepScheduler.from_config(digits.scheduler.config, timestep_spacing="trailing")
    cache = TeacherCache(tmp_path_factory.mktemp("cache"), "digits", scheduler, 10)
    return cache.collect(digits, SampleInputs.create(0, 12), 12, "")


def solver(num_inference_steps: int = 3) -> GeneralizedSolver:
    return GASScheduler(beta_schedule="linear").theory_solver(num_inference_steps)


def adversary(**settings) -> Adversary:
    torch.manual_seed(0)
    discriminator = R3GANDiscriminator.for_samples((1, 8, 8), width=16)
    for parameter in discriminator.parameters():  # as built, the blocks' last layers are zero
        torch.nn.init.normal_(parameter, std=0.3)
    return Adversary(discriminator, AdversarialRecipe(discriminator_learning_rate=1e-2, **settings))


def trainer(pipe, samples, start=None, adversary=None, accelerator=None, loss=None, **recipe) -> GradientDescent:
    return GradientDescent(
        pipe,
        start or solver(),
        samples,
        loss=loss or Loss("l1"),
        recipe=Recipe(**{"train_batch_size": 4, "learning_rate": 1e-2, **recipe}),
        accelerator=accelerator or Accelerator(cpu=True),
        adversary=adversary,
    )


def parameters(trainer: GradientDescent) -> torch.Tensor:
    vectors = [parameters_to_vector(trainer.solver.parameters()), parameters_to_vector(trainer.ema.shadow_params)]
    if trainer.adversary is not None:
        vectors.append(parameters_to_vector(trainer.adversary.discriminator.parameters()).double())
    return torch.cat(vectors).detach()


def run_steps(trainer: GradientDescent, count: int) -> GradientDescent:
    for _ in range(count):
        trainer.step()
    return trainer


ADVERSARIES = pytest.mark.parametrize(
    "adversarial", [None, {}, {"reuse_fakes": True}], ids=["gs", "gas", "gas, fakes reused"]
)


def new_adversary(settings):
    return None if settings is None else adversary(**settings)


def test_training_lowers_the_loss(digits, samples):
    training = trainer(digits, samples, train_batch_size=12)
    losses = [training.step()["loss/distillation"] for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0]


def test_solver_and_discriminator_pull_in_opposite_directions(digits, samples):
    opponent = adversary(adversarial_weight=100.0, reuse_fakes=True)
    opponent.optimizer.param_groups[0]["lr"] = 0.0
    training = trainer(digits, samples, adversary=opponent, train_batch_size=12)
    losses = [training.step()["loss/adversarial"] for _ in range(8)]
    assert losses[-1] < 0.95 * losses[0]

    opponent.optimizer.param_groups[0]["lr"] = 1e-3
    training.optimizer.param_groups[0]["lr"] = training.lr_scheduler.base_lrs[0] = 0.0
    losses = [training.step()["discriminator/loss"] for _ in range(8)]
    assert losses[-1] < 0.95 * losses[0]


@ADVERSARIES
def test_accumulation_is_a_larger_batch(digits, samples, adversarial):
    pipe = copy.deepcopy(digits).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    results = []
    for size, calls in ((6, 1), (2, 3)):
        opponent = new_adversary(adversarial)
        if opponent is not None:
            opponent.discriminator.double()
        training = trainer(pipe, samples, adversary=opponent, train_batch_size=size, gradient_accumulation_steps=calls)
        results.append(parameters(run_steps(training, 2)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-8)
    start = parameters_to_vector(solver().parameters())
    assert not torch.allclose(results[0][: len(start)], start, atol=1e-2)


def test_processes_share_a_step(digits, samples):
    """What each of two processes adds to the gradient is a half of what one computes alone."""
    gradients = []

    def process(rank: int, world: int) -> SimpleNamespace:
        def reduce(tensors, reduction):
            assert reduction == "sum"
            gradients.append(tensors[0].clone())
            return tensors

        device = torch.device("cpu")
        return SimpleNamespace(process_index=rank, num_processes=world, device=device, reduce=reduce)

    for rank in range(2):
        trainer(digits, samples, accelerator=process(rank, 2), train_batch_size=3).step()
    alone = trainer(digits, samples, train_batch_size=6, max_grad_norm=1e9)
    alone.step()
    expected = torch.cat([parameter.grad.flatten() for parameter in alone.solver.parameters()])
    torch.testing.assert_close(sum(gradients), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@ADVERSARIES
def test_resuming_is_exact(digits, samples, tmp_path, adversarial):
    settings = {"lr_scheduler": "cosine", "max_train_steps": 6, "lr_warmup_steps": 1}
    whole = run_steps(trainer(digits, samples, adversary=new_adversary(adversarial), **settings), 4)
    first = run_steps(trainer(digits, samples, adversary=new_adversary(adversarial), **settings), 2)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    torch.rand(7)  # what else draws random numbers does not matter
    second = trainer(digits, samples, adversary=new_adversary(adversarial), **settings)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run_steps(second, 2)
    assert torch.equal(parameters(second), parameters(whole))
    assert second.evaluations == whole.evaluations


def test_a_checkpoint_of_another_training_is_refused(digits, samples):
    state = trainer(digits, samples).state_dict()
    with pytest.raises(ValueError, match="`total_batch_size` = 4, this training 5"):
        trainer(digits, samples, train_batch_size=5).load_state_dict(state)
    with pytest.raises(ValueError, match="`solver_config` = "):
        trainer(digits, samples, start=solver(4)).load_state_dict(state)
    with pytest.raises(ValueError, match="adversarial"):
        trainer(digits, samples, adversary=adversary()).load_state_dict(state)


def test_a_high_rate_ends_in_a_solver_that_can_be_loaded(digits, samples, tmp_path):
    training = run_steps(trainer(digits, samples, learning_rate=3.0, ema_decay=0.0), 1)
    assert training.solver.timestep_offsets.abs().max() == MOST_OFFSET
    scheduler = GASScheduler.from_config(digits.scheduler.config)
    scheduler.add_solver(training.averaged_solver())
    scheduler.save_pretrained(tmp_path)
    assert list(GASScheduler.from_pretrained(tmp_path).solvers) == [3]


def test_average_is_the_published_one(digits, samples):
    training = trainer(digits, samples, ema_decay=0.3)
    average = parameters_to_vector(training.solver.parameters()).detach().clone()
    for step in range(5):
        training.step()
        decay = min(0.3, (1 + step) / (10 + step)) if step else 0.0
        average = decay * average + (1 - decay) * parameters_to_vector(training.solver.parameters()).detach()
    averaged = parameters_to_vector(training.averaged_solver().parameters())
    torch.testing.assert_close(averaged, average, rtol=0, atol=1e-12)


def test_passes_have_every_sample_once():
    order = _shuffled(10, 0, 30, seed=3)
    assert all(sorted(order[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert order[:10] != order[10:20]
    assert _shuffled(10, 7, 23, seed=3) == order[7:23]
    assert _shuffled(10, 0, 10, seed=4) != order[:10]


def test_fakes_of_the_discriminator_have_noise_of_their_own(digits, samples, monkeypatch):
    seeds = []
    arguments = SampleInputs.pipeline_arguments

    def record(inputs, pipe):
        seeds.append(list(inputs.seeds))
        return arguments(inputs, pipe)

    monkeypatch.setattr(SampleInputs, "pipeline_arguments", record)
    run_steps(trainer(digits, samples, adversary=adversary()), 2)
    fresh, trained = seeds[0::2], seeds[1::2]
    assert all(min(batch) >= FRESH_NOISE_SEED > EVALUATION_SEED + 50_000 for batch in fresh)
    assert len({seed for batch in fresh for seed in batch}) == 8
    assert all(set(batch) <= set(range(12)) for batch in trained)


def test_a_discriminator_warms_up_before_the_solver_moves(digits, samples):
    one = trainer(digits, samples, adversary=adversary(discriminator_warmup_steps=2, reuse_fakes=True))
    start, seen = parameters_to_vector(one.solver.parameters()), parameters(one)
    for step in range(3):
        losses = one.step()
        assert ("loss/distillation" in losses) == (step == 2)
        assert torch.equal(parameters_to_vector(one.solver.parameters()), start) == (step < 2)
        assert not torch.equal(parameters(one), seen)  # the discriminator learns in every step
        seen = parameters(one)


def test_a_discriminator_of_weight_zero_changes_nothing(digits, samples):
    plain = run_steps(trainer(digits, samples), 2)
    weightless = run_steps(trainer(digits, samples, adversary=adversary(adversarial_weight=0.0)), 2)
    # The discriminator's own fakes are rollouts without gradients: the same samples, other random numbers in between.
    assert torch.equal(
        parameters_to_vector(plain.solver.parameters()), parameters_to_vector(weightless.solver.parameters())
    )
    heavy = run_steps(trainer(digits, samples, adversary=adversary(adversarial_weight=10.0)), 2)
    assert not torch.allclose(parameters(heavy)[:20], parameters(plain)[:20], atol=1e-4)


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_step_that_is_not_finite_stops_before_it_changes_anything(digits, samples, adversarial):
    final = samples.final.clone()
    final[_shuffled(12, 4, 8, 0)[1]] = torch.nan  # a sample of the second step
    broken = TeacherSamples(samples.inputs, samples.noise, final)
    training = trainer(digits, broken, adversary=adversary() if adversarial else None)
    training.step()
    before = parameters(training)[:40].clone()
    with pytest.raises(ValueError, match=r"Step 2 is not finite.*begin anew in another `--output_dir` with a lower"):
        training.step()
    assert torch.equal(parameters(training)[:40], before)


def saved_bytes(pipe, num_inference_steps: int, gradient_checkpointing: bool) -> int:
    """What a rollout keeps for its backward pass."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = SampleInputs.create(0, 2).pipeline_arguments(pipe)
    with frozen(pipe), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        differentiable_rollout(
            pipe, solver(num_inference_steps), gradient_checkpointing=gradient_checkpointing, **inputs
        )
    return sum(sizes.values())


def test_checkpointed_memory_grows_by_latents_only(digits):
    latents = 2 * 64 * 4
    checkpointed = saved_bytes(digits, 8, True) - saved_bytes(digits, 4, True)
    kept = saved_bytes(digits, 8, False) - saved_bytes(digits, 4, False)
    # A step keeps its state, its prediction and their products with four to eight weights.
    assert checkpointed < 4 * 40 * latents
    assert kept > 20 * checkpointed


@pytest.mark.parametrize("name", ["ddpm", "stable-diffusion", "flux"])
def test_checkpointed_gradients_are_the_same(name):
    tiny = build(name)
    inputs = {**tiny.inputs(2), "generator": [torch.Generator().manual_seed(i) for i in range(2)]}
    results = []
    for gradient_checkpointing in (False, True):
        start = GASScheduler.from_config(tiny.pipe.scheduler.config).theory_solver(3, mu=1.0)
        calls = [generator.manual_seed(i) for i, generator in enumerate(inputs["generator"])]
        with frozen(tiny.pipe):
            final = differentiable_rollout(
                tiny.pipe, start, gradient_checkpointing=gradient_checkpointing, **{**inputs, "generator": calls}
            )
            final.square().sum().backward()
        results.append(torch.cat([parameter.grad.flatten() for parameter in start.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4 * results[0].abs().max().item())
    assert results[0].abs().max() > 0
    assert "forward" not in vars(tiny.denoiser)


@pytest.mark.parametrize("own", [False, True], ids=["", "the network's own"])
def test_blocks_of_a_large_network_are_repeated(own, tmp_path):
    """A single evaluation of a large video network would not fit into memory. A network that repeats its blocks goes on to."""
    tiny, results, calls = build("flux"), [], []
    tiny.denoiser.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    inputs = SampleInputs.create(0, 2, **tiny.inputs(1))
    samples = TeacherCache(tmp_path, "flux", tiny.pipe.scheduler, 5).collect(tiny.pipe, inputs, 2, "")
    start = GASScheduler.from_config(tiny.pipe.scheduler.config).theory_solver(3, mu=1.0)
    if own:
        tiny.denoiser.enable_gradient_checkpointing()
    for gradient_checkpointing in (False, True):
        settings = {"train_batch_size": 2, "gradient_checkpointing": gradient_checkpointing}
        training = trainer(tiny.pipe, samples, start, **settings)
        calls.clear()
        training.step()
        # Forward; forward again to know the blocks' inputs; and the block itself again.
        assert len(calls) == 3 * (1 + own if not gradient_checkpointing else 3)
        assert tiny.denoiser.is_gradient_checkpointing == own
        results.append(torch.cat([parameter.grad.flatten() for parameter in training.solver.parameters()]))
    assert results[0].abs().max() > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4 * results[0].abs().max().item())


@pytest.mark.skipif(torch.__version__ < "2.8", reason="this PyTorch draws other noise in bfloat16")
def test_half_precision_networks_train_a_float64_solver(digits, samples):
    """The gradient in bfloat16 points where the one in float32 does, to within its rounding."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = copy.deepcopy(digits).to(dtype)
        pipe.set_progress_bar_config(disable=True)
        training = trainer(pipe, samples, train_batch_size=12, max_grad_norm=1e9)
        training.step()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in training.solver.parameters()]))
    assert gradients[1].dtype == torch.float64
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98


def test_small_gradients_survive_float16():
    """One entry's share of a mean over 65 536 is 1.5e-5, less than float16 resolves well; the scaled loss's is one."""
    training = SimpleNamespace(final=torch.zeros(1, 4, 128, 128))
    scale = GradientDescent(None, solver(), training, loss=Loss(), recipe=Recipe(), accelerator=None)._loss_scale
    entries = 4 * 128 * 128 * Recipe().train_batch_size
    assert 0.5 < scale / entries <= 1
    assert (torch.tensor(scale).log2() % 1).item() == 0


def test_guidance_scales_are_not_mixed_in_a_call(tmp_path):
    tiny = build("stable-diffusion")
    embeddings = {name: value for name, value in tiny.inputs(1).items() if isinstance(value, torch.Tensor)}
    common = {name: value for name, value in tiny.inputs(1).items() if name not in embeddings}
    common.pop("guidance_scale", None)
    cycle = [{**embeddings, "guidance_scale": scale} for scale in (1.5, 4.0)]
    cache = TeacherCache(tmp_path, "tiny", DPMSolverMultistepScheduler.from_config(tiny.pipe.scheduler.config), 4)
    samples = cache.collect(tiny.pipe, SampleInputs.create(0, 4, cycle, **common), 4, "")
    alone = cache.collect(tiny.pipe, SampleInputs.create(0, 4, cycle[:1], **common), 4, "")
    torch.testing.assert_close(samples.final[0::2], alone.final[0::2], rtol=0, atol=1e-4)
    assert not torch.allclose(samples.final[1::2], alone.final[1::2], atol=1e-2)
    start = GASScheduler.from_config(tiny.pipe.scheduler.config).theory_solver(3)
    training = trainer(tiny.pipe, samples, start=start)
    assert [len(batch) for batch in training._batches()] == [2, 2]
    assert training.step()["gradient_norm"] > 0
