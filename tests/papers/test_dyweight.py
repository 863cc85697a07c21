"""DyWeight's tables, as its code samples with them, become solvers with the same samples."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from scripts import run_script
from torch import Tensor

from diffusers_gas import GASScheduler
from diffusers_gas.commands.convert import main
from diffusers_gas.noise_schedules import FlowMatchSchedule
from diffusers_gas.papers.dyweight import convert_checkpoint


MU, SHIFT = 0.63, 1.8776105792643432


def checkpoint(n: int, seed: int = 0) -> dict[str, Any]:
    """A file's content, with weights like those of the published ones: near Euler's, and some on the prediction before."""
    generator = torch.Generator().manual_seed(seed)
    spread = 0.08 * torch.randn(n, n, generator=generator)
    weights = 0.93 * torch.eye(n) + spread.tril() * (torch.ones(n, n).tril().triu(-1))
    scales = 1 + 0.02 * torch.randn(n, generator=generator)
    return {"dyweight_weights_raw": weights, "dyweight_t_scales": scales, "window_size": 2}


def network(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.sin(1.3 * x + 3 * sigma) + 0.2 * x.flip(-1)


def published_sampling(content: dict[str, Any], x: Tensor) -> Tensor:
    """Section 3 of the paper, in the form of its code for FLUX: the true level follows from the weights."""
    weights, scales = content["dyweight_weights_raw"].double(), content["dyweight_t_scales"].double()
    t = torch.linspace(1, 0, len(weights) + 1, dtype=torch.float64)
    sigmas = SHIFT * t / (1 + (SHIFT - 1) * t)
    level, velocities = sigmas[0], []
    for k, row in enumerate(weights):
        velocities.append(network(x, scales[k] * level))
        used = row[: k + 1]
        x = x + (sigmas[k + 1] - level) * torch.einsum("j,j...->...", used, torch.stack(velocities))
        level = level + used.sum() * (sigmas[k + 1] - level)
    return x


def sample(scheduler: GASScheduler, x: Tensor, n: int) -> Tensor:
    scheduler.set_timesteps(n, mu=MU)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double() / 1000), t, x).prev_sample
    return x


def flux(folder: Path) -> Path:
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0).save_pretrained(folder)
    return folder / "scheduler_config.json"


def test_samples_are_the_published_ones(tmp_path, capsys):
    contents = {n: checkpoint(n, seed=n) for n in (3, 5, 7)}
    for n, content in contents.items():
        torch.save(content, tmp_path / f"{n}.pt")
    paths = [str(tmp_path / f"{n}.pt") for n in contents]
    words = ["--scheduler_config", str(flux(tmp_path)), "--output_dir", str(tmp_path / "out")]
    main(["dyweight", "--checkpoint", *paths, *words])
    assert "3 steps, shift 1.878" in capsys.readouterr().out
    scheduler = GASScheduler.from_pretrained(tmp_path / "out")
    assert sorted(scheduler.solvers) == [3, 5, 7]
    assert scheduler.solvers[5].provenance["converted_from"] == "5.pt"
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for n, content in contents.items():
        torch.testing.assert_close(sample(scheduler, x, n), published_sampling(content, x), rtol=0, atol=1e-6)


def test_weights_on_predictions_that_do_not_exist_are_not_used():
    content = checkpoint(4)
    other = content | {"dyweight_weights_raw": content["dyweight_weights_raw"] + torch.ones(4, 4).triu(1)}
    found, expected = (convert_checkpoint(c, FlowMatchSchedule(SHIFT)) for c in (other, content))
    assert found.content() == expected.content()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dyweight_weights_raw": None}, "'dyweight_weights_raw' should be a tensor of finite"),
        ({"dyweight_weights_raw": torch.ones(3, 2)}, "should be n x n numbers"),
        ({"dyweight_weights_raw": torch.tensor(1.0)}, "should be n x n numbers"),
        ({"dyweight_weights_raw": torch.ones(3, 3).long()}, "'dyweight_weights_raw' should be a tensor of finite"),
        ({"dyweight_t_scales": torch.ones(4)}, r"should be n numbers for n steps, got \(4,\)"),
        ({"dyweight_t_scales": torch.full((3,), torch.nan)}, "'dyweight_t_scales' should be a tensor of finite"),
        ({"dyweight_weights_raw": 3 * torch.eye(3)}, "do not descend"),
    ],
)
def test_damaged_files(changes, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(checkpoint(3) | changes, FlowMatchSchedule(SHIFT))


def test_errors_are_one_line(tmp_path):
    torch.save([1, 2], tmp_path / "other.pt")
    torch.save(checkpoint(3), tmp_path / "3.pt")
    DDIMScheduler().save_pretrained(tmp_path / "ddim")
    for file, config, message in (
        ("other.pt", flux(tmp_path), "is not a file of DyWeight's tables for FLUX: it holds a list"),
        ("3.pt", tmp_path / "ddim" / "scheduler_config.json", "is not of a flow-matching network"),
    ):
        words = ["--checkpoint", tmp_path / file, "--scheduler_config", config, "--output_dir", tmp_path / "out"]
        result = run_script("diffusers_gas", "convert", "dyweight", *words)
        assert result.returncode == 1 and "Traceback" not in result.stderr and message in result.stderr
        assert not (tmp_path / "out").exists()


# Published lists of times


AYS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]


def test_a_list_of_timesteps(tmp_path):
    main(["times", "--timesteps", *map(str, AYS), "--output_dir", str(tmp_path / "out")])
    scheduler = GASScheduler.from_pretrained(tmp_path / "out")
    assert list(scheduler.solvers) == [10]
    untrained = GASScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(10)
    untrained.set_timesteps(timesteps=AYS)
    torch.testing.assert_close(scheduler.timesteps, untrained.timesteps, rtol=0, atol=1e-3)
    for steps in zip(scheduler.step_numbers().weights, untrained.step_numbers().weights):
        assert steps[0] == pytest.approx(steps[1], abs=1e-9)


def test_a_list_of_sigmas(tmp_path):
    levels = [14.6146, 6.3184, 3.7681, 2.1811, 1.3405, 0.8621, 0.5551, 0.3799, 0.2332, 0.1114, 0.0292]
    main(["times", "--sigmas", *map(str, levels), "--output_dir", str(tmp_path / "vp")])
    scheduler = GASScheduler.from_pretrained(tmp_path / "vp")
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(levels[:-1], rel=1e-4)

    levels = [1.0, 0.9, 0.7, 0.3, 0.0]
    words = ["--scheduler_config", str(flux(tmp_path)), "--mu", str(MU), "--output_dir", str(tmp_path / "flow")]
    main(["times", "--sigmas", *map(str, levels), *words])
    scheduler = GASScheduler.from_pretrained(tmp_path / "flow")
    scheduler.set_timesteps(4, mu=MU)
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(levels[:-1], abs=1e-6)  # after the shift


def test_lists_that_are_no_times(tmp_path):
    scheduler = GASScheduler()
    for lists in ({"timesteps": [1, 500]}, {"sigmas": []}, {"sigmas": [1.0]}, {"sigmas": [1e6, 1.0, 0.0]}):
        with pytest.raises(ValueError, match="must descend within the noise schedule"):
            scheduler.solver_on(**lists)
    for lists in ({}, {"timesteps": [999], "sigmas": [1.0, 0.0]}):
        with pytest.raises(ValueError, match="Pass one of"):
            scheduler.solver_on(**lists)
    words = ["--timesteps", 1, 500, "--output_dir", tmp_path / "out"]
    result = run_script("diffusers_gas", "convert", "times", *words)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert json.dumps([1.0, 500.0]) in result.stderr
