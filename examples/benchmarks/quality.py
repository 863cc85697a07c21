"""Quality for numbers of network evaluations on every shipped model: Diffusers' schedulers, SDM, GS and GAS.

    python examples/benchmarks/quality.py
    python examples/benchmarks/quality.py --models digits

First the solvers are distilled and calibrated (fits.py), which takes about an hour and a half on a CPU core. Then every scheduler of
Diffusers that solves the same ODE samples the first `NUM_SCREENED` noises with each of its spacing options. The best of them and
ours are evaluated on more samples, which no fit has used. The measures are the mean squared and the mean absolute distance of final
states to the teacher's, the power of the finest detail relative to the teacher's, the Frechet distance to the teacher's images from
other seeds, in the features of the model's own or the digits classifier, and where the model's own classifier knows the prompts, the
share of samples that it calls as their prompts do. Errors are standard errors over samples. A second fit to other samples shows how much a result depends on them. Fits and measurements are
kept in `.fits/` and `.measurements/`, so that an interrupted run can be resumed. The results are quality.json, .md, .png and
quality-{model}.png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT. Those of models that were not measured stay
as they are. The solvers are copied to examples/solvers.
"""

import argparse
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from fits import FITS, cost, repeats, ship, solvers
from report import (
    FOLDER,
    Teacher,
    figure,
    load_teacher,
    markdown_table,
    output_folder,
    output_path,
    read,
    write,
)
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler
from diffusers_gas.comparison import training_free_schedulers, without_solver_options
from diffusers_gas.papers.evaluation.feature_extractors import SmallClassifier, load_feature_extractor
from diffusers_gas.papers.evaluation.frechet import Gaussian, frechet_distance
from diffusers_gas.papers.evaluation.measurement import Measurement, Sampler
from diffusers_gas.pipelines.inputs import EVALUATION_SEED, SampleInputs
from diffusers_gas.pipelines.sampling import sample_images
from diffusers_gas.pipelines.teacher import make_scheduler
from diffusers_gas.presentation.figures import comparison_picture
from diffusers_gas.schedulers.configs import translate_config
from diffusers_gas.utils.diffusers_hooks import AysSchedules


NUM_SCREENED = 64
BATCH_SIZE = 64
# First seeds of the evaluation and of the teacher's reference images. Gauss-Newton picks its best iteration by lower seeds.
JUDGED_SEED, REFERENCE_SEED = 2 * EVALUATION_SEED, 3 * EVALUATION_SEED
PICTURED_STEPS, NUM_PICTURED = 4, 10
# The model of the first page, and prompts that show more than its first ones.
PAGE_MODEL = "text-to-emoji"
PICTURED_PROMPTS = {
    PAGE_MODEL: (
        *(
            "red apple",
            "thinking face",
            "police car",
            "panda face",
            "hamburger",
            "rocket",
            "cat face with tears of joy",
        ),
        *("butterfly", "sailboat", "clown face"),
    )
}

BEST, KARRAS, ALIGNED = "best of Diffusers", "best with Karras sigmas", "Align Your Steps"
STYLES = {
    BEST: {"color": "black"},
    KARRAS: {"color": "grey", "linestyle": "--"},
    ALIGNED: {"color": "grey", "linestyle": ":"},
    "SDM": {"color": "C2"},
    "GS": {"color": "C0"},
    "GAS": {"color": "C3"},
}


@dataclass(frozen=True)
class Row:
    """The measures of a method for a number of network evaluations.

    Attributes:
        steps: Network evaluations.
        method: Name of our method, or the reason why a scheduler of Diffusers was chosen.
        scheduler: Name of the scheduler.
        distance, distance_error: Mean squared distance to the teacher.
        median: Median of the samples' distances. A few samples that end at another digit can dominate the mean.
        frechet, frechet_error: Frechet distance to the teacher's images from other seeds.
        named: Share of the samples that the model's own classifier calls as their prompts do, where it knows the prompts.
        absolute: Mean absolute distance to the teacher.
        detail: The power of the images' finest detail relative to the teacher's: more than 1 is grain, less is blur.
    """

    steps: int
    method: str
    scheduler: str
    distance: float
    distance_error: float
    median: float
    frechet: float
    frechet_error: float
    named: float | None = None
    absolute: float | None = None
    detail: float | None = None


