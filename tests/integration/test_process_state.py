"""What a program has set for its whole process changes nothing: gradients, inference mode, default dtype, default device."""

import ast
import copy
import functools
from contextlib import contextmanager, nullcontext
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import TEACHER
from diffusers import DDPMPipeline
from fake_accelerator import DEVICE, Accelerator
from torch import Tensor
from torch.nn.utils import parameters_to_vector

import diffusers_gas
from diffusers_gas import GASScheduler, SampleInputs, SDMScheduler, calibration
from diffusers_gas.distillation.adversarial import AdversarialRecipe, Adversary
from diffusers_gas.distillation.discriminator import R3GANDiscriminator
from diffusers_gas.distillation.gradient_descent import GradientDescent, Recipe
from diffusers_gas.least_squares import Loss
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.teacher import TeacherCache, default_teacher


@contextmanager
def process(dtype, device="cpu", deterministic=False, mode=nullcontext):
    """Inside, the process has another default dtype, another default device, or another mode."""
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
    try:
        with torch.device(device), mode():
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


STATES = {
    "gradients off, float16": functools.partial(process, torch.float16, mode=torch.no_grad),
    "inference mode, float64": functools.partial(process, torch.float64, mode=torch.inference_mode),
    # What is made on this device has no values to go on with.
    "other device, bfloat16": functools.partial(process, torch.bfloat16, device="meta", deterministic=True),
}


def sampled(make, pipe, folder) -> Tensor:
    inputs = SampleInputs.create(0, 2).pipeline_arguments(pipe)
    scheduler = make(pipe.scheduler.config)
    return torch.cat([sample_latents(pipe, scheduler, n, **inputs)[1] for n in (1, 4)])


def saved(pipe, folder) -> Tensor:
    scheduler = GASScheduler.from_config(pipe.scheduler.config)
    scheduler.add_solver(scheduler.theory_solver(3))
    scheduler.save_pretrained(folder)
    scheduler.export(folder / "table.json")
    return sampled(lambda _: GASScheduler.from_pretrained(folder, use_theory_for_untrained_steps=True), pipe, folder)


def distilled(pipe, folder) -> Tensor:
    start = SDMScheduler.from_config(pipe.scheduler.config)
    scheduler = diffusers_gas.distill(
        pipe,
        2,
        inputs=SampleInputs.create(0, 4),
        max_iterations=1,
        teacher_num_inference_steps=4,
        initialize_from=start,
    )
    return torch.cat([parameters_to_vector(solver.parameters()) for solver in scheduler.solvers.values()])


def calibrated(pipe, folder) -> Tensor:
    scheduler = diffusers_gas.calibrate(pipe, 3, inputs=SampleInputs.create(0, 2), most_evaluations=36)
    return scheduler.plans[3].sigmas


def trained(pipe, folder, adversarial=False) -> Tensor:
    samples = TeacherCache(folder, "digits", default_teacher(pipe), 4).collect(pipe, SampleInputs.create(0, 4), 4, "")
    adversary = None
    if adversarial:
        torch.manual_seed(0)
        adversary = Adversary(R3GANDiscriminator.for_samples((1, 8, 8), width=16).to(pipe.device), AdversarialRecipe())
    start = GASScheduler.from_config(pipe.scheduler.config).theory_solver(2)
    settings = {"loss": Loss("l1"), "accelerator": accelerate.Accelerator(cpu=True)}
    training = GradientDescent(
        pipe, start, samples, recipe=Recipe(train_batch_size=2), adversary=adversary, **settings
    )
    for _ in range(2):
        training.step()
    found = [training.averaged_solver()] + ([adversary.discriminator] if adversarial else [])
    return torch.cat([parameters_to_vector(module.parameters()).cpu() for module in found])


JOBS = {
    "GAS": functools.partial(sampled, GASScheduler.from_config),
    "SDM, Heun": functools.partial(sampled, SDMScheduler.from_config),
    "SDM, UniPC": functools.partial(sampled, lambda config: SDMScheduler.from_config(config, solver="unipc")),
    "SDM, 3M": functools.partial(sampled, lambda config: SDMScheduler.from_config(config, solver="dpmsolver++3m")),
    "SDM, online": functools.partial(sampled, lambda config: SDMScheduler.from_config(config, online=True, tau=1e-3)),
    "saved and exported": saved,
    "distilled": distilled,
    "calibrated": calibrated,
    "gradients": trained,
    "adversarial": functools.partial(trained, adversarial=True),
}


@pytest.fixture(scope="module", autouse=True)
def short_calibration():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "FINE_STEPS", 6)
        patch.setattr(calibration, "FINENESS", 2)
        yield


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    return functools.cache(lambda job: JOBS[job](digits, tmp_path_factory.mktemp("plain")).detach())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("job", JOBS)
def test_the_result_does_not_depend_on_the_state_of_the_process(job, state, digits, plain, tmp_path):
    expected, own, generator = plain(job), digits.scheduler, torch.get_rng_state()
    with STATES[state]():
        if (job, state) == ("adversarial", "inference mode, float64"):
            with pytest.raises(ValueError, match="discriminator cannot learn that was made in inference mode"):
                JOBS[job](digits, tmp_path)
            return
        result = JOBS[job](digits, tmp_path)
    assert result.dtype == expected.dtype and torch.equal(result, expected)
    assert digits.scheduler is own
    # A gradient-based training seeds every step.
    assert torch.equal(torch.get_rng_state(), generator) or job in ("gradients", "adversarial")


@pytest.mark.parametrize("job", JOBS)
def test_the_result_on_an_accelerator(job, digits, plain, tmp_path):
    """The network is there. It gets no float64, which some devices do not have."""
    pipe, expected = copy.deepcopy(digits), plain(job)
    with Accelerator() as accelerator:
        result = JOBS[job](pipe.to(DEVICE), tmp_path).cpu()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-2 * expected.abs().max().item())
    assert accelerator.events["to the device"] > 0 and accelerator.events["float64"] == 0


def test_a_pipeline_that_was_loaded_in_inference_mode(tmp_path):
    """It has weights without gradients, which Gauss-Newton does not need."""
    with torch.inference_mode():
        pipe = DDPMPipeline.from_pretrained(TEACHER)
        pipe.set_progress_bar_config(disable=True)
    assert sampled(GASScheduler.from_config, pipe, tmp_path).isfinite().all()
    assert distilled(pipe, tmp_path).isfinite().all()
    with pytest.raises(ValueError, match=r"loaded in inference mode.*or distill by Gauss-Newton"):
        trained(pipe, tmp_path)


def test_a_pipeline_that_switches_gradients_off_within_its_call(digits, tmp_path):
    class Mine(DDPMPipeline):
        @torch.no_grad()
        def __call__(self, batch_size=1, generator=None, num_inference_steps=4):
            return super().__call__(batch_size, generator, num_inference_steps)

    pipe = Mine(digits.unet, digits.scheduler)
    with pytest.raises(ValueError, match="Mine switches gradients off within its call: distill it by Gauss-Newton"):
        trained(pipe, tmp_path)


MAKERS = [
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randn",
    "randperm",
    "tensor",
    "zeros",
]


def test_every_tensor_of_the_package_says_its_device():
    """`papers` has networks, whose parameters follow the default device as those of other networks do."""
    package = Path(diffusers_gas.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        if package / "papers" in path.parents:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MAKERS):
                continue
            names = {keyword.arg or ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func.value) == "torch" and not names & {"device", "FLOAT64", "FLOAT32"}:
                found.append(f"{path.relative_to(package)}:{node.lineno}: {ast.unparse(node)}")
    assert not found
