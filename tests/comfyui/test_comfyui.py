"""The nodes in comfyui/ give the samples of `GASScheduler`, through stand-ins of ComfyUI's objects or its own."""

import asyncio
import copy
import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from comfyui_stand_in import COMFYUI_PATH, Model, load_nodes, model_sampling
from conftest import ROOT
from hub_server import run_code, running_hub
from saved_schedulers import CONFIGS, FLOW, STABLE_DIFFUSION, perturbed, planned_scheduler
from saved_schedulers import learned as learned_scheduler
from torch import Tensor

from diffusers_gas import GASScheduler
from diffusers_gas.guided_solver import GuidedSolver


NODES = load_nodes()
load = NODES.loading.load

V_PREDICTION = STABLE_DIFFUSION | {"prediction_type": "v_prediction"}
ZERO_SNR = V_PREDICTION | {"rescale_betas_zero_snr": True}
DYNAMIC = CONFIGS["dynamic-shift"]
KINDS = {
    "epsilon": (STABLE_DIFFUSION, "eps"),
    "v": (V_PREDICTION, "v"),
    "flow": (FLOW, "flow"),
}


def network(x: Tensor, timestep: Tensor) -> Tensor:
    """A smooth function in the place of a network, told whole times as ComfyUI's older models are."""
    t = timestep.round().reshape(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
    return torch.sin(1.3 * x + t / 500) + 0.2 * x.flip(-1)


def learned(config: dict[str, Any], *step_counts: int) -> GASScheduler:
    """A scheduler whose network is never told a time before the noisiest. ComfyUI's models of whole times have none."""
    scheduler = learned_scheduler(config, *step_counts)
    for solver in scheduler.solvers.values():
        solver.timestep_offsets.data[0] = -0.01
    return scheduler


def noise(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def model_for(config: dict[str, Any], kind: str) -> Model:
    return Model(model_sampling(kind, config.get("flow_shift", 1.0)), network)


def scheduler_samples(
    scheduler: Any, x: Tensor, begin: int = 0, end: int | None = None, steps: int = 6, **arguments: Any
) -> Tensor:
    """The steps `begin` to `end` of a pipeline."""
    scheduler.set_timesteps(steps, **arguments)
    scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin:end]:
        x = scheduler.step(network(x, t.expand(len(x))), t, x, return_dict=False)[0]
    return x


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def case(request, tmp_path) -> tuple[GASScheduler, Model, str]:
    """A scheduler, its MODEL, and its exported file."""
    config, kind = request.param
    scheduler = learned(config, 4, 6)
    scheduler.export(tmp_path / "solver.json")
    return scheduler, model_for(config, kind), str(tmp_path / "solver.json")


def test_samples_are_those_of_the_scheduler(case):
    scheduler, model, path = case
    sampler, sigmas = load(model, path, 6)
    assert sigmas.shape == (7,) and sigmas.dtype == torch.float32 and sigmas[-1] == 0
    assert sigmas[0] == model.model_sampling.sigma_max and (sigmas.diff() < 0).all()
    torch.testing.assert_close(sigmas[1:-1], scheduler_sigmas(scheduler, 6)[1:-1], rtol=1e-5, atol=0)
    seen = []
    result = model.sample(sampler, sigmas, noise(), callback=lambda i, denoised, x, total: seen.append((i, total)))
    torch.testing.assert_close(result, scheduler_samples(scheduler, noise()), rtol=1e-4, atol=2e-5)
    assert seen == [(i, 6) for i in range(6)] and len(model.calls) == 6


def scheduler_sigmas(scheduler: Any, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    return torch.tensor(scheduler.step_numbers().sigmas)


@pytest.mark.parametrize("shift", [1.5, 7.0])
def test_a_folder_is_loaded_for_the_shift_of_the_model(shift, tmp_path):
    learned(FLOW, 6).save_pretrained(tmp_path / "static")
    learned(DYNAMIC, 6).save_pretrained(tmp_path / "dynamic")
    for name, arguments in (("static", {}), ("dynamic", {"mu": math.log(shift)})):
        model = Model(model_sampling("flow", shift), network)
        sampler, sigmas = load(model, str(tmp_path / name), 6)
        scheduler = GASScheduler.from_pretrained(tmp_path / name)
        if name == "static":
            scheduler.set_shift(shift)
        expected = scheduler_samples(scheduler, noise(), **arguments)
        torch.testing.assert_close(model.sample(sampler, sigmas, noise()), expected, rtol=1e-4, atol=2e-5)


def test_a_folder_that_has_an_exported_file_only(case, tmp_path):
    """With the package as without it (see `test_without_diffusers`)."""
    _, model, path = case
    for given in (path, tmp_path):
        sampler, sigmas = load(model, str(given), 6)
        assert model.sample(sampler, sigmas, noise()).isfinite().all()


def test_a_repository_that_has_an_exported_file_only(tmp_path):
    learned(FLOW, 6).export(tmp_path / "files" / "solver.json")
    code = """
from comfyui_stand_in import Model, load_nodes, model_sampling
load = load_nodes().loading.load
for name in ("exported", "missing"):
    try:
        answers[name] = load(Model(model_sampling("flow", 3.0), None), f"user/{name}", 6)[1].tolist()
    except OSError as error:
        answers[name] = str(error)
"""
    with running_hub() as hub:
        hub.add_folder("user/exported", tmp_path / "files")
        answers = run_code(hub, tmp_path / "home", code)
    model = Model(model_sampling("flow", 3.0), network)
    assert answers["exported"] == load(model, str(tmp_path / "files"), 6)[1].tolist()
    assert "user/missing is not a local folder" in answers["missing"]


def test_a_zero_snr_model_scales_its_own_largest_level(tmp_path):
    """ComfyUI ends this schedule at another level than Diffusers."""
    scheduler = learned(ZERO_SNR, 6)
    scheduler.export(tmp_path / "solver.json")
    scheduler.set_timesteps(6)
    alphas_cumprod = scheduler.alphas_cumprod.double()
    alphas_cumprod[-1] = 4.9e-8
    model = Model(model_sampling("v", sigmas=(1 / alphas_cumprod - 1).sqrt()), network)
    sampler, sigmas = load(model, str(tmp_path / "solver.json"), 6)
    assert sigmas[0] == model.model_sampling.sigma_max > 1.001 * scheduler.sigmas[0]
    expected = scheduler_samples(scheduler, noise())
    torch.testing.assert_close(model.sample(sampler, sigmas, noise()), expected, rtol=1e-3, atol=1e-3)


def test_plans_of_sdm_sample_too(tmp_path):
    scheduler = planned_scheduler(8, **FLOW, solver="heun")
    scheduler.export(tmp_path / "plan.json")
    model = model_for(FLOW, "flow")
    assert scheduler_sigmas(scheduler, 8).diff().eq(0).any()  # where a Heun step ends and the next begins
    for begin in range(8):
        sampler, sigmas = load(model, str(tmp_path / "plan.json"), 8, (8 - begin) / 8)
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(begin)
        start = scheduler.add_noise(noise(1), noise(2), None) if begin else noise(2)
        expected = scheduler_samples(scheduler, start, begin, steps=8)
        result = model.sample(sampler, sigmas, noise(2), latent_image=noise(1))
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(("denoise", "begin"), [(0.7, 2), (0.5, 3), (0.17, 5)])
def test_denoise_starts_in_the_middle(case, denoise, begin):
    scheduler, model, path = case
    sampler, sigmas = load(model, path, 6, denoise)
    assert len(sigmas) == 7 - begin
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(begin)
    start = scheduler.add_noise(noise(1), noise(2), scheduler.timesteps[:1])
    expected = scheduler_samples(scheduler, start, begin)
    result = model.sample(sampler, sigmas, noise(2), latent_image=noise(1))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=5e-5)


def test_no_denoising_leaves_no_levels(case):
    _, model, path = case
    assert load(model, path, 6, denoise=0.0)[1].shape == (0,)


def test_split_sigmas(case):
    """Both parts of a split list follow the solver. The second begins anew, as image to image does."""
    scheduler, model, path = case
    sampler, sigmas = load(model, path, 6)
    middle = model.sample(sampler, sigmas[:4], noise())
    result = model.sample(sampler, sigmas[3:], torch.zeros_like(middle), latent_image=middle)
    expected = scheduler_samples(scheduler, scheduler_samples(scheduler, noise(), end=3), begin=3)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=5e-5)
    assert torch.equal(sampler.sampler_function(model, middle, sigmas[-1:]), middle)  # a split without steps