class SampleJudge:
    """Measures samplers of a model on the same samples. Earlier measurements are read from files.

    Args:
        teacher: The model.
        pipeline_name: What distinguishes the measurements of its weights from those of others in the same folder; by default
            the name of the model.
    """

    def __init__(self, teacher: Teacher, pipeline_name: str | None = None):
        self.teacher = teacher
        classified = teacher.name if (teacher.path / "classifier").exists() else "digits"
        classifier = teacher.path.parent / classified / "classifier"
        self.classifier = SmallClassifier.from_pretrained(classifier)
        names = classifier / "names.txt"
        self.names = names.read_text(encoding="utf-8").splitlines() if names.exists() else []
        self.many_steps = Sampler("teacher", teacher.scheduler, teacher.num_inference_steps)
        self._pipeline_name = pipeline_name or teacher.name
        extractor = load_feature_extractor(classifier)
        self._measures = {"extractor": classified, "features": extractor, "teacher": self.many_steps}
        self.measurement = self.measurement_from(JUDGED_SEED)

    def measurement_from(self, first_seed: int) -> Measurement:
        """The measurement of as many samples as the model's fits are judged by."""
        inputs = self.teacher.inputs(first_seed, FITS[self.teacher.name].num_judged)
        folder = output_folder() / ".measurements" / self.teacher.name
        return Measurement(folder, self.teacher.pipe, self._pipeline_name, inputs, BATCH_SIZE, **self._measures)

    def measure(self, sampler: Sampler, num_samples: int | None = None) -> list[dict[str, Tensor]]:
        """The results of the shards: of all, or of the first samples, a few only or whole shards."""
        shards = self.measurement.shards
        if num_samples is not None:
            shards = shards[: math.ceil(num_samples / len(shards[0]))]
            if num_samples < len(shards[0]):
                shards = [shards[0][:num_samples]]
        return [self.measurement.measure(sampler, shard) for shard in shards]

    def screen(self, sampler: Sampler, num_samples: int = NUM_SCREENED) -> float:
        """The distance on the first samples. It is infinite if any diverged."""
        measured = self.measure(sampler, num_samples)
        if any(shard["diverged"].any() for shard in measured):
            return math.inf
        return torch.cat([shard["distance"] for shard in measured]).mean().item()

    @torch.no_grad()
    def named(self, sampler: Sampler) -> float | None:
        """The share of the samples that the classifier calls as their prompts do, if it knows the prompts."""
        if not self.names:
            return None
        features = torch.cat([shard["features"] for shard in self.measure(sampler)])
        found = self.classifier.logits(features).argmax(1).tolist()
        asked = [sample["prompt"] for sample in self.measurement.inputs.per_sample]
        return sum(self.names[i] == prompt for i, prompt in zip(found, asked, strict=True)) / len(asked)


class Judge(SampleJudge):
    """Also compares the images with the teacher's from other seeds."""

    def __init__(self, teacher: Teacher):
        super().__init__(teacher)
        reference = self.measurement_from(REFERENCE_SEED)
        self.reference = [reference.measure(self.many_steps, shard)["features"] for shard in reference.shards]

    def judge(self, sampler: Sampler, method: str, steps: int) -> Row:
        measured = self.measure(sampler)
        features = [shard["features"] for shard in measured]
        zeros = [torch.zeros(len(shard["diverged"]), dtype=torch.float64) for shard in measured]
        distance = torch.cat([shard.get("distance", zero) for shard, zero in zip(measured, zeros)])
        frechet, frechet_error = jackknife(features, self.reference)
        mean, median = distance.mean().item(), distance.median().item()
        error, named = standard_error(distance), self.named(sampler)
        absolute = torch.cat([shard.get("absolute", zero) for shard, zero in zip(measured, zeros)]).mean().item()
        pairs = zip(measured, self.measure(self.many_steps), strict=True)
        detail = torch.cat([ours["detail"] - teacher["detail"] for ours, teacher in pairs]).mean().exp().item()
        return Row(steps, method, sampler.name, mean, error, median, frechet, frechet_error, named, absolute, detail)


