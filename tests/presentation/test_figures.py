"""Time grids of schedulers, and figures."""

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from matplotlib.figure import Figure
from PIL import Image
from saved_schedulers import CONFIGS, learned

from diffusers_gas import GASScheduler, GeneralizedSolver, SDMScheduler
from diffusers_gas.pipelines.named_schedulers import EXAMPLE_MU
from diffusers_gas.presentation import figures
from diffusers_gas.presentation.description import describe
from diffusers_gas.presentation.figures import (
    comparison_picture,
    draw_plans,
    draw_solvers,
    save_figure,
)


every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.mark.parametrize("n", [6, 30])
@every_config
def test_described_levels_are_those_that_are_followed(config, n):
    """Of a solver that keeps some noise, and of one that ends without."""
    scheduler = GASScheduler(**config)
    rows = [line.split() for line in describe(scheduler, [n]).splitlines() if line.split()[:1] == [str(n)]]
    (last,) = (row for row in rows if len(row) == 4)
    scheduler.set_timesteps(n, mu=EXAMPLE_MU)
    assert float(last[-2]) == pytest.approx(scheduler.sigmas[-1].item(), rel=1e-3)
    assert (last[-1] == "inf") == (scheduler.sigmas[-1] == 0)


def test_rows_of_times_are_those_of_the_schedules():
    scheduler = learned(CONFIGS["flow"], 4, 6)
    axis = Figure().subplots()
    figures._draw_times(axis, scheduler, [4, 6])
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "4 steps, GASScheduler",
        "4 steps, DPM-Solver++",
        "6 steps, GASScheduler",
        "6 steps, DPM-Solver++",
    ]
    lines = [line.get_xdata() for line in axis.get_lines()]
    for n, (states, evaluations) in {4: lines[:2], 6: lines[4:6]}.items():
        noise_schedule = scheduler.noise_schedule()
        table = scheduler.solvers[n].table(noise_schedule)
        assert table.times[0] == 1 and states[0] == axis.get_xticks().min()
        np.testing.assert_allclose(states[1:], 2 * noise_schedule.lambda_(table.times[1:]).detach())
        np.testing.assert_allclose(evaluations, 2 * noise_schedule.lambda_(table.evaluation_times).detach())
    assert [label.get_text() for label in axis.get_xticklabels()][-2:] == ["-inf", "inf"]


def test_cells_are_the_coefficients():
    solver = learned(CONFIGS["scaled-linear"], 4).solvers[4]
    noise_schedule = GASScheduler(**CONFIGS["scaled-linear"]).noise_schedule()
    axes = Figure().subplots(1, 2)
    figures._draw_tables(axes, {"learned": solver, "theory": GeneralizedSolver(4)}, noise_schedule)
    weights = solver.table(noise_schedule).weights
    cells = {text.get_position(): text.get_text() for text in axes[0].texts}
    assert cells == {(j, k): f"{weights[k, j]:.2f}" for k in range(4) for j in range(3 + k)}
    images = [axis.get_images()[0] for axis in axes]
    np.testing.assert_array_equal(images[0].get_array(), weights.detach())
    assert images[0].get_clim() == images[1].get_clim() and sum(images[0].get_clim()) == 0


def test_pictures_of_calibrated_plans_of_several_lengths(tmp_path, monkeypatch):
    plans = [SDMScheduler().plan_for(n) for n in (6, 9, 12)]
    for i, plan in enumerate(plans[:2]):  # the last was not measured
        n = plan.num_steps
        measured = {"eta": [1e-3] * n, "curvature": [0.1] * n, "karras_eta": [1e-3] * n}
        plans[i] = replace(plan, provenance={**measured, "karras_sigmas": plan.sigmas.tolist()})
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: drawn.append(figure) or save_figure(figure, path))
    draw_plans(plans, tmp_path / "plans.png")
    assert min(Image.open(tmp_path / "plans.png").size) > 900
    levels, errors, curvature, cost = drawn[0].axes
    rings = {
        axis: [line.get_xydata() for line in axis.get_lines() if line.get_markersize() == 10] for axis in drawn[0].axes
    }
    for i, plan in enumerate(plans):
        k, sigma = plan.switch_index, plan.sigmas[plan.switch_index].item()
        np.testing.assert_allclose(rings[levels][i], [[k, sigma]])
        if plan is not plans[2]:
            np.testing.assert_allclose(rings[errors][i], [[sigma, 1e-3]])
            np.testing.assert_allclose(rings[curvature][i], [[sigma, 0.1]])
            np.testing.assert_allclose(rings[cost][i], [[sigma, k + 1]])


@every_config
def test_pictures_of_every_noise_schedule(config, tmp_path):
    draw_solvers(learned(config, 4), [4], tmp_path / "solvers.png")
    draw_solvers(GASScheduler(**config), [3], tmp_path / "theory.png")
    draw_plans([SDMScheduler(**config).plan_for(6, EXAMPLE_MU)], tmp_path / "plans.png")
    for path in tmp_path.iterdir():
        assert np.asarray(Image.open(path)).std() > 10, path
    assert len(list(tmp_path.iterdir())) == 3


def test_pictures_of_schedulers_that_went_through_another_class(tmp_path):
    scheduler = GASScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    draw_solvers(scheduler, [4], tmp_path / "theory.png")


# Samples


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_has_all_images(channels, tmp_path):
    rows = {"first": np.zeros((3, 8, 8, channels)), "second": np.ones((2, 8, 8, channels))}
    comparison_picture(rows, tmp_path / "picture.png", ["a title of several words"])
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("L"))
    assert (pixels == 0).mean() > 0.1 and list(tmp_path.iterdir()) == [tmp_path / "picture.png"]


@pytest.mark.parametrize("size, times", [(16, 5), (64, 2), (512, 0.6)])
def test_small_pictures_are_magnified(size, times, tmp_path):
    comparison_picture({"row": np.zeros((3, size, size, 3))}, tmp_path / "picture.png")
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("L"))
    assert (pixels == 0).sum() > 3 * (times * size) ** 2


def test_picture_leaves_the_backend_of_matplotlib(tmp_path):
    """Also in a notebook, where the backend draws into cells."""
    from matplotlib import pyplot

    with matplotlib.rc_context():
        matplotlib.use("svg")
        comparison_picture({"row": np.zeros((1, 4, 4, 1))}, tmp_path / "picture.png")
        assert matplotlib.get_backend() == "svg" and not pyplot.get_fignums()
    matplotlib.use("agg")


def test_prompts_are_texts_and_no_formulas(tmp_path):
    image = np.zeros((4, 4, 3))
    comparison_picture({"a $b": [image]}, tmp_path / "picture.png", ["costs $5, not $x^"])
    assert Image.open(tmp_path / "picture.png").size[0] > 100
