"""Writes RESULTS.md and the numbers in README.md from the files that the other scripts of this folder and `tests/field` wrote.

    python examples/benchmarks/results_page.py

In the README, numbers stand between the lines `<!-- numbers: NAME -->` and `<!-- end -->`. This script measures nothing.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

import numpy as np

from diffusers_gas.presentation.model_card import CITATIONS


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from field import pipelines_page


FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
# Shipped schedulers that are pictured: the picture's name, the folder, and the numbers of evaluations.
PICTURED = (
    ("solver.png", "examples/solvers/text-to-digits/gs", (4,)),
    ("plans.png", "examples/solvers/digits/sdm", (6, 10)),
)

# Longer tables stay in the benchmark's own file, to which the page links.
MOST_LINES = 8

MODELS = {
    "digits": "`digits`, pixels",
    "text-to-digits": "`text-to-digits`, Stable Diffusion, guidance 4",
    "flow-digits": "`flow-digits`, Stable Diffusion 3, guidance 4",
    "moving-digits": "`moving-digits`, Wan (video), guidance 4",
    "text-to-emoji": "`text-to-emoji`, Stable Diffusion, guidance 7.5",
}

OPENING = """# Results

The distance to the 50-step teacher, as a share of the distance of the best of Diffusers' schedulers with as many network evaluations:

{table}

![GS: distance to the teacher, relative to the best of Diffusers](examples/benchmarks/quality-gains.png)

GS is distilled and SDM is calibrated to the same teacher. The best of Diffusers is that of up to {count} schedulers and spacings. Distances are
mean squared differences of final states from the same noise, on samples that were not used for fitting.

