"""EDM's networks, their pipeline, and the schedulers on networks with EDM preconditioning.

`golden/edm_reference.safetensors` was computed in float64 with EDM's published implementation (arXiv 2206.00364) on the
CPU, its attention in float64 too. Metadata `cases` names for each case the published classes, the arguments of the network
and one of the `layouts`, which hold the names and shapes of its tensors; the weights are `official_files.edm_weights` of the
layout; we have the cases with EDM's preconditioning. `{case}.denoised` is D(`noisy`; `sigma`), of class-conditional networks for the classes 0, 2 and 1, and in
`{case}.denoised_no_class` for a label of zeros.
"""

import copy
from itertools import pairwise

import pytest
import torch
from diffusers import (
    ConsistencyModelPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    SchedulerMixin,
)
from official_files import edm_case_snapshot, edm_reference, written
from saved_schedulers import perturbed
from torch import Tensor

from diffusers_gas import EDMPipeline, EDMUNet, GASScheduler, GeneralizedSolver, SDMScheduler
from diffusers_gas.distillation.gauss_newton import Problem, distill_gauss_newton
from diffusers_gas.noise_schedules import (
    EDMSchedule,
    EDMVPSchedule,
    VPLinearSchedule,
    data_prediction_weights,
)
from diffusers_gas.papers.edm.published import convert_snapshot
from diffusers_gas.papers.pickles import load_pickle
from diffusers_gas.pipelines.driving import differentiable_rollout, drive, sample_latents
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherSamples


CASES, REFERENCE = edm_reference()
CLASSES = torch.tensor([0, 2, 1])
SIGMA_DATA = 0.5


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory) -> tuple[str, EDMUNet]:
    path = written(tmp_path_factory.mktemp("snapshot"), edm_case_snapshot(CASES[request.param]))
    return request.param, convert_snapshot(load_pickle(path)).eval()


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> EDMUNet:
    path = written(tmp_path_factory.mktemp("snapshot"), edm_case_snapshot(CASES["ddpmpp"]))
    return convert_snapshot(load_pickle(path)).eval()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> EDMUNet:
    path = written(tmp_path_factory.mktemp("snapshot"), edm_case_snapshot(CASES["ddpmpp_classes"]))
    return convert_snapshot(load_pickle(path)).eval()


