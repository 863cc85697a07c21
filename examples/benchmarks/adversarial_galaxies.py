"""Whether adversarial training pays: a curve over its steps, for a network that others have trained.

    python examples/benchmarks/adversarial_galaxies.py
    python examples/benchmarks/adversarial_galaxies.py --steps 4 --rates 1e-4 1e-5 --num_seeds 1

The network is that of galaxies.py for the survey HSC. The start is the finished fit by Gauss-Newton, to the squared and the absolute
error. From there the solver is trained on with a discriminator (GAS, with fresh noise for every step of the discriminator, as published)
and without one (the control), on the same samples, for as many steps, with seeds of their own for the order of samples and the
discriminator. Every `JUDGED_EVERY` steps the averaged solver samples noises that no training has used. The Frechet distance of these
samples to samples of the teacher from other noises is measured in two kinds of features, relative to the standard deviation that a
feature has over the teacher's samples: the logarithmic power of the finest detail in squares of the image, and the image in coarse
pixels, after the logarithmic stretch of astronomers. The teacher's own distance, of samples from noises of their own, says what is left
of it for any solver. Trainings and measurements are kept in `.adversarial_galaxies/`, so that an interrupted run goes on. The results are
adversarial_galaxies.json, .md and .png beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT.
"""

import argparse
import json
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from galaxies import subject
from of_others import FIRST_SEED
from report import figure, markdown_table, output_folder, write
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, GeneralizedSolver, SampleInputs
from diffusers_gas.distillation.adversarial import AdversarialRecipe, Adversary
from diffusers_gas.distillation.discriminator import R3GANDiscriminator
from diffusers_gas.distillation.gradient_descent import GradientDescent, Recipe
from diffusers_gas.least_squares import Loss
from diffusers_gas.papers.evaluation.frechet import Gaussian, frechet_distance
from diffusers_gas.pipelines.driving import scheduler_config
from diffusers_gas.pipelines.inputs import EVALUATION_SEED
from diffusers_gas.pipelines.teacher import TeacherSamples
from diffusers_gas.utils.files import load_state, save_state


NETWORK = "HSC 32"
NUM_TRAINING, NUM_JUDGED, JUDGED_EVERY = 4096, 2048, 250
# Seeds of the teacher's training samples and of those that it is compared with. The judged noises are those of galaxies.py.
TRAINING_SEED, REFERENCE_SEED = 10 * EVALUATION_SEED, 20 * EVALUATION_SEED
TEACHER, START, CONTROL = "teacher", "start", "without a discriminator"
COLOURS = {CONTROL: "grey", "GAS, rate 0.0001": "C3", "GAS, rate 1e-05": "C1"}
KINDS = {"fine": "fine detail", "coarse": "coarse pixels"}
DISCRIMINATOR_WIDTH = 32


def features(states: Tensor, low: float) -> dict[str, Tensor]:
    """The two kinds of features of galaxies, each of shape `(num_samples, num_features)`. `low` is a level below the ground's noise."""
    stretched = (states - low).clamp_min(1e-3).log()
    neighbours = stretched[..., :-2, 1:-1] + stretched[..., 2:, 1:-1]
    neighbours = neighbours + (stretched[..., 1:-1, :-2] + stretched[..., 1:-1, 2:])
    detail = avg_pool2d((stretched[..., 1:-1, 1:-1] - neighbours / 4).square(), 6)
    return {"fine": (detail + 1e-8).log().flatten(1), "coarse": avg_pool2d(stretched, 4).flatten(1)}


class Judge:
    """Compares samples with those of the teacher from other noises, in features of unit deviation."""

    def __init__(self, reference: Tensor):
        self.low = reference.min().item() - 0.1 * reference.std().item()
        self.deviations = {kind: values.std(0) for kind, values in features(reference, self.low).items()}
        self.reference = self.gaussians(reference)

    def gaussians(self, states: Tensor) -> dict[str, Gaussian]:
        found = features(states, self.low)
        return {kind: Gaussian.of_features(values / self.deviations[kind]) for kind, values in found.items()}

    def judge(self, states: Tensor) -> dict[str, float]:
        found = self.gaussians(states)
        return {kind: frechet_distance(found[kind], self.reference[kind]) for kind in KINDS}