def test_other_code_finds_the_levels_that_the_network_is_told(case):
    _, model, path = case
    sampler, sigmas = load(model, path, 6)
    options = {"transformer_options": {"kept": 1, "sample_sigmas": sigmas}}
    before = sigmas.clone()
    model.sample(sampler, sigmas, noise(), **options)
    assert torch.equal(sigmas, before) and options["transformer_options"]["sample_sigmas"] is sigmas
    for k, (sigma, listed) in enumerate(model.calls):
        assert listed.shape == sigmas.shape and listed[-1] == 0
        assert (sigma == listed[k]).all()
    assert not torch.allclose(listed, sigmas, rtol=1e-3)  # the network is told other levels than those of the states


def test_inpainting_keeps_the_image(case):
    _, model, path = case
    sampler, sigmas = load(model, path, 6)
    image, mask = noise(3), torch.zeros(2, 1, 8, 8)
    mask[..., 4:] = 1
    result = model.sample(sampler, sigmas, noise(), latent_image=image, denoise_mask=mask)
    assert torch.equal(result[..., :4], image[..., :4])
    assert (result[..., 4:] - image[..., 4:]).abs().mean() > 0.1


def test_inpainting_with_a_mask_that_depends_on_the_level(case):
    """Differential diffusion."""
    _, model, path = case
    sampler, sigmas = load(model, path, 6)
    image, levels = noise(3), []

    def mask_of(sigma: Tensor, mask: Tensor, extra_options: dict[str, Any]) -> Tensor:
        assert extra_options["model"] is model and torch.equal(extra_options["sigmas"], sigmas)
        levels.append(sigma[0].item())
        return torch.zeros_like(mask)

    mask = torch.ones(2, 1, 8, 8)
    result = model.sample(
        sampler, sigmas, noise(), latent_image=image, denoise_mask=mask, denoise_mask_function=mask_of
    )
    assert torch.equal(result, image) and levels[-1] == levels[-2]