def pipeline(unet: EDMUNet, scheduler: SchedulerMixin | None = None) -> EDMPipeline:
    pipe = EDMPipeline(unet, scheduler or EDMDPMSolverMultistepScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def denoise(unet: EDMUNet, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
    """D(x; sigma) from F, by table 1 of the paper."""
    column = sigma.view(-1, 1, 1, 1)
    scale = (column**2 + SIGMA_DATA**2).rsqrt()
    output = unet(scale * x, sigma.log() / 4, class_labels).sample
    return (SIGMA_DATA * scale) ** 2 * x + column * SIGMA_DATA * scale * output


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the worst sample."""
    return ((actual - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))).max().item()


# The network


def test_denoises_as_published(case):
    name, unet = case
    x, sigma = REFERENCE["noisy"], REFERENCE["sigma"]
    labels = {"denoised": None}
    if unet.config.num_class_embeds is not None:
        labels = {"denoised": CLASSES, "denoised_no_class": None}
    for key, classes in labels.items():
        expected = REFERENCE[f"{name}.{key}"]
        single = denoise(unet, x.float(), sigma.float(), classes)
        assert relative_error(single.double(), expected) < 4e-6
        double = denoise(copy.deepcopy(unet).double(), x, sigma, classes)
        # The table of classes is rounded to float32 once.
        assert relative_error(double, expected) < (1e-7 if name == "ddpmpp_classes" else 1e-12)


def test_one_time_for_all_or_one_each(unet):
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = unet(x, torch.full((3,), 0.3)).sample
        for t in (0.3, torch.tensor(0.3), torch.tensor([0.3])):
            torch.testing.assert_close(unet(x, t).sample, expected, rtol=0, atol=0)
        single = torch.cat([unet(x[i : i + 1], 0.3, return_dict=False)[0] for i in range(3)])
    torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-5)


def test_saving_and_loading(case, tmp_path):
    _, unet = case
    unet.save_pretrained(tmp_path)
    loaded = EDMUNet.from_pretrained(tmp_path)
    own = {name: value for name, value in unet.config.items() if name != "_use_default_values"}
    assert loaded.config == own | {"_name_or_path": tmp_path}
    state = unet.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, 0.3).sample, unet(x, 0.3).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_hears_the_exact_noise_level(case, dtype, tmp_path):
    name, unet = case
    unet.save_pretrained(tmp_path)
    half = EDMUNet.from_pretrained(tmp_path, dtype=dtype)
    assert half.conv_in.weight.dtype == half.encoder[0][0].conv1.weight.dtype == dtype
    listening = [half.noise_layers[0].weight, half.encoder[0][0].noise_projection.weight]
    assert all(parameter.dtype == torch.float32 for parameter in listening)
    labels = None if unet.config.num_class_embeds is None else CLASSES
    x, sigma = REFERENCE["noisy"].float(), REFERENCE["sigma"].float()
    expected = REFERENCE[f"{name}.denoised"].float()
    result = denoise(half, x, sigma, labels)
    assert result.dtype == torch.float32  # as the state
    # A bound for the weights' own rounding, which phases that are off by 0.07 would be far beyond.
    assert relative_error(result, expected) < (0.01 if dtype == torch.float16 else 0.06)
    assert torch.equal(half._noise_features(sigma), unet._noise_features(sigma))


def test_the_output_has_the_precision_of_the_input(unet):
    half = copy.deepcopy(unet).half()
    with torch.no_grad():
        assert half(torch.randn(1, 3, 8, 8).half(), 0.1).sample.dtype == torch.float16
        assert half(torch.randn(1, 3, 8, 8), 0.1).sample.dtype == torch.float32


def test_the_noise_level_is_differentiable():
    unet = EDMUNet(8, model_channels=8, channel_mult=(1, 2), layers_per_block=1).double()
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    t = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: unet(x, t).sample[0, :, 0, 0], [t], atol=1e-6)


def test_settings_that_are_no_network():
    for settings, message in (
        ({"architecture": "unet"}, "architecture"),
        ({"preconditioning": "vp"}, "must be 'edm', got 'vp'"),  # as saved networks may have
        ({"sample_size": 9}, "sample_size"),
    ):
        with pytest.raises(ValueError, match=message):
            EDMUNet(**{"sample_size": 8, "model_channels": 8, **settings})


def test_class_labels_for_an_unconditional_network(unet):
    with pytest.raises(ValueError, match="not class-conditional"):
        unet(torch.randn(1, 3, 8, 8), 0.1, torch.tensor([1]))


# The pipeline


def sample_by_hand(unet: EDMUNet, noise: Tensor, sigmas: list[float], labels: Tensor | None = None) -> Tensor:
    """Euler's method on dx/dsigma = (x - D) / sigma, in float64."""
    unet = copy.deepcopy(unet).double()
    x = noise.double() * (sigmas[0] ** 2 + 1) ** 0.5
    for sigma, next_sigma in pairwise(sigmas):
        denoised = denoise(unet, x, torch.full((len(x),), sigma, dtype=torch.float64), labels)
        x = denoised + next_sigma / sigma * (x - denoised)
    return x


def test_samples_as_by_hand(labelled):
    pipe = pipeline(labelled, EDMEulerScheduler())
    noise = torch.randn(3, 3, 8, 8)
    result = pipe(3, CLASSES, 6, latents=noise, output_type="latent").images
    expected = sample_by_hand(labelled, noise, pipe.scheduler.sigmas.tolist(), CLASSES)
    assert relative_error(result.double(), expected) < 1e-4
    images = pipe(3, CLASSES.tolist(), 6, latents=noise, output_type="pt").images
    torch.testing.assert_close(images, (result / 2 + 0.5).clamp(0, 1))
    assert pipe(1, 2, 2, return_dict=False)[0][0].size == (8, 8)
    assert pipe(1, 2, 2, output_type="np").images.shape == (1, 8, 8, 3)


def test_classes_and_generators_belong_to_their_images(labelled):
    pipe = pipeline(labelled)

    def sample(seeds: list[int], labels: list[int] | int | None) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(len(seeds), labels, 4, generator=generators, output_type="latent").images

    both = sample([1, 2], [0, 2])
    torch.testing.assert_close(sample([2], [2]), both[1:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sample([1, 2], 2)[1:], both[1:], rtol=1e-3, atol=1e-3)
    for other in ([0, 1], None):
        assert (sample([1, 2], other)[1] - both[1]).abs().max() > 0.01


def test_half_precision_states_stay_in_float32(labelled, tmp_path):
    pipeline(labelled).save_pretrained(tmp_path)
    half = EDMPipeline.from_pretrained(tmp_path, dtype=torch.float16)
    half.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 3, 8, 8)
    expected = pipeline(labelled)(2, 1, 8, latents=noise, output_type="latent").images
    result = half(2, 1, 8, latents=noise, output_type="latent").images
    assert result.dtype == torch.float32
    assert relative_error(result, expected) < 0.05


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"generator": [torch.Generator()]}, "one for each of 2 images, got 1"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, r"must be of shape \(2, 3, 8, 8\), got \(1, 3, 8, 8\)"),
        ({"class_labels": [0, 1, 2]}, "one class or 2 of them, from 0 to 2"),
        ({"class_labels": 3}, "from 0 to 2, got 3"),
        ({"class_labels": -1}, "from 0 to 2, got -1"),
    ],
)
def test_wrong_arguments(labelled, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(labelled)(2, **arguments)


def test_the_pipeline_loads_by_itself(labelled, tmp_path):
    pipe = pipeline(labelled, GASScheduler.from_config(EDMEulerScheduler().config))
    pipe.save_pretrained(tmp_path)
    loaded = EDMPipeline.from_pretrained(tmp_path)
    assert [type(part) for part in (loaded, loaded.unet, loaded.scheduler)] == [EDMPipeline, EDMUNet, GASScheduler]
    assert loaded.scheduler.config.sigma_data == 0.5


def test_the_network_runs_in_diffusers_pipeline_for_such_networks(labelled):
    pipe = ConsistencyModelPipeline(labelled, EDMEulerScheduler())
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(3, 3, 8, 8)
    images = pipe(3, CLASSES, 4, latents=noise, output_type="pt").images
    expected = pipeline(labelled, EDMEulerScheduler())(3, CLASSES, 4, latents=noise, output_type="pt").images
    torch.testing.assert_close(images, expected)


# Schedulers on networks with EDM preconditioning


def test_the_variance_preserving_view_of_an_edm_network():
    schedule, t = EDMVPSchedule(SIGMA_DATA), torch.linspace(1e-4, 1, 7, dtype=torch.float64)
    torch.testing.assert_close(schedule.log_alpha(t), VPLinearSchedule(0.1, 20.0).log_alpha(t))
    sigma = schedule.diffusers_sigma(t)
    torch.testing.assert_close(sigma[-1].item(), 152.17, rtol=1e-4, atol=0)
    torch.testing.assert_close(schedule.timestep(t), sigma.log() / 4)
    torch.testing.assert_close(schedule.inverse_timestep(schedule.timestep(t)), t)
    # The network's input is that of EDM's own state, which is 1 / alpha times this schedule's.
    c_in = (sigma**2 + SIGMA_DATA**2).rsqrt()
    torch.testing.assert_close(schedule.input_scale(t) * schedule.alpha(t), c_in)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", [EDMSchedule(), EDMVPSchedule()])
def test_data_predictions_by_way_of_the_published_formula(schedule, prediction_type):
    """The network denoises the state as one of the shifted time; its noise is what remains (tests/golden/README.md)."""
    t, shifted = torch.tensor([[0.9, 0.5, 0.2], [0.92, 0.5, 0.15]], dtype=torch.float64)
    x, f = torch.randn(2, 3, dtype=torch.float64)
    sigma = schedule.diffusers_sigma(shifted)
    c_skip, scale = SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2), (sigma**2 + SIGMA_DATA**2).rsqrt()
    c_out = sigma * SIGMA_DATA * scale * (-1 if prediction_type == "v_prediction" else 1)
    denoised = c_skip * x / schedule.alpha(shifted) + c_out * f
    noise = (x - schedule.alpha(shifted) * denoised) / schedule.sigma(shifted)
    expected = (x - schedule.sigma(t) * noise) / schedule.alpha(t)
    p, q = data_prediction_weights(prediction_type, schedule, t, shifted)
    torch.testing.assert_close(p * x + q * f, expected)
    torch.testing.assert_close((p * x + q * f)[1], denoised[1])  # where nothing is shifted


