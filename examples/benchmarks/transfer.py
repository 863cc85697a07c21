"""Whether the solver of one model serves another: a near one, which differs by a LoRA, and a far one.

    python examples/benchmarks/transfer.py
    python examples/benchmarks/transfer.py --steps 4 --models text-to-digits

The models are `text-to-emoji`, the same with the LoRA in its folder at full and at half strength, and `text-to-digits`, whose network
has the same noise levels but predicts something else at another guidance scale. Each of them samples with the solvers that were
distilled and calibrated for itself and for the others. The distances are the mean squared ones to the model's own teacher of 50
steps, on samples that no fit has used, relative to the best of Diffusers on this model, which quality.py has found. With a LoRA it is
the best of those that are good without it. Errors are standard errors over samples. The classifier of the emoji judges the samples
of emoji, too. The solvers of GS are made by fits.py and, with the LoRA, by `diffusers_gas.distill`; that of SDM is the one in
examples/solvers. Fits and measurements are kept, so that an interrupted run can be resumed. The results are transfer.json, .md and
.png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from diffusers import DiffusionPipeline
from fits import REPEAT_SEEDS, SHIPPED, folder, gauss_newton
from quality import BATCH_SIZE, BEST, SampleJudge, rivals, standard_error
from report import Teacher, figure, load_teacher, markdown_table, output_folder, read, write
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, SDMScheduler, distill
from diffusers_gas.papers.evaluation.measurement import Sampler
from diffusers_gas.pipelines.driving import scheduler_config
from diffusers_gas.pipelines.teacher import fingerprint_of_pipeline


STEP_COUNTS = (4,)
NUM_TRAINING = 1024  # at most; a fit takes as many as it needs
# Schedulers of Diffusers are tried with a LoRA if their distance without it was at most so many times the best one's.
GOOD = 2.0


@dataclass(frozen=True)
class Model:
    """A shipped model, as it is or with the LoRA in its folder.

    Attributes:
        name: Its name in the table.
        teacher: Name of its folder in `examples/teachers`.
        num_fits: Fits of GS for it, each to other samples. None is made for a model that only uses the others' solvers.
        lora_scale: Strength of the LoRA.
    """

    name: str
    teacher: str
    num_fits: int = 0
    lora_scale: float | None = None

    def load(self) -> Teacher:
        teacher = load_teacher(self.teacher)
        if self.lora_scale is not None:
            teacher.pipe.load_lora_weights(teacher.path / "lora")
            teacher.pipe.fuse_lora(lora_scale=self.lora_scale)  # samples the same in less time
        return teacher


EMOJI = Model("text-to-emoji", "text-to-emoji", num_fits=1)
STYLED = Model("text-to-emoji with the LoRA", "text-to-emoji", num_fits=1, lora_scale=1.0)
HALF = Model("with half of the LoRA", "text-to-emoji", lora_scale=0.5)
DIGITS = Model("text-to-digits", "text-to-digits", num_fits=1)
MODELS = {model.name: model for model in (EMOJI, STYLED, HALF, DIGITS)}
CALIBRATED = EMOJI


class Judge(SampleJudge):
    """Measures samplers of a model, with its LoRA if it has one."""

    def __init__(self, model: Model):
        teacher = model.load()
        name = None if model.lora_scale is None else f"{model.name} {fingerprint_of_pipeline(teacher.pipe)}"
        super().__init__(teacher, name)

    def judge(self, samplers: Sequence[Sampler]) -> tuple[dict[str, Any], Tensor]:
        """Measures of one solver or of repeated fits together, and the distances of the samples, averaged over fits."""
        each = torch.stack([torch.cat([shard["distance"] for shard in self.measure(one)]) for one in samplers])
        named = [self.named(sampler) for sampler in samplers]
        distances = each.mean(0)
        row = {
            "distance": distances.mean().item(),
            "distance_error": standard_error(distances),
            "median": distances.median().item(),
            "fits": each.mean(1).tolist(),
            "named": None if None in named else mean(named),
        }
        return row, distances


def distilled(model: Model, num_inference_steps: int, repeat: int) -> GASScheduler:
    """A fit of GS by default settings. A missing one is made."""
    n = num_inference_steps
    if model.lora_scale is None:
        return GASScheduler.from_pretrained(gauss_newton(model.teacher, [n], repeat) / "scheduler")
    path = folder(f"{model.teacher}-lora-{model.lora_scale:g}", f"gs-{n}-{repeat}") / "scheduler"
    if not path.exists():
        # The training scripts cannot load a LoRA.
        teacher = model.load()
        inputs = teacher.inputs(repeat * REPEAT_SEEDS, NUM_TRAINING)
        cache = output_folder() / ".teacher_samples"
        scheduler = distill(
            teacher.pipe, n, inputs=inputs, teacher=teacher.scheduler, batch_size=BATCH_SIZE, cache_dir=cache
        )
        scheduler.save_pretrained(path)
    return GASScheduler.from_pretrained(path)


def for_pipeline(scheduler: GASScheduler | SDMScheduler, pipe: DiffusionPipeline) -> GASScheduler | SDMScheduler:
    """The learned numbers of a scheduler, with the settings of another pipeline's network.

    A saved scheduler has the settings of the network that it was made for. If that predicts something else, they would be wrong here.
    The learned numbers apply to data predictions, whatever a network predicts.
    """
    found = type(scheduler).from_config(scheduler_config(pipe))
    if isinstance(scheduler, SDMScheduler):
        for plan in scheduler.plans.values():
            found.add_plan(plan)
    else:
        for solver in scheduler.solvers.values():
            found.add_solver(solver)
    return found


def solvers(num_inference_steps: int) -> dict[tuple[str, str], list[GASScheduler | SDMScheduler]]:
    """The schedulers of all models, by method and model: one for each fit."""
    n = num_inference_steps
    found: dict[tuple[str, str], list[GASScheduler | SDMScheduler]] = {}
    for model in MODELS.values():
        if model.num_fits:
            found["GS", model.name] = [distilled(model, n, repeat) for repeat in range(model.num_fits)]
    calibrated = SDMScheduler.from_pretrained(SHIPPED / CALIBRATED.teacher / "sdm")
    if n in calibrated.plans:
        found["SDM", CALIBRATED.name] = [calibrated]
    return found


def good_rivals(model: Model, pipe: DiffusionPipeline, num_inference_steps: int) -> list[Sampler]:
    """The best of Diffusers by the results of quality.py, or with a LoRA all that were good without it."""
    distances = read("quality")[model.teacher]["screened"][str(num_inference_steps)]
    limit = min(distances.values()) * (1 if model.lora_scale is None else GOOD)
    found = [sampler for sampler in rivals(pipe, num_inference_steps) if distances[sampler.name] <= limit]
    return found[:1] if model.lora_scale is None else found


def measure(model: Model, step_counts: Iterable[int]) -> list[dict[str, Any]]:
    """The measures of all solvers on one model."""
    judge = Judge(model)
    pipe = judge.teacher.pipe
    rows: list[dict[str, Any]] = [{"model": model.name, "method": "teacher", "named": judge.named(judge.many_steps)}]
    for n in step_counts:
        candidates = good_rivals(model, pipe, n)
        bar = tqdm(candidates, desc=f"{model.name}, {n} evaluations, Diffusers", unit="scheduler")
        best = min(bar, key=judge.screen)
        row, _ = judge.judge([best])
        rows.append({"model": model.name, "steps": n, "method": BEST, "scheduler": best.name, **row})
        found = {}
        for (method, source), schedulers in tqdm(solvers(n).items(), desc=f"{model.name}, {n} evaluations, ours"):
            name = f"{method} from {source}"
            samplers = [Sampler(name, for_pipeline(scheduler, pipe), n) for scheduler in schedulers]
            row, found[method, source] = judge.judge(samplers)
            rows.append({"model": model.name, "steps": n, "method": method, "source": source, **row})
        for row in rows:
            own = found.get((row["method"], model.name))
            if row.get("steps") == n and own is not None:
                # The same samples, so that the difference is known better than either distance.
                difference = found[row["method"], row["source"]] - own
                row["more_than_own"] = difference.mean().item()
                row["more_than_own_error"] = standard_error(difference)
    return rows


def label(row: dict[str, Any]) -> str:
    return row["method"] if row["method"] in (BEST, "teacher") else f"{row['method']} of {row['source']}"


def table(rows: list[dict[str, Any]]) -> str:
    """For each number of evaluations the relative distances, and the shares that the classifier names."""
    parts = []
    models = list(dict.fromkeys(row["model"] for row in rows))
    for n in dict.fromkeys(row["steps"] for row in rows if "steps" in row):
        cells = {(label(row), row["model"]): row for row in rows if row.get("steps", n) == n}
        labels = list(dict.fromkeys(name for name, _ in cells))
        best = {model: cells[BEST, model]["distance"] for model in models}

        def distance(name: str, model: str, cells: dict = cells, best: dict = best) -> str:
            row = cells.get((name, model))
            if row is None or name == "teacher":
                return ""
            if name == BEST:
                return f"1 ({row['scheduler']}: {row['distance']:.4f})"
            text = f"{row['distance'] / best[model]:.3f} ± {row['distance_error'] / best[model]:.3f}"
            return f"**{text}**" if row["source"] == model else text

        def named(name: str, model: str, cells: dict = cells) -> str:
            share = cells[name, model]["named"] if (name, model) in cells else None
            return "" if share is None else f"{share:.1%}"

        judged = [model for model in models if any(named(name, model) for name in labels)]
        parts.append(
            markdown_table(
                [f"solver, {n} evaluations", *models],
                [[name, *(distance(name, model) for model in models)] for name in labels if name != "teacher"],
            )
        )
        if judged:
            header = [f"named right, {n} evaluations", *judged]
            parts.append(
                markdown_table(header, [[name, *(named(name, model) for model in judged)] for name in labels])
            )
    return "\n\n".join(parts)


def draw(rows: list[dict[str, Any]]) -> Any:
    models = list(dict.fromkeys(row["model"] for row in rows))
    step_counts = list(dict.fromkeys(row["steps"] for row in rows if "steps" in row))
    picture, axes = figure(
        len(step_counts), len(models), (3.2 * len(models) + 2, 2.6 * len(step_counts)), sharex=True, sharey=True
    )
    labels = list(dict.fromkeys(label(row) for row in rows if "source" in row))
    for line, n in zip(axes, step_counts):
        for axis, model in zip(line, models):
            of_model = {label(row): row for row in rows if row["model"] == model and row.get("steps") == n}
            best = of_model[BEST]["distance"]
            for height, name in enumerate(labels):
                row = of_model[name]
                value, error = row["distance"] / best, row["distance_error"] / best
                colour = "C0" if row["source"] == model else "grey"
                axis.errorbar(value, height, xerr=error, fmt="o", color=colour, capsize=3)
            axis.axvline(1, color="black", linewidth=1)
            axis.set(xscale="log", title=f"{model},\n{n} evaluations", yticks=range(len(labels)), yticklabels=labels)
            axis.set_xticks((0.1, 0.3, 1, 3, 10), ("0.1", "0.3", "1", "3", "10"))
            axis.minorticks_off()
            axis.title.set_fontsize(9)
            axis.grid(alpha=0.3, axis="x")
        line[0].invert_yaxis()
    picture.supxlabel(
        "squared distance to the teacher, relative to the best of Diffusers; blue: the model's own solver", fontsize=9
    )
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=int, nargs="+", default=STEP_COUNTS)
    args = parser.parse_args()
    rows = [row for name in args.models for row in measure(MODELS[name], sorted(args.steps))]
    write(__file__, rows, table(rows), draw(rows))


if __name__ == "__main__":
    main()