SCALES = (2.0, 5.0, 10.0)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def ranged(request, tmp_path) -> tuple[GASScheduler, Model, str]:
    """A scheduler with a solver for a range of guidance scales, its MODEL, and its exported file."""
    config, kind = request.param
    scheduler = learned(config, 6)
    knots = [perturbed(copy.deepcopy(scheduler.solvers[6]), 0.01, 0.0, seed) for seed in range(3)]
    scheduler.add_solver(GuidedSolver(knots, SCALES))
    scheduler.export(tmp_path / "solver.json", guidance_scales=[2.0, 4.0, 7.5, 10.0])
    return scheduler, model_for(config, kind), str(tmp_path / "solver.json")


def of_scale(scheduler: GASScheduler, scale: float, x: Tensor, begin: int = 0, end: int | None = None) -> Tensor:
    scheduler.set_guidance_scale(scale)
    return scheduler_samples(scheduler, x, begin, end)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("interface", ["cfg", "told", "input"])
def test_solvers_of_several_guidance_scales(ranged, interface, caplog):
    """They follow the CFG of the sampler, what FLUX is told instead, or the input of the node."""
    scheduler, model, path = ranged
    following, sigmas = load(model, path, 6)
    others = [of_scale(scheduler, scale, noise()) for scale in (2.0, 4.0, 7.5, 10.0)]
    assert not any(close(others[i], others[i - 1]) for i in range(4))
    for cfg, scale in ((7.0, 7.5), (2.0, 2.0), (7.5, 7.5), (4.2, 4.0), (30.0, 10.0)):
        assert not caplog.records
        sampler = following
        if interface == "cfg":
            model.cfg = cfg
        elif interface == "told":
            model.cfg, model.original_conds = 1.0, {"positive": [{"guidance": cfg}]}
        else:
            sampler, sigmas = load(model, path, 6, guidance_scale=cfg)
        assert close(model.sample(sampler, sigmas, noise()), of_scale(scheduler, scale, noise()))
    assert "from 2 to 10" in caplog.text and "is used with 30" in caplog.text