def test_theory_converges_to_the_exact_solution_on_gaussian_data():
    """F = 0 is the exact network of data N(0, sigma_data^2), whose trajectories are known."""
    scheduler = GASScheduler.from_config(EDMEulerScheduler().config, use_lu_lambdas=True)
    schedule = scheduler.noise_schedule()
    ends = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    # The state has standard deviation alpha sqrt(sigma_data^2 + sigma^2) at every time, and keeps its share of it.
    deviation = schedule.alpha(ends) * (SIGMA_DATA**2 + schedule.diffusers_sigma(ends) ** 2).sqrt()
    errors = []
    for n in (32, 64, 128):
        scheduler.set_timesteps(n)
        x = torch.ones(1, dtype=torch.float64)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
        errors.append((x * deviation[0] / deviation[1] - 1).abs().item())
    assert errors[2] < 2e-3 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3, errors  # second order


@pytest.mark.parametrize(
    "other, prediction_type, num_inference_steps, tolerance",
    [(EDMEulerScheduler, "epsilon", 200, 0.1), (EDMDPMSolverMultistepScheduler, "v_prediction", 80, 0.02)],
)
def test_all_schedulers_solve_the_same_equation(unet, other, prediction_type, num_inference_steps, tolerance):
    """From the same noise at the same sigma, with so many steps that none of them matters."""
    top = EDMVPSchedule().diffusers_sigma(torch.ones(1, dtype=torch.float64)).item()
    teacher = other(sigma_max=top, prediction_type=prediction_type)
    pipe = pipeline(unet, teacher)

    def sample(scheduler: SchedulerMixin, n: int) -> tuple[Tensor, Tensor]:
        return sample_latents(pipe, scheduler, n, batch_size=2, generator=torch.Generator().manual_seed(0))

    noise, expected = sample(teacher, num_inference_steps)
    gas = GASScheduler.from_config(teacher.config, t_end=1e-4, use_lu_lambdas=True)
    sdm = SDMScheduler.from_config(teacher.config)
    assert (gas.init_noise_sigma, sdm.init_noise_sigma) == (1.0, teacher.init_noise_sigma)
    for scheduler, n in ((gas, 60), (sdm, 59)):
        own_noise, result = sample(scheduler, n)
        torch.testing.assert_close(own_noise, noise, rtol=1e-5, atol=1e-5)
        assert relative_error(result, expected) < tolerance, relative_error(result, expected)


