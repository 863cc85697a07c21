"""Distance to the teacher at 4, 6, 8 and 10 evaluations, on every shipped teacher: GS and SDM against Diffusers' schedulers.

    python examples/benchmarks/distillation_quality.py
    python examples/benchmarks/distillation_quality.py --teachers digits

Runs training/train_gas.py and training/calibrate_sdm.py on each teacher. Their output stays in `.distillation_quality/` beside
this file: an interrupted run goes on, a second one only measures. Writes distillation_quality.json, .md and .png, and a
picture of each teacher's samples; about an hour on two CPU cores.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from diffusers_gas import SDMScheduler
from diffusers_gas.distillation.comparison import distance_to_teacher


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "training"))  # scripts, not a package
from gas_run import Run  # noqa: E402
from train_gas import parse_args  # noqa: E402


FOLDER = Path(__file__).with_name(".distillation_quality")
STEP_COUNTS = (4, 6, 8, 10)
# Samples to learn from, held-out samples, and the limit in seconds for each step count.
SETTINGS = {
    "digits": (512, 512, 600),
    "text-to-digits": (256, 128, 240),
    "flow-digits": (256, 128, 240),
}
NUM_CALIBRATION = 64


def run_script(name: str, arguments: list[object]) -> None:
    subprocess.run([sys.executable, str(ROOT / "training" / name), *map(str, arguments)], check=True)


def distil(teacher: str) -> Path:
    """The output folder of train_gas.py for a teacher, which is run unless it has been."""
    output_dir = FOLDER / teacher
    if not (output_dir / "comparison.json").exists():
        run_script("train_gas.py", distillation_arguments(teacher))
    return output_dir


def distillation_arguments(teacher: str) -> list[object]:
    num_training, num_held_out, seconds = SETTINGS[teacher]
    arguments = ["--teacher", teacher, "--num_inference_steps", *STEP_COUNTS, "--output_dir", FOLDER / teacher]
    arguments += ["--num_teacher_samples", num_training, "--num_validation_samples", num_held_out]
    return [*arguments, "--max_train_seconds", seconds]


def measure(teacher: str) -> list[dict]:
    """Distils and calibrates for a teacher as far as that has not been done; a row for each step count."""
    output_dir = distil(teacher)
    sdm_dir = output_dir / "sdm"
    if not (sdm_dir / "calibration.png").exists():
        arguments = ["--teacher", teacher, "--num_inference_steps", *STEP_COUNTS]
        run_script("calibrate_sdm.py", [*arguments, "--output_dir", sdm_dir, "--num_samples", NUM_CALIBRATION])
    results = json.loads((output_dir / "comparison.json").read_text())
    sdm = sdm_distances(Run(parse_args(list(map(str, distillation_arguments(teacher))))), sdm_dir / "scheduler")
    return [summary(results, n, sdm[n]) for n in STEP_COUNTS]


def sdm_distances(run: Run, folder: Path) -> dict[int, float]:
    """Of calibrated plans, on the held-out samples that the distillation left."""
    run.collect()
    scheduler, samples, batch_size = SDMScheduler.from_pretrained(folder), run.validation_samples, 64
    return {n: distance_to_teacher(run.pipe, scheduler, n, samples, batch_size) for n in STEP_COUNTS}


def summary(results: dict, n: int, sdm: float) -> dict:
    """Ours beside the best of all others, and of those that start at the noisiest time."""
    (ours,) = (row["distance"] for row in results["ours"] if row["num_inference_steps"] == n)
    others = [row for row in results["others"] if row["num_inference_steps"] == n]
    best = min(others, key=lambda row: row["distance"])
    full = min((row for row in others if "leading" not in row["scheduler"]), key=lambda row: row["distance"])
    return {
        "steps": n,
        "ours": ours,
        "sdm": sdm,
        "best": best["distance"],
        "best_scheduler": best["scheduler"],
        "relative": ours / best["distance"],
        "best_full_range": full["distance"],
        "best_full_range_scheduler": full["scheduler"],
        "relative_full_range": ours / full["distance"],
        **{name: results["fits"][str(n)][name] for name in ("evaluations", "seconds")},
    }


def table(rows: list[dict]) -> str:
    lines = [
        "| steps | GS (ours) | SDM | best of Diffusers | GS / best | best without `leading` spacing | GS / that | distilled in |",
        "| --- " * 8 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['steps']} | {row['ours']:.5f} | {row['sdm']:.5f} | {row['best']:.5f} ({row['best_scheduler']}) "
            f"| {row['relative']:.2f} | {row['best_full_range']:.5f} ({row['best_full_range_scheduler']}) "
            f"| {row['relative_full_range']:.2f} | {row['seconds']:.0f} s, {row['evaluations'] / 1e3:.0f} k evaluations |"
        )
    return "\n".join(lines)


def draw(results: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(results), figsize=(3.6 * len(results) + 1, 3.4), layout="constrained", squeeze=False
    )
    for axis, (teacher, rows) in zip(axes[0], results.items()):
        for name, label in (("best", "best of Diffusers"), ("sdm", "SDM, calibrated"), ("ours", "GS, distilled")):
            axis.plot(STEP_COUNTS, [row[name] for row in rows], marker="o", label=label)
        axis.set(yscale="log", xticks=STEP_COUNTS, xlabel="network evaluations", title=teacher)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("mean squared distance to the teacher")
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teachers", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    path = Path(__file__).with_suffix("")
    results = {}
    for teacher in parser.parse_args().teachers:
        results[teacher] = measure(teacher)
        shutil.copy(FOLDER / teacher / "comparison.png", path.with_name(f"{path.name}-{teacher}.png"))
    sections = []
    for teacher, rows in results.items():
        num_training, num_held_out, _ = SETTINGS[teacher]
        heading = f"**{teacher}**, {num_training} samples to learn from, {num_held_out} held out"
        sections.append(f"{heading}\n\n{table(rows)}")
    text = "\n\n".join(sections)
    print(text)
    path.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    path.with_suffix(".md").write_text(text + "\n")
    draw(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