def test_samplers_do_not_share_a_guidance_scale(ranged):
    _, model, path = ranged
    nodes = [load(model, path, 6, guidance_scale=scale) for scale in (2.0, 10.0)]
    fresh = [model.sample(*load(model, path, 6, guidance_scale=scale), noise()) for scale in (2.0, 10.0)]
    for i in (0, 1, 0):
        assert torch.equal(model.sample(*nodes[i], noise()), fresh[i])
    sampler, sigmas = load(model, path, 6)
    network, nested = model.network, []

    def sampling_another(x: Tensor, timestep: Tensor) -> Tensor:
        """In the middle of a sampling the same SAMPLER samples at another scale."""
        if not nested:
            nested.append(None)
            model.cfg = 10.0
            nested[0] = model.sample(sampler, sigmas, noise())
        return network(x, timestep)

    model.network, model.cfg = sampling_another, 2.0
    assert close(model.sample(sampler, sigmas, noise()), fresh[0]) and close(nested[0], fresh[1])


def test_a_start_in_the_middle_is_that_of_one_guidance_scale(ranged):
    """SIGMAS are made before the sampler knows its scale, and a noised image has the level of one of them."""
    scheduler, model, path = ranged
    for cfg in (2.0, 10.0):
        model.cfg = cfg
        sampler, sigmas = load(model, path, 6)
        for part in (sigmas[:4], sigmas[3:]):
            with pytest.raises(ValueError, match=f"Set the node's `guidance_scale` to that of the sampler, {cfg:g}"):
                model.sample(sampler, part, noise())
        sampler, sigmas = load(model, path, 6, guidance_scale=cfg)
        middle = model.sample(sampler, sigmas[:4], noise())
        result = model.sample(sampler, sigmas[3:], torch.zeros_like(middle), latent_image=middle)
        expected = of_scale(scheduler, cfg, of_scale(scheduler, cfg, noise(), end=3), begin=3)
        assert close(result, expected)


def test_a_folder_of_a_range_follows_the_guidance_scale(ranged, tmp_path):
    scheduler, model, _ = ranged
    scheduler.save_pretrained(tmp_path / "saved")
    sampler, sigmas = load(model, str(tmp_path / "saved"), 6)
    model.cfg = 10.0
    assert close(model.sample(sampler, sigmas, noise()), of_scale(scheduler, 10.0, noise()))
    sampler, sigmas = load(model, str(tmp_path / "saved"), 6, guidance_scale=3.3)
    assert close(model.sample(sampler, sigmas, noise()), of_scale(scheduler, 3.3, noise()))