def perturbed_solver(n: int = 4) -> GeneralizedSolver:
    return perturbed(GASScheduler.from_config(EDMEulerScheduler().config).theory_solver(n), 0.01, seed=1)


def test_learned_solver_steps_as_its_definition_says(unet):
    """The table of states and predictions, and the network asked at the shifted times with the state scaled for them."""
    solver, schedule = perturbed_solver(), EDMVPSchedule()
    scheduler = GASScheduler.from_config(EDMEulerScheduler().config)
    scheduler.add_solver(solver)
    noise = torch.randn(2, 3, 8, 8)
    result = pipeline(unet, scheduler)(2, None, 4, latents=noise, output_type="latent").images

    network, table, (of_states, of_data) = (
        copy.deepcopy(unet).double(),
        solver.table(schedule),
        solver.coefficients(schedule),
    )
    states, data = [noise.double()], []
    with torch.no_grad():
        for k, (t, shifted) in enumerate(zip(table.times, table.evaluation_times)):
            sigma = schedule.diffusers_sigma(shifted)
            denoised = denoise(network, states[k] / schedule.alpha(shifted), sigma.expand(2))
            eps = (states[k] - schedule.alpha(shifted) * denoised) / schedule.sigma(shifted)
            data.append((states[k] - schedule.sigma(t) * eps) / schedule.alpha(t))
            weights = zip(of_states[k], of_data[k], states, data)
            states.append(sum(a * x + c * m for a, c, x, m in weights))
    assert relative_error(result.double(), states[-1]) < 1e-4


def test_solvers_survive_their_files(unet, tmp_path):
    scheduler = GASScheduler.from_config(EDMEulerScheduler(sigma_data=0.5).config)
    scheduler.add_solver(perturbed_solver())
    scheduler.save_pretrained(tmp_path)
    loaded = GASScheduler.from_pretrained(tmp_path)
    noise = torch.randn(1, 3, 8, 8)
    results = [pipeline(unet, s)(1, None, 4, latents=noise, output_type="latent").images for s in (scheduler, loaded)]
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="sigma_data"):
        GASScheduler.from_pretrained(tmp_path, sigma_data=1.0)