Below, each heading has the command that repeats its numbers, and `python examples/benchmarks/run_all.py` repeats all. The models
are the small ones in `examples/teachers/`. The recorded runs used one CPU thread each, often with another run beside them: ratios
within a run are reliable, and seconds are upper bounds. Errors are standard errors over samples.
"""

# Name of the script, heading, introduction, further pictures with their captions.
SECTIONS: tuple[tuple[str, str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "main_job",
        "The main job",
        "What the README's command for distilling prints: a 4-step solver of `digits` and the closest of Diffusers' schedulers, on 32 samples. "
        "The next section has more.",
        (),
    ),
    (
        "quality",
        "Quality against network evaluations",
        "Every deterministic scheduler of Diffusers that fits the model is tried with each of its spacing options. The tables have the best of them, "
        "the best with Karras' spacing, Align Your Steps, SDM, GS and GAS, with medians: a few samples that end at another digit than the "
        "teacher's dominate some means. The Frechet distance is that to other images of the teacher, in the features of a small "
        "classifier. In short, the Frechet distances of the models for which there is GAS:",
        tuple(
            (f"quality-{model}.png", f"{model}: teacher, best of Diffusers, GS and GAS at 4 evaluations")
            for model in MODELS
        ),
    ),
    (
        "evaluations_saved",
        "Evaluations saved",
        "GS against the best of Diffusers at as many, twice and three times as many evaluations.",
        (),
    ),
    (
        "guidance_scales",
        "Guidance scales",
        "One solver for the whole range, distilled at five scales, against solvers for one scale each and the closest of Diffusers' "
        "schedulers, on samples that no fit has used. The solver follows the scale of the call. SDM plans are measured likewise: one calibrated "
        "with samples of the five scales in turn, and one for each scale.",
        (),
    ),
    (
        "adversarial",
        "Adversarial training",
        "GS, the same trained further by Adam without a discriminator, and with one (GAS), from three fits each. With our short trainings "
        "the discriminator gains nothing. They have 30 to 200 steps and 256 samples of the teacher, the published ones 2 to 30 thousand "
        "steps and 5000 samples. Like the published ones in latent spaces, the discriminator starts from random weights; one that was trained "
        "before was not tried. An untrained one leads astray, less so if it sees small images, learns slowly, or learns before the solver "
        "moves. The fit to the very features that the Frechet distance compares shows how little so few numbers could gain at all.",
        (),
    ),
    (
        "adversarial_galaxies",
        "Adversarial training of a network of others",
        "Does a discriminator pay, and where? The solvers for 3 and 4 evaluations of the network that draws the galaxies of HSC (galaxygrad) are "
        "trained on with one (GAS) and without (the control), on 4096 samples of the teacher, with fresh noise for every step of the "
        "discriminator, whose rate is 1e-4. The start at 3 is the fit of an earlier version (today's comes closer), at 4 that of today. It pays "
        "in fine detail, at 3 from 500 steps on with every seed, on average by a quarter and more from 1000 on, at 4 by a sixth after 750, and "
        "costs in coarse pixels. Published are 24 to 32 % for 4 evaluations, with 10 to 30 thousand steps, 5000 samples and a ten times slower "
        "discriminator (1e-5), which were not tried here. Nothing has come to its end: without a discriminator the distance still falls, too.",
        (),
    ),
    (
        "time_to_quality",
        "Time to quality",
        "Gauss-Newton and the published recipe (Adam) for 4 steps, from the published start and from ours, the best of several theory "
        "solvers. In parentheses is how many times less than the recipe's. Memory is what the fit needs beside the model and the samples.",
        (),
    ),
    (
        "solver_cost",
        "The cost of a solver",
        "Fits by default settings, with all evaluations: of the fit, of the choice of its start, and of the teacher's samples. They grow a little "
        "faster than the square of the number of steps.",
        (),
    ),
    (
        "transfer",
        "Transfer",
        "Models that sample with the solvers of others, in distance to their own teacher relative to the best of Diffusers (of the model with the LoRA, of "
        "twelve schedulers). Their own solvers are in bold. `text-to-digits` predicts another quantity and has another guidance scale, "
        "for which `from_pretrained` refuses a solver; the script hands over the numbers nevertheless. The classifier does not know the style of the LoRA. The plan of SDM is an earlier one than that in the first table.",
        (),
    ),
    (
        "exact_solution",
        "Accuracy against an exact solution",
        "The network of the pipeline is the known score of a Gaussian mixture. At 4 to 8 evaluations the errors of GS, distilled, are more than ten "
        "times smaller than those of all solvers that know nothing of the network.",
        (),
    ),
    (
        "sdm_quality",
        "SDM",
        "Distances to the exact solution of the ODE of `digits`. Calibrated plans are as close as the best of Diffusers' schedulers or closer, in "
        "the medians much closer. The second picture is that of "
        "`diffusers-gas inspect examples/solvers/digits/sdm --output plans.png`.",
        (("plans.png", "What calibration measured along two plans of the digits model"),),
    ),
    (
        "galaxies",
        "Networks of others",
        "Score networks that others have trained (galaxygrad, arXiv 2401.07313): galaxies of the surveys HSC, ZTF and LSST, and lensed quasars. "
        "Fine detail is the power of the finest detail relative to the teacher's: more than 1 is grain, less is blur. In short, how many times closer to the teacher GS and SDM are "
        "than the best of Diffusers, with the network of the next section:",
        (),
    ),
    (
        "time_series",
        "Time series",
        "A network of another kind that others have trained: CSDI (arXiv 2107.03502) fills in what was not measured of patients in intensive care "
        "whom it has never seen. The score is the continuous ranked probability score of measured values that it was not given, relative to "
        "that of the teacher's samples. It hardly differs. In the picture black values are given, red ones are not, and a band has nine tenths "
        "of 16 samples: where little is known, that of GS is as wide as the teacher's, and the others' are too narrow.",
        (),
    ),
    (
        "as_they_come",
        "As they come",
        "`SDMScheduler.from_config(pipe.scheduler.config)` and `GASScheduler.from_config(pipe.scheduler.config)`, without calibration or "
        "training: mean squared distances to the teacher in 100 steps, relative to the closest of the scheduler that the model came "
        "with and DPM-Solver++ 2M of the same config, also with trailing spacing. SDM takes the steps of DPM-Solver++ 2M at equal "
        "steps of time, and so is level with it. GAS keeps the noise of its `t_end` up to 25 steps. The teacher of flow matching is "
        "Euler's method, whose own error Euler's method in 50 steps shares, so that these models are also compared with 400 steps.",
        (),
    ),
    (
        "sigmas_alone",
        "Noise levels alone",
        "What a program loses that takes the noise levels of a learned solver and steps with a solver of its own: most of the gain.",
        (),
    ),
    (
        "published_solvers",
        "Solvers of others by name",
        "`GASScheduler.from_published` on models for which these solvers were not found: mean squared distances to the teacher, relative to "
        "the closest of Diffusers' schedulers. A table belongs to its model: 1 is no gain, and most of these are worse than that.",
        (),
    ),
    (
        "distillation_cost",
        "The cost of a distillation",
        "One iteration of Gauss-Newton for numbers of steps, samples and processes, and one gradient of the same loss. An iteration of n steps takes "
        "n (n + 1) (n + 5) / 6 evaluations for each sample, and no more memory for more steps; a gradient takes n, and memory for each.",
        (),
    ),
    (
        "real_sizes",
        "Real sizes",
        "Networks of published configs with random weights. An evaluation is one row of the network's batch, and guidance takes two. Memory is "
        "what weights and work add to a process. The last column is the share of the time that is not the network's, less than 1 %. An adversarial step "
        "has gradient checkpointing.",
        (),
    ),
    (
        "cost_projection",
        "Large models, projected",
        "The evaluations that the small models took, times the operations of the real architectures, at the speed that `real_sizes.py` measured on "
        "an accelerator, or where it says so at an assumed one.",
        (),
    ),
    (
        "step_cost",
        "Cost of a step",
        "The time of the scheduler alone, relative to DPM-Solver++ 2M. A step of a learned solver is faster up to 8 steps. Of more steps and large "
        "latents it is slower, because it adds up all outputs of the network.",
        (),
    ),
)


def page() -> str:
    """The text of RESULTS.md."""
    count = max(len(found) for result in _read("quality").values() for found in result["screened"].values())
    parts = [OPENING.format(count=count, table=shares())]
    for name, heading, text, pictures in SECTIONS:
        command = "accelerate launch training/train_gas.py" if name == "main_job" else f"python {_path(name)}.py"
        parts.append(f"## {heading}\n\n`{command}`\n\n{text}\n")
        table = (FOLDER / f"{name}.md").read_text(encoding="utf-8").strip()
        if name in SHORT_TABLES:
            parts.append(f"{SHORT_TABLES[name]()}\n")
        if len(table.splitlines()) > MOST_LINES:
            table = f"[All numbers]({_path(name)}.md)"
        parts.append(f"{table}\n")
        for picture, caption in ((f"{name}.png", heading), *pictures):
            parts.append(f"![{caption}](examples/benchmarks/{picture})\n")
    parts.append("\n".join(["## Citation\n", "```bibtex", *CITATIONS.values(), "```\n"]))
    return "\n".join(parts)


def readme(text: str) -> str:
    """The README with its numbers filled in.

    Raises:
        ValueError: If it has a place for unknown numbers.
    """

    def fill(match: re.Match) -> str:
        if match["name"] not in NUMBERS:
            raise ValueError(f"README.md has a place for {match['name']!r}, but the numbers are {sorted(NUMBERS)}.")
        return f"{match['open']}\n{NUMBERS[match['name']]()}\n<!-- end -->"

    places = re.compile(r"(?P<open><!-- numbers: (?P<name>.+?) -->)\n.*?<!-- end -->", re.DOTALL)
    return places.sub(fill, text)


def shares() -> str:
    """A table of the distances of GS and SDM relative to the best of Diffusers."""
    results = _read("quality")
    # Few models have others.
    steps = sorted({row["steps"] for row in results["digits"]["rows"][1:]})
    lines = [
        ["model", "", *(f"{n} evaluations" if n == steps[0] else str(n) for n in steps)],
        ["---"] * (2 + len(steps)),
    ]
    for name, result in results.items():
        found = {(row["method"], row["steps"]): row["distance"] for row in result["rows"]}
        for method in ("GS", "SDM"):
            ratios = {n: found[method, n] / found["best of Diffusers", n] for n in steps if (method, n) in found}
            cells = [f"{ratios[n]:.0%}" if n in ratios else "" for n in steps]
            lines.append([MODELS[name] if method == "GS" else "", f"**{method}**", *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def frechet() -> str:
    """A table of the Frechet distances of GS and GAS at the fewest evaluations, for the models that have a GAS solver."""
    lines = ["| Frechet distance | evaluations | best of Diffusers | GS | GAS | teacher |", "| --- " * 6 + "|"]
    for name, result in _read("quality").items():
        found = {(row["method"], row["steps"]): row["frechet"] for row in result["rows"]}
        for n in [steps for method, steps in found if method == "GAS"][:1]:
            ours = [found[method, n] for method in ("best of Diffusers", "GS", "GAS")]
            cells = [MODELS[name], str(n), *(f"{value:.2f}" for value in (*ours, result["rows"][0]["frechet"]))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def closer_on_networks_of_others() -> dict[str, tuple[float, float, float]]:
    """How many times closer to the teacher than the best of Diffusers at 4 evaluations: GS in mean and median, SDM in mean."""
    factors = {}
    for name, rows in (_read("galaxies") | _read("time_series")).items():
        best, gs, sdm = (
            next(row for row in rows if (row["method"], row["evaluations"]) == (method, 4))
            for method in ("best of Diffusers", "GS", "SDM, calibrated")
        )
        factors[name] = (
            best["distance"] / gs["distance"],
            best["median"] / gs["median"],
            best["distance"] / sdm["distance"],
        )
    return factors


def of_others() -> str:
    """A table of these factors."""
    lines = ["| times closer at 4 evaluations | GS, mean | GS, median | SDM, mean |", "| --- " * 4 + "|"]
    for name, factors in closer_on_networks_of_others().items():
        lines.append(f"| {name} | {' | '.join(f'{factor:.1f}' for factor in factors)} |")
    return "\n".join(lines)


def headline() -> str:
    """The evaluations at which the best of Diffusers is as close to the teacher as GS, in one sentence."""
    saved = _read("evaluations_saved")
    counts, distances = zip(*sorted((int(n), row["distance"]) for n, row in saved["Diffusers"].items()))
    shown = ("4", "6", "8", "10")
    # Distances fall with the number of evaluations, which is interpolated in their logarithm and rounded down.
    wanted = -np.log([saved["GS"][n]["distance"] for n in shown])
    equal = [str(int(n)) for n in np.interp(wanted, -np.log(distances), counts)]

    twice = max(saved["GS"][n]["frechet"] / saved["Diffusers"][str(2 * int(n))]["frechet"] for n in shown)
    return (
        f"On the small model of the picture, the learned solver at {_listed(shown)} evaluations is as close to the 50-step teacher as the best "
        f"of Diffusers' schedulers at about {_listed(equal)}. Its Frechet distance is at most {twice:.1f} times that of the best at twice as many "
        "([`evaluations_saved.py`](examples/benchmarks/evaluations_saved.py))."
    )


def gains() -> str:
    """What the methods gain at 4 evaluations, in words."""
    results = {
        name: {(row["method"], row["steps"]): row["distance"] for row in result["rows"]}
        for name, result in _read("quality").items()
    }

    def closer(method: str) -> str:
        """How many times closer to the teacher than the best of Diffusers, from the least to the most of all models."""
        times = sorted(distances["best of Diffusers", 4] / distances[method, 4] for distances in results.values())
        return f"{times[0]:.1f} to {times[-1]:.1f} times"

    of_networks = closer_on_networks_of_others()
    means, medians, sdm_means = zip(*of_networks.values())
    farther = [f"`{name}`" for name, (factor, *_) in of_networks.items() if factor < 1]
    behind_with_sdm = []
    for name, found in results.items():
        steps = [n for method, n in found if method == "SDM" and found["SDM", n] > found["best of Diffusers", n]]
        if steps:
            behind_with_sdm.append(f"`{name}` (at {', '.join(map(str, steps))})")
    exceptions = f", but for {' and '.join(behind_with_sdm)}" if behind_with_sdm else ""
    return "\n".join(
        [
            f"- **GS** at 4 evaluations is {closer('GS')} closer to the teacher's 50-step pictures (in mean squared distance) than the best "
            f"of all schedulers and spacings of Diffusers, on {len(results)} small models ([`quality.py`](examples/benchmarks/quality.py)).",
            f"- **On {len(means)} networks that others have trained**, which draw galaxies and fill in time series, GS at 4 evaluations is in the medians "
            f"{min(medians):.1f} to {max(medians):.1f} times closer than the best of Diffusers. In the means, which a few bright galaxies dominate, it is "
            f"{min(means):.1f} to {max(means):.1f} times closer (below 1 is farther: {_listed(farther)}; [each network](RESULTS.md#networks-of-others)).",
            f"- **SDM**, calibrated to the teacher (`teacher=`), is at 4 evaluations {closer('SDM')} closer on the {len(results)} small models. "
            f"With more it is closer, too{exceptions}. On the networks of others the factor is {min(sdm_means):.1f} to {max(sdm_means):.1f}.",
            f"- **GAS** pays in fine detail, on a network of others: {adversarial_gain(3)}, both from an earlier fit; {adversarial_gain(4)}, both from today's "
            "([`adversarial_galaxies.py`](examples/benchmarks/adversarial_galaxies.py), three seeds). "
            "On `text-to-emoji` our short trainings gain nothing ([what was tried](RESULTS.md#adversarial-training)).",
        ]
    )


def adversarial_gain(evaluations: int) -> str:
    """What a discriminator gains and costs, after the longest training that all seeds have."""
    _, start, *rows = _read("adversarial_galaxies")[str(evaluations)]
    most_seeds = Counter(row["trained"] for row in rows)
    trained = max(steps for steps, count in most_seeds.items() if count == max(most_seeds.values()))

    def after(method: str, kind: str) -> str:
        return (
            f"{mean(row[kind] for row in rows if row['trained'] == trained and row['method'].startswith(method)):.3g}"
        )

    return (
        f"for {evaluations} evaluations and after {trained} training steps the Frechet distance of the finest detail is {after('GAS', 'fine')}, without a "
        f"discriminator {after('without', 'fine')} (of the fit {start['fine']:.3g}), and that of coarse pixels {after('GAS', 'coarse')} against "
        f"{after('without', 'coarse')}"
    )


def cost() -> str:
    """What distilling a solver and a step with it cost."""
    steps = [row for row in _read("step_cost")["rows"] if row["scheduler"] == "GAS (learned)"]
    few = [row["relative"] for row in steps if row["steps"] <= 8]
    large = _read("cost_projection")["projections"]
    flux = next(row for row in large if row["model"].startswith("FLUX") and row["steps"] == 4)
    recipe, _ = _read("time_to_quality")["gains"]["Gauss-Newton, published start"]
    return (
        f"- **Cost.** Distilling 4 steps costs as much as sampling {flux['teacher_images']} images with the teacher, for FLUX.1-dev a "
        f"projected {60 * flux['gpu_hours']:.0f} minutes of an H100. From the same start, it comes as close as the published recipe with "
        f"{recipe['evaluations']:.0f} times fewer evaluations. Up to 8 steps, a step takes at most {max(few):.2f} times as long as one of "
        "DPM-Solver++ 2M."
    )


def transfer() -> str:
    """When a solver serves another model than its own."""
    rows = [row for row in _read("transfer") if row.get("steps") == 4]
    distances = {(row["model"], row["method"], row.get("source")): row["distance"] for row in rows}

    def relative(model: str, source: str) -> str:
        return f"{distances[model, 'GS', source] / distances[model, 'best of Diffusers', None]:.2f}"

    emoji, styled, half, _ = dict.fromkeys(row["model"] for row in rows)
    return (
        "- A LoRA that changes the pictures a little can share the model's solver. With half of a LoRA for another style the 4-step "
        f"solver of `text-to-emoji` has {relative(half, emoji)} of the distance of the best of Diffusers ({relative(emoji, emoji)} without the "
        f"LoRA), with all of it {relative(styled, emoji)}, and one distilled with the LoRA loaded {relative(styled, styled)} "
        "([`transfer.py`](examples/benchmarks/transfer.py)). A solver of another model is refused or useless."
    )


def guidance() -> str:
    """What one solver for a range of guidance scales is worth beside solvers of single scales."""
    rows = list(_read("guidance_scales").values())

    def of_range(measure: str, method: str, ours: str = "one solver of the range") -> list[float]:
        """The numbers of what serves a range relative to another method's, ascending."""
        return sorted(row[measure][ours] / row[measure][method] for row in rows)

    single, best = (of_range("distances", method) for method in ("solver of this scale", "best of Diffusers"))
    medians = of_range("medians", "solver of this scale")
    cost = mean(of_range("evaluations", "solver of this scale"))
    plan = "SDM, one plan of the range"
    single_plan, best_beside_plan = (
        of_range("distances", method, plan) for method in ("SDM, plan of this scale", "best of Diffusers")
    )
    models = [f"`{name}`" for name in dict.fromkeys(row["model"] for row in rows)]
    steps = [str(n) for n in sorted({row["steps"] for row in rows})]
    return (
        f"**Guidance scales.** One solver can serve a range of them. On {_listed(models)} with {_listed(steps)} evaluations its distance to the "
        f"teacher is {geometric_mean(single):.2f} times that of a solver fitted for the very scale (geometric mean; at worst {single[-1]:.1f}, where few samples "
        f"end elsewhere), in the medians {geometric_mean(medians):.2f} times (at worst {medians[-1]:.1f}), "
        f"and {best[0]:.2f} to {best[-1]:.2f} times that of the best of Diffusers. It costs {cost:.1f} times the evaluations of one scale. "
        f"An SDM plan calibrated with samples of the range has {geometric_mean(single_plan):.2f} times the distance of a plan for the very scale, and costs as "
        f"much ({best_beside_plan[0]:.2f} to {best_beside_plan[-1]:.2f} times the best of Diffusers; "
        "[`guidance_scales.py`](examples/benchmarks/guidance_scales.py))."
    )


def pipelines() -> str:
    """How many of Diffusers' pipeline classes work."""
    results = json.loads((ROOT / "tests" / "field" / "field_matrix.json").read_text(encoding="utf-8"))
    found = pipelines_page.numbers(results)
    return (
        f"**{found['works']} of the {found['total']} pipeline classes of Diffusers {results['versions']['diffusers']}** sample with "
        f"both schedulers as with Diffusers' own, and {found['refused']} are refused with a reason "
        "([`field_matrix.py`](tests/field/field_matrix.py))."
    )


# Tables that are shown beside those of the benchmarks.
SHORT_TABLES: dict[str, Callable[[], str]] = {"quality": frechet, "galaxies": of_others}

NUMBERS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "gains": gains,
    "cost": cost,
    "transfer": transfer,
    "guidance": guidance,
    "pipelines": pipelines,
}


def refresh() -> None:
    """Writes RESULTS.md and the README's numbers."""
    readme_path = ROOT / "README.md"
    filled = readme(readme_path.read_text(encoding="utf-8"))
    (ROOT / "RESULTS.md").write_text(page(), encoding="utf-8")
    readme_path.write_text(filled, encoding="utf-8")


def _path(name: str) -> str:
    return f"examples/benchmarks/{name}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    refresh()