def train(
    pipe: Any, start: GeneralizedSolver, samples: TeacherSamples, rate: float | None, seed: int, last: int
) -> Iterator[tuple[int, GeneralizedSolver]]:
    """The averaged solver after every `JUDGED_EVERY` steps, from where an earlier run had come to."""
    n, adversary = start.num_inference_steps, None
    if rate is not None:
        set_seed(seed)
        discriminator = R3GANDiscriminator.for_samples(tuple(samples.final.shape[1:]), width=DISCRIMINATOR_WIDTH)
        adversary = Adversary(discriminator, AdversarialRecipe(discriminator_learning_rate=rate))
    recipe = Recipe(max_train_steps=last, seed=1000 * seed)
    loss, accelerator = Loss("l1"), Accelerator(cpu=True)
    trainer = GradientDescent(
        pipe, start, samples, loss=loss, recipe=recipe, accelerator=accelerator, adversary=adversary
    )
    checkpoint = output_folder() / ".adversarial_galaxies" / f"{n}_steps-{rate}-{seed}.pt"
    if checkpoint.exists():
        trainer.load_state_dict(load_state(checkpoint))
    bar = tqdm(initial=trainer.steps_done, total=last, desc=f"{n} steps, rate {rate}, seed {seed}", unit="step")
    with bar:
        while trainer.steps_done < last:
            trainer.step()
            bar.update()
            if trainer.steps_done % JUDGED_EVERY == 0:
                yield trainer.steps_done, trainer.averaged_solver()
                save_state(trainer.state_dict(), checkpoint)  # after its measurement has been kept


def measure(n: int, num_seeds: int, rates: list[float], last: int) -> list[dict[str, Any]]:
    """The rows of all trainings. Those of an earlier run are read."""
    network = subject(NETWORK)
    pipe, judged = network.pipe, SampleInputs.create(FIRST_SEED, NUM_JUDGED)
    judge = Judge(network.teacher_samples(SampleInputs.create(REFERENCE_SEED, NUM_JUDGED)).final)
    start = network.distilled().solvers[n]
    samples = network.teacher_samples(SampleInputs.create(TRAINING_SEED, NUM_TRAINING))
    folder = output_folder() / ".adversarial_galaxies"
    folder.mkdir(exist_ok=True)
    kept = folder / f"{n}_steps.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []

    def keep(solver: GeneralizedSolver, **row: Any) -> None:
        scheduler = GASScheduler.from_config(scheduler_config(pipe))
        scheduler.add_solver(solver)
        rows.append({"steps": n, **row, **judge.judge(network.samples(scheduler, n, judged))})
        with kept.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")

    if not rows:
        keep(start, method=START, seed=0, trained=0)
    for seed in range(num_seeds):
        for rate in (None, *rates):
            method = CONTROL if rate is None else f"GAS, rate {rate:g}"
            done = {row["trained"] for row in rows if (row["method"], row["seed"]) == (method, seed)}
            if last in done:
                continue
            for trained, solver in train(pipe, start, samples, rate, seed, last):
                if trained not in done:
                    keep(solver, method=method, seed=seed, trained=trained)
    return [{"steps": n, "method": TEACHER, "seed": 0, "trained": 0, **judge.judge(samples.final[:NUM_JUDGED])}, *rows]


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    header = [
        "evaluations",
        "training steps",
        "method",
        "seeds",
        *(f"Frechet distance, {text}" for text in KINDS.values()),
    ]
    lines = []
    for n, rows in results.items():
        for trained, method in sorted({(row["trained"], row["method"]) for row in rows}):
            own = [row for row in rows if (row["trained"], row["method"]) == (trained, method)]
            lines.append(
                [n, str(trained), method, str(len(own)), *(spread([row[kind] for row in own]) for kind in KINDS)]
            )
    return "\n\n".join(
        [
            f"**{NETWORK}**, {NUM_TRAINING} samples of the teacher, judged on {NUM_JUDGED} others. Means of the seeds and their "
            f"standard deviations. The discriminator has width {DISCRIMINATOR_WIDTH}.",
            markdown_table(header, lines),
        ]
    )


def draw(results: dict[str, list[dict[str, Any]]]) -> Any:
    plot, axes = figure(len(results), len(KINDS), (9, 3.4 * len(results)))
    for line, (n, rows) in zip(axes, results.items()):
        teacher, start, *trained = rows
        for axis, (kind, text) in zip(line, KINDS.items()):
            for method, seed in dict.fromkeys((row["method"], row["seed"]) for row in trained):
                own = [row for row in trained if (row["method"], row["seed"]) == (method, seed)]
                steps, values = [0, *(row["trained"] for row in own)], [start[kind], *(row[kind] for row in own)]
                axis.plot(steps, values, color=COLOURS.get(method), label=method if seed == 0 else None)
            axis.axhline(teacher[kind], color="black", linestyle=":", label="teacher")
            axis.set(
                xlabel="training steps", ylabel="Frechet distance", title=f"{n} evaluations, {text}", yscale="log"
            )
            axis.grid(alpha=0.3, which="both")
            axis.legend(fontsize=8)
    return plot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[3], help="numbers of evaluations")
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4], help="of the discriminator")
    parser.add_argument("--max_train_steps", type=int, default=2000)
    args = parser.parse_args()
    results = {str(n): measure(n, args.num_seeds, args.rates, args.max_train_steps) for n in args.steps}
    write(__file__, results, table(results), draw(results))


if __name__ == "__main__":
    main()