# Distillation


def inputs(n: int, first_seed: int = 0) -> SampleInputs:
    return SampleInputs.create(first_seed, n)


def test_driving_gives_any_state_and_time(unet):
    pipe = pipeline(unet)

    def algorithm(noise_schedule, prediction_type):
        first = yield None, 1.0
        t = torch.tensor(0.4, dtype=torch.float64)
        second = yield 0.5 * first.sample, t
        p, q = data_prediction_weights(prediction_type, noise_schedule, t, t)
        return first, second, noise_schedule, p.item() * second.sample + q.item() * second.model_output

    first, second, schedule, data = drive(pipe, algorithm, batch_size=2, generator=torch.Generator().manual_seed(0))
    assert isinstance(schedule, EDMVPSchedule)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first.sample, noise)
    torch.testing.assert_close(second.sample, 0.5 * noise)
    t = torch.full((2,), 0.4, dtype=torch.float64)
    x = 0.5 * noise / schedule.alpha(t).view(-1, 1, 1, 1).float()
    torch.testing.assert_close(data, denoise(unet, x, schedule.diffusers_sigma(t).float()), rtol=1e-3, atol=1e-4)


def test_rollout_gradients_agree_with_finite_differences(unet):
    """Evaluation times included, at which the network's input is scaled, too."""
    pipe, solver = pipeline(copy.deepcopy(unet).double()), perturbed_solver(3)
    noise = torch.randn(1, 3, 8, 8)
    differentiable_rollout(pipe, solver, latents=noise).square().sum().backward()
    gas = GASScheduler.from_config(pipe.scheduler.config)

    def value() -> float:
        gas.solvers.clear()
        gas.add_solver(solver)
        pipe.scheduler, own = gas, pipe.scheduler
        result = pipe(1, None, 3, latents=noise, output_type="latent").images
        pipe.scheduler = own
        return result.double().square().sum().item()

    assert differentiable_rollout(pipe, solver, latents=noise).square().sum().item() == pytest.approx(
        value(), rel=1e-5
    )
    for name, parameter in solver.named_parameters():
        step = 3e-3
        index = (0,) * parameter.ndim
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
                values.append(value())
                parameter[index] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        assert parameter.grad[index].item() == pytest.approx(difference, rel=0.03), name


def test_gauss_newton_distills_an_edm_teacher(unet):
    pipe = pipeline(unet)

    def taught(batch: SampleInputs) -> TeacherSamples:
        noise, final = sample_latents(pipe, pipe.scheduler, 20, **batch.pipeline_arguments(pipe))
        return TeacherSamples(batch, noise, final)

    start = GASScheduler.from_config(pipe.scheduler.config).theory_solver(3)
    problem, training = Problem(pipe), taught(inputs(16))
    result = distill_gauss_newton(problem, start, training, taught(inputs(16, 100)), max_iterations=2)
    assert result.distance < 0.7 * result.initial_distance

    scheduler = GASScheduler.from_config(pipe.scheduler.config)
    scheduler.add_solver(result.solver)
    batch = taught(inputs(16, 100))
    _, final = sample_latents(pipe, scheduler, 3, **batch.inputs.pipeline_arguments(pipe))
    assert (final - batch.final).square().mean().item() == pytest.approx(result.distance, rel=1e-3)


def test_a_solver_may_start_from_a_calibrated_plan(unet):
    """Its times are those of the scheduler that takes it, not of SDM's schedule: the noise levels are the same."""
    sdm = SDMScheduler.from_config(EDMEulerScheduler().config, solver="dpmsolver++", t_end=1e-5)
    scheduler = GASScheduler.from_config(sdm.config)
    scheduler.add_solver(sdm.initial_solver(6))
    scheduler.set_timesteps(6)
    torch.testing.assert_close(scheduler.sigmas[:-1], sdm.plan_for(6).sigmas[:-1].float(), rtol=1e-4, atol=0)
    assert pipeline(unet, scheduler)(1, None, 6, output_type="pt").images.isfinite().all()
