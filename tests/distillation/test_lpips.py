"""LPIPS with random weights, and where its weights come from."""

import functools
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import Repository, run_code, running_hub
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusers_gas import GASScheduler
from diffusers_gas.distillation import lpips as lpips_module
from diffusers_gas.distillation.gauss_newton import Problem, distill_gauss_newton
from diffusers_gas.distillation.lpips import LINEAR_FILE, LPIPS, VGG16_FILE
from diffusers_gas.least_squares import Loss
from diffusers_gas.pipelines.driving import sample_latents
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache


CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # their places in torchvision's `vgg16().features`
CHANNELS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Random weights by their published names, in half precision to be small on disk."""
    generator = torch.Generator().manual_seed(0)
    tensors, inputs = {}, 3
    for place, channels in zip(CONVOLUTIONS, CHANNELS):
        weight = torch.randn(channels, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
        tensors[f"features.{place}.weight"] = weight.half()
        tensors[f"features.{place}.bias"] = 0.1 * torch.randn(channels, generator=generator).half()
        inputs = channels
    for k, channels in enumerate((64, 128, 256, 512, 512)):
        # Some are negative, and count as 0.
        tensors[f"lin{k}.model.1.weight"] = torch.randn(1, channels, 1, 1, generator=generator).half()
    return tensors


@pytest.fixture(scope="module")
def weight_files(tensors, tmp_path_factory) -> dict[str, Path]:
    """The files of the Hub, by repository."""
    folder = tmp_path_factory.mktemp("weights")
    vgg16 = {name: tensor for name, tensor in tensors.items() if name.startswith("features.")}
    linear = {f"{k}.weight": tensors[f"lin{k}.model.1.weight"] for k in range(5)}
    save_file(vgg16 | {"pre_logits.fc1.bias": torch.ones(3)}, folder / "vgg16.safetensors")
    save_file(linear, folder / "linear.safetensors")
    return {VGG16_FILE["repo_id"]: folder / "vgg16.safetensors", LINEAR_FILE["repo_id"]: folder / "linear.safetensors"}


@pytest.fixture(autouse=True)
def hub(monkeypatch, weight_files):
    """Files as if they had been downloaded."""
    monkeypatch.setattr(lpips_module, "hf_hub_download", lambda repo_id, **_: weight_files[repo_id])


def published(x: Tensor, y: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """LPIPS `(batch_size,)`, equation 1 of the paper, with the input scaling of its version 0.1."""
    activations = []
    for image in (x, y):
        image = (image - torch.tensor([-0.030, -0.088, -0.188])[:, None, None].to(image)) / torch.tensor(
            [0.458, 0.448, 0.450]
        )[:, None, None].to(image)
        stages = []
        for place in CONVOLUTIONS:
            if place in (5, 10, 17, 24):
                stages.append(image)
                image = nn.functional.max_pool2d(image, 2, 2)
            weight, bias = (tensors[f"features.{place}.{name}"].to(image) for name in ("weight", "bias"))
            image = nn.functional.conv2d(image, weight, bias, padding=1).relu()
        activations.append([*stages, image])
    total = 0
    for k, (a, b) in enumerate(zip(*activations)):
        a, b = (stage / (stage.square().sum(1, keepdim=True).sqrt() + 1e-10) for stage in (a, b))
        weight = tensors[f"lin{k}.model.1.weight"].to(a).clamp_min(0)
        total = total + nn.functional.conv2d((a - b) ** 2, weight).mean(dim=(1, 2, 3))
    return total


def distance(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = Loss(features=model)
    return loss.value(loss.residual(x, y)).mean()


def images(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(1.6 * torch.rand(*shape, dtype=dtype) - 0.8 for _ in range(2))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_the_loss_is_published_lpips(tensors, dtype, tolerance):
    model = LPIPS.from_pretrained(size=None).to(dtype)
    x, y = images(2, 3, 24, 32, dtype=dtype)
    expected = published(x, y, tensors)
    assert distance(model, x, y).item() == pytest.approx(expected.mean().item(), rel=tolerance)
    assert distance(model, x[:1], y[:1]).item() == pytest.approx(expected[0].item(), rel=tolerance)
    assert distance(model, y, x).item() == distance(model, x, y).item() > 0
    assert distance(model, x, x).item() == 0


def test_images_are_resized_and_clipped(tensors):
    x, y = (2 * image for image in images(2, 3, 8, 12))
    resized = [nn.functional.interpolate(image, size=(32, 32), mode="bilinear").clamp(-1, 1) for image in (x, y)]
    actual = distance(LPIPS.from_pretrained(size=32), x, y)
    assert actual.item() == pytest.approx(published(*resized, tensors).mean().item(), rel=1e-4)


def test_grey_images_have_equal_channels():
    model = LPIPS.from_pretrained(size=16)
    x, _ = images(2, 1, 8, 8)
    torch.testing.assert_close(model(x), model(x.expand(-1, 3, -1, -1)))


def test_videos_are_the_mean_of_their_frames():
    model = LPIPS.from_pretrained(size=16)
    x, y = images(2, 3, 4, 8, 8)
    frames = [distance(model, x[:, :, i], y[:, :, i]).item() for i in range(4)]
    assert distance(model, x, y).item() == pytest.approx(sum(frames) / 4, rel=1e-4)


def test_gradients_are_finite_differences():
    model = LPIPS.from_pretrained(size=20).double()
    x, y = images(1, 3, 12, 12, dtype=torch.float64)
    x.requires_grad_()
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(distance(model, x, y), x)
    with torch.no_grad():
        ahead, behind = (distance(model, x + size * direction, y) for size in (1e-7, -1e-7))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind).item() / 2e-7, rel=1e-5)
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())


def test_gradients_where_nothing_is_active_are_zero():
    model = LPIPS(size=16)
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.bias, -10)
    x, y = images(1, 3, 16, 16)
    (gradient,) = torch.autograd.grad(distance(model, x.requires_grad_(), y), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_gauss_newton_lowers_lpips(digits, tmp_path):
    scheduler = GASScheduler.from_config(digits.scheduler.config)
    samples = TeacherCache(tmp_path, "digits", scheduler, 10).collect(digits, SampleInputs.create(0, 6), 6, "")
    loss = Loss(features=LPIPS.from_pretrained(size=16))
    start = GASScheduler.from_config(digits.scheduler.config, t_start=0.8).theory_solver(2)
    history, lpips = [], []
    result = distill_gauss_newton(
        Problem(digits, loss), start, samples, samples, max_iterations=3, on_judgement=history.append
    )
    for solver in (start, result.solver):
        scheduler.add_solver(solver)
        _, final = sample_latents(digits, scheduler, 2, **samples.inputs.pipeline_arguments(digits))
        lpips.append(distance(loss.features, final, samples.final).item())
    assert lpips[1] < 0.7 * lpips[0]
    assert history[-1]["validation_loss"] == pytest.approx(lpips[1], rel=1e-3)


def test_without_weights_the_options_are_named(monkeypatch, tmp_path):
    offline = functools.partial(huggingface_hub.hf_hub_download, cache_dir=tmp_path, local_files_only=True)
    monkeypatch.setattr(lpips_module, "hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"from timm/vgg16.*'pixels'"):
        LPIPS.from_pretrained()


def test_weights_of_the_hub(weight_files, tmp_path, monkeypatch):
    code = (
        "import torch\n"
        "from diffusers_gas.distillation.lpips import LPIPS\n"
        "models = [LPIPS.from_pretrained(size=16) for _ in range(2)]\n"
        "answers['sums'] = [model(torch.full((1, 3, 16, 16), 0.5)).double().sum().item() for model in models]"
    )
    expected = LPIPS.from_pretrained(size=16)(torch.full((1, 3, 16, 16), 0.5)).double().sum().item()
    monkeypatch.setattr(lpips_module, "hf_hub_download", huggingface_hub.hf_hub_download)
    with running_hub() as hub:
        for file in (VGG16_FILE, LINEAR_FILE):
            files = {file["filename"]: weight_files[file["repo_id"]].read_bytes()}
            hub.repositories[file["repo_id"]] = Repository(commits={file["revision"]: files})
        first, second = run_code(hub, tmp_path / "home", code)["sums"]
    downloads = [path for method, path in hub.requests if method == "GET"]
    assert len(downloads) == len(set(downloads)) == 2  # the second time they come from the cache
    assert first == second == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (1, 1, 64)])
def test_other_than_grey_or_coloured_images(shape):
    with pytest.raises(ValueError, match="1 or 3 channels, got shape"):
        LPIPS(size=16)(torch.zeros(shape))


def test_too_small_a_size():
    with pytest.raises(ValueError, match="at least 16"):
        LPIPS(size=8)