def test_a_sampler_without_a_guidance_scale(ranged):
    _, model, path = ranged
    sampler, sigmas = load(model, path, 6)
    with pytest.raises(ValueError, match="the sampler does not tell its own"):
        model.sample(sampler, sigmas, noise())


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    flow, other = tmp_path / "flow.json", tmp_path / "other.json"
    learned(FLOW, 6).export(flow)
    other.write_text('{"a": 1}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "newer.json").write_text(json.dumps(json.loads(flow.read_text()) | {"version": 2}))
    epsilon = tmp_path / "epsilon.json"
    learned({"beta_schedule": "linear", "beta_end": 0.05}, 6).export(epsilon)
    cases = [
        (KINDS["flow"], flow, 5, r"no solver for 5 steps, but for \[6\]"),
        (KINDS["epsilon"], flow, 6, "is for flow matching, but this MODEL is of another kind"),
        (KINDS["flow"], epsilon, 6, "is for variance preserving, but this MODEL is a flow-matching model"),
        (KINDS["epsilon"], epsilon, 6, "is for another noise schedule"),
        ((FLOW | {"flow_shift": 5.0}, "flow"), flow, 6, r"shifts \[3\.0\], but this MODEL has 5\.0"),
        (KINDS["flow"], other, 6, "is not a file of `diffusers-gas export`"),
        (KINDS["flow"], tmp_path / "newer.json", 6, "version 2"),
        (KINDS["flow"], tmp_path / "broken.json", 6, "is no JSON file"),
        (KINDS["flow"], tmp_path / "missing.json", 6, "there is no "),
    ]
    for (config, kind), path, steps, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            load(model_for(config, kind), str(path), steps)
        assert "\n" not in str(error.value)
    sampler, _ = load(model_for(*KINDS["flow"]), str(flow), 6)
    with pytest.raises(ValueError, match="needs the SIGMAS of the same node"):
        model_for(*KINDS["flow"]).sample(sampler, torch.linspace(1, 0, 7), noise())


WITHOUT_PACKAGE = """
import sys
sys.modules |= {"diffusers": None, "diffusers_gas": None}
sys.path.insert(0, "tests")
from types import SimpleNamespace
sys.modules["conftest"] = SimpleNamespace(ROOT=__import__("pathlib").Path.cwd())
from comfyui_stand_in import load_nodes, model_sampling, Model
load = load_nodes().loading.load
model = Model(model_sampling("flow", 3.0), lambda x, t: x)
for solver in sys.argv[1:]:
    try:
        print(load(model, solver, 6)[1].tolist())
    except ValueError as error:
        print(error)
"""


def test_without_diffusers(tmp_path):
    """An exported file needs neither Diffusers nor this package, and a folder with one in it neither."""
    environment = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    learned(FLOW, 6).save_pretrained(tmp_path / "only_solver")
    learned(FLOW, 6).export(tmp_path / "exported" / "solver.json")
    words = [tmp_path / "exported" / "solver.json", tmp_path / "exported", tmp_path / "only_solver", "user/solver"]
    command = [sys.executable, "-c", WITHOUT_PACKAGE, *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment)
    file, folder, only_solver, hub = result.stdout.splitlines()
    assert file == folder and len(json.loads(file)) == 7
    assert "install diffusers_gas" in only_solver
    assert hub.startswith("Load GAS solver: the Hub gives no solver.json of user/solver")


def test_the_node_of_older_versions(case):
    _, model, path = case
    node_class = NODES.older_nodes.NODE_CLASS_MAPPINGS["LoadGASSolver"]
    inputs = node_class.INPUT_TYPES()["required"]
    assert list(inputs) == ["model", "solver", "steps", "denoise"]
    assert list(node_class.INPUT_TYPES()["optional"]) == ["guidance_scale"]  # graphs from before it run as they are
    defaults = {name: options["default"] for name, (_, options) in list(inputs.items())[1:]}
    sampler, sigmas = getattr(node_class(), node_class.FUNCTION)(model, **defaults | {"solver": path})
    assert torch.equal(sigmas, load(model, path, 4)[1])
    assert model.sample(sampler, sigmas, noise()).isfinite().all()
    before = node_class.IS_CHANGED(model=model, **defaults | {"solver": path})
    learned(FLOW, 4).export(path)
    assert node_class.IS_CHANGED(model=model, **defaults | {"solver": path}) != before


@pytest.mark.skipif(COMFYUI_PATH is None, reason="needs ComfyUI in COMFYUI_PATH")
def test_the_node_of_comfyui(case):
    """Its present interface."""
    _, model, path = case
    extension = asyncio.run(NODES.package.comfy_entrypoint())
    (node_class,) = asyncio.run(extension.get_node_list())
    schema = node_class.GET_SCHEMA()
    assert (schema.node_id, schema.display_name) == ("LoadGASSolver", "Load GAS solver")
    assert [entry.id for entry in schema.inputs] == ["model", "solver", "steps", "denoise", "guidance_scale"]
    assert [entry.get_io_type() for entry in schema.outputs] == ["SAMPLER", "SIGMAS"]
    sampler, sigmas = node_class.execute(model, path, 4, 1.0).result
    assert torch.equal(sigmas, load(model, path, 4)[1]) and model.sample(sampler, sigmas, noise()).isfinite().all()


def test_the_workflow_uses_the_node():
    workflow = json.loads((ROOT / "comfyui" / "workflow.json").read_text(encoding="utf-8"))
    nodes = {node["type"]: node for node in workflow["nodes"]}
    loader = nodes["LoadGASSolver"]
    assert len(loader["widgets_values"]) == len(NODES.loading.INPUTS)
    links = {link[0]: link for link in workflow["links"]}
    assert {output["type"] for output in loader["outputs"]} == {"SAMPLER", "SIGMAS"}
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for output in loader["outputs"]:
        (link,) = output["links"]
        _, source, _, target, slot, kind = links[link]
        assert source == loader["id"] and kind == output["type"]
        assert by_id[target]["type"] == "SamplerCustom" and by_id[target]["inputs"][slot]["type"] == kind