def standard_error(values: Tensor) -> float:
    return values.std().item() / math.sqrt(len(values))


def jackknife(parts: Sequence[Tensor], reference: Sequence[Tensor]) -> tuple[float, float]:
    """The Frechet distance of the features of all parts together, and its standard error by the jackknife.

    A part and that of the reference with the same prompts are left out together. The error of a single part is nan.
    """
    distance = frechet_of_parts(parts, reference)
    pairs = list(zip(parts, reference, strict=True))
    if len(pairs) == 1:
        return distance, math.nan
    without = np.array([frechet_of_parts(*zip(*(pairs[:i] + pairs[i + 1 :]))) for i in range(len(pairs))])
    return distance, math.sqrt((len(pairs) - 1) * without.var())


def frechet_of_parts(parts: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    return frechet_distance(*(Gaussian.of_features(torch.cat(list(features))) for features in (parts, reference)))


class AlignYourStepsScheduler(diffusers.DPMSolverMultistepScheduler):
    """DPM-Solver++ on the noise levels that Align Your Steps (arXiv 2404.14507) publishes for Stable Diffusion.

    As in the paper, other numbers of steps are interpolated linearly in log(sigma). The first level is always the noisiest
    level that the network was trained on.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        # Diffusers replaces the paper's last level, 0.029, by 0. Its logarithm is needed for the interpolation.
        levels = np.log([*AysSchedules["StableDiffusionSigmas"][:-1], 0.029])
        positions = np.linspace(0, len(levels) - 1, num_inference_steps + 1)[1:-1]
        wanted = np.interp(positions, range(len(levels)), levels)
        log_sigmas = np.log(((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy())
        timesteps = np.interp(wanted, log_sigmas, range(len(log_sigmas))).round()
        super().set_timesteps(timesteps=[self.config.num_train_timesteps - 1, *timesteps], device=device)


def rivals(pipe: DiffusionPipeline, evaluations: int) -> list[Sampler]:
    """Every deterministic scheduler of Diffusers for the same ODE, with each of its spacing options.

    Schedulers that take two evaluations per step and one for the last step have one evaluation less. `DDPMPipeline` does not
    scale the inputs of the network, so schedulers with scaled states do not fit it.
    """
    config = pipe.scheduler.config
    samplers = [Sampler(name, s, evaluations) for name, s in training_free_schedulers(config).items()]
    half = (evaluations + 1) // 2
    if translate_config(config).get("use_flow_sigmas"):
        heun = diffusers.FlowMatchHeunDiscreteScheduler.from_config(config)
        return [*samplers, Sampler(f"Heun, {2 * half - 1} evaluations", heun, half)]
    aligned = make_scheduler(AlignYourStepsScheduler, without_solver_options(config), solver_order=2)
    samplers.append(Sampler("DPM-Solver++ 2M, align your steps", aligned, evaluations))
    spacings = [{"timestep_spacing": name} for name in ("linspace", "leading", "trailing")]
    spacings += [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}]
    # Its spacing is that of linspace.
    single, whole = [spacings[0], *spacings[3:]], {"lower_order_final": True}
    families: list[tuple[str, type[SchedulerMixin], dict[str, Any], list[dict[str, Any]], int]] = [
        ("Euler", diffusers.EulerDiscreteScheduler, {}, spacings, evaluations),
        ("LMS", diffusers.LMSDiscreteScheduler, {}, spacings, evaluations),
        (f"Heun, {2 * half - 1} evaluations", diffusers.HeunDiscreteScheduler, {}, spacings, half),
        (f"DPM2, {2 * half - 1} evaluations", diffusers.KDPM2DiscreteScheduler, {}, spacings, half),
        # Its second step repeats the first one.
        ("PNDM", diffusers.PNDMScheduler, {"skip_prk_steps": True}, spacings[:3], evaluations - 1),
        ("DPM-Solver++ 2S", diffusers.DPMSolverSinglestepScheduler, {"solver_order": 2, **whole}, single, evaluations),
        ("DPM-Solver++ 3S", diffusers.DPMSolverSinglestepScheduler, {"solver_order": 3, **whole}, single, evaluations),
    ]
    if isinstance(pipe, diffusers.DDPMPipeline):
        families = [family for family in families if family[0].startswith(("PNDM", "DPM-Solver++"))]
    for family, scheduler_class, settings, options, num_steps in families:
        for option in options:
            ((key, value),) = option.items()
            spacing = value if key == "timestep_spacing" else key.removeprefix("use_").replace("_", " ")
            scheduler = scheduler_class.from_config(without_solver_options(config), **settings, **option)
            samplers.append(Sampler(f"{family}, {spacing}", scheduler, num_steps))
    return samplers


def measure(name: str) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Measures everything on one model, and draws its pictures."""
    fit, teacher = FITS[name], load_teacher(name)
    ours, judge = solvers(name), Judge(teacher)
    rows = [judge.judge(judge.many_steps, "teacher", judge.many_steps.num_inference_steps)]
    screened: dict[int, dict[str, float]] = {}
    chosen: dict[int, dict[str, Sampler]] = {}
    for n in fit.steps:
        candidates = {sampler.name: sampler for sampler in rivals(teacher.pipe, n)}
        bar = tqdm(candidates.items(), desc=f"{name}, {n} evaluations, Diffusers", unit="scheduler")
        screened[n] = {label: judge.screen(sampler) for label, sampler in bar}
        chosen[n] = {method: candidates[label] for method, label in best_of(screened[n]).items()}
        chosen[n] |= {method: Sampler(method, s, n) for method, s in ours.items() if n in step_counts(s)}
    for n, samplers in chosen.items():
        for method, sampler in tqdm(samplers.items(), desc=f"{name}, {n} evaluations, judged", unit="scheduler"):
            rows.append(judge.judge(sampler, method, n))
    fewest = min(fit.steps)
    fitted = [judge.judge(Sampler(f"GS, fit {i}", s, fewest), "GS", fewest) for i, s in enumerate(repeats(name), 1)]
    images = sample_pictures(teacher, chosen[PICTURED_STEPS])
    results = {
        "num_samples": {"screened": NUM_SCREENED, "judged": fit.num_judged},
        "rows": [asdict(row) for row in rows],
        "screened": screened,
        "fits": {n: cost(solver) for n, solver in ours["GS"].solvers.items()},
        "repeated": {"steps": fewest, "distances": [row.distance for row in fitted]},
    }
    return results, images


def step_counts(scheduler: SchedulerMixin) -> Iterable[int]:
    return scheduler.solvers if isinstance(scheduler, GASScheduler) else scheduler.plans


def best_of(distances: Mapping[str, float]) -> dict[str, str]:
    """The schedulers that are evaluated on all samples, by the reason for their choice."""
    kinds: dict[str, Callable[[str], bool]] = {
        BEST: lambda label: True,
        KARRAS: lambda label: "karras" in label,
        ALIGNED: lambda label: "align" in label,
    }
    found = {}
    for kind, fits in kinds.items():
        labels = [label for label in distances if fits(label)]
        if labels:
            found[kind] = min(labels, key=distances.__getitem__)
    return found


def table(results: dict[str, Any]) -> str:
    header = [
        "evaluations",
        "method",
        "distance to the teacher",
        "relative to the best of Diffusers",
        "median",
        "absolute error",
        "detail",
        "Frechet distance",
    ]
    is_named = results["rows"][0].get("named") is not None
    if is_named:
        header.append("named as the prompt")
    lines, best = [], {row["steps"]: row["distance"] for row in results["rows"] if row["method"] == BEST}
    for row in results["rows"]:
        method = f"{row['method']} ({row['scheduler']})" if row["method"] in (BEST, KARRAS) else row["method"]
        relative = f"{row['distance'] / best[row['steps']]:.2f}" if row["steps"] in best else ""
        distance = f"{row['distance']:.5f} ± {row['distance_error']:.5f}" if relative else ""
        median = f"{row['median']:.5f}" if relative else ""
        is_known = relative and row.get("absolute") is not None  # older results do without
        absolute, detail = (f"{row['absolute']:.4f}", f"{row['detail']:.2f}") if is_known else ("", "")
        frechet = f"{row['frechet']:.2f} ± {row['frechet_error']:.2f}"
        named = [f"{row['named']:.1%}"] if is_named else []
        lines.append([str(row["steps"]), method, distance, relative, median, absolute, detail, frechet, *named])
    return markdown_table(header, lines)


def screening_table(screened: Mapping[int, Mapping[str, float]]) -> str:
    """The best scheduler of each family, with its spacing."""
    families = list(dict.fromkeys(label.split(",")[0] for label in next(iter(screened.values()))))

    def closest(distances: Mapping[str, float], family: str) -> tuple[float, str]:
        return min((d, label) for label, d in distances.items() if label.split(",")[0] == family)

    cells = [[closest(distances, family) for distances in screened.values()] for family in families]
    rows = [
        [family, *(f"{distance:.4f} ({label.rsplit(', ')[-1] if ',' in label else 'own'})" for distance, label in row)]
        for family, row in zip(families, cells)
    ]
    return markdown_table(["family", *(f"{n} evaluations" for n in screened)], rows)


def section(name: str, results: dict[str, Any]) -> str:
    samples = results["num_samples"]
    heading = f"**{name}**: evaluated on {samples['judged']} samples that no fit has used."
    distances = results["repeated"]["distances"]
    repeated = (
        ""
        if len(distances) < 2
        else (
            f"{len(distances)} fits of GS at {results['repeated']['steps']} evaluations and the usual guidance scale, each to other samples, have the distances "
            f"{', '.join(f'{distance:.5f}' for distance in distances)}."
        )
    )
    screening = f"The best scheduler of each family of Diffusers on {samples['screened']} samples:"
    parts = [heading, table(results), repeated, screening, screening_table(results["screened"])]
    return "\n\n".join(filter(None, parts))


def sample_pictures(teacher: Teacher, chosen: Mapping[str, Sampler]) -> dict[str, list[np.ndarray]]:
    """Draws samples of the teacher, the best of Diffusers, and ours from the same noise."""
    inputs = teacher.inputs(JUDGED_SEED, NUM_PICTURED)
    if teacher.name in PICTURED_PROMPTS:
        cycle = [{"prompt": prompt} for prompt in PICTURED_PROMPTS[teacher.name]]
        inputs = SampleInputs.create(JUDGED_SEED, NUM_PICTURED, cycle, **inputs.common)
    samplers = {"teacher": Sampler("teacher", teacher.scheduler, teacher.num_inference_steps)}
    samplers |= {method: chosen[method] for method in (BEST, "GS", "GAS") if method in chosen}
    images = {}
    for method, sampler in samplers.items():
        of_diffusers = f" ({sampler.name})" if method == BEST else ""
        label = f"{method}, {sampler.num_inference_steps} evaluations{of_diffusers}"
        images[label] = sample_images(teacher.pipe, sampler.scheduler, sampler.num_inference_steps, inputs)
    titles = [str(sample.get("prompt", "")) for sample in inputs.per_sample]
    comparison_picture(images, output_path(__file__, f"-{teacher.name}.png"), titles)
    return images


def draw_first_page(images: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Draws samples of one model with their prompts above."""
    page, axes = figure(len(images), NUM_PICTURED, (11, 1.02 * len(images) + 0.5))
    page.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    for axis, prompt in zip(axes[0], PICTURED_PROMPTS[PAGE_MODEL]):
        axis.set_title("\n".join(textwrap.wrap(prompt, 14)), fontsize=8)
    for row, (label, pictures) in zip(axes, images.items()):
        for axis, picture in zip(row, pictures):
            axis.imshow(np.clip(picture, 0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        # "DDIM, linspace" in parentheses has a comma, too.
        lines = label.replace(", ", "\n", 1).replace(" (", "\n(")
        row[0].set_ylabel(lines, rotation=0, ha="right", va="center", fontsize=9)
    page.savefig(output_path(__file__, "-first_page.png"), dpi=120)


def draw_gains(results: Mapping[str, dict[str, Any]]) -> None:
    """Draws the distances of GS relative to the best of Diffusers for all models."""
    page, axes = figure(size=(5.5, 3.4))
    plot = axes[0, 0]
    for name, result in results.items():
        distances = {(row["method"], row["steps"]): row["distance"] for row in result["rows"]}
        steps = sorted(n for method, n in distances if method == BEST)
        plot.plot(steps, [distances["GS", n] / distances[BEST, n] for n in steps], marker="o", label=name)
    plot.axhline(1, color="black", linewidth=1)
    plot.text(4, 0.94, BEST, fontsize=8, va="top")
    plot.set(
        yscale="log", xticks=sorted({n for name in results for n in FITS[name].steps}), xlabel="network evaluations"
    )
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
    plot.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    plot.minorticks_off()
    plot.set_title("GS: distance to the teacher, relative to the best of Diffusers", fontsize=9)
    plot.grid(alpha=0.3, which="both")
    plot.legend(fontsize=7)
    page.savefig(output_path(__file__, "-gains.png"), dpi=120)


def draw(results: Mapping[str, dict[str, Any]]) -> Any:
    plot, axes = figure(2, len(results), (3.4 * len(results) + 1, 6))
    for column, (name, result) in zip(axes.T, results.items()):
        draw_model(column[0], result["rows"], "distance", name)
        draw_model(column[1], result["rows"], "frechet", name)
        column[1].axhline(result["rows"][0]["frechet"], color="grey", linewidth=0.8, label="teacher")
    axes[0][0].set_ylabel("squared distance to the teacher")
    axes[1][0].set_ylabel("Frechet distance to the teacher")
    lines = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels())}
    plot.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=8)
    return plot


def draw_model(axis: Any, rows: Sequence[dict[str, Any]], quantity: str, title: str) -> None:
    for method in dict.fromkeys(row["method"] for row in rows[1:]):
        of_method = [row for row in rows if row["method"] == method]
        steps, values, errors = ([row[key] for row in of_method] for key in ("steps", quantity, f"{quantity}_error"))
        style = STYLES.get(method, {})
        axis.errorbar(steps, values, errors, marker="o", markersize=4, capsize=2, label=method, **style)
    axis.set(
        yscale="log", xticks=sorted({row["steps"] for row in rows[1:]}), xlabel="network evaluations", title=title
    )
    axis.grid(alpha=0.3, which="both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(FITS), default=list(FITS))
    measured, images = {}, {}
    for name in parser.parse_args().models:
        measured[name], images[name] = measure(name)
    others = {} if len(measured) == len(FITS) else read("quality")
    results = {name: measured.get(name) or others[name] for name in FITS if name in measured or name in others}
    text = "\n\n".join(section(name, result) for name, result in results.items())
    write(__file__, results, text, draw(results))
    draw_gains(results)
    if PAGE_MODEL in images:
        draw_first_page(images[PAGE_MODEL])
    if output_folder() == FOLDER:
        for name in measured:
            ship(name)


if __name__ == "__main__":
    main()
