"""Distance to the teacher at 4, 6 and 8 evaluations: distilled solvers against every few-step scheduler of Diffusers.

    python examples/benchmarks/distillation_quality.py

Runs training/train_gas.py on the shipped teacher with more samples than by default, and draws distances against steps.
Writes distillation_quality.json, .md and .png beside this file; minutes on two CPU cores.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
STEP_COUNTS = (4, 6, 8)
NUM_TEACHER_SAMPLES, NUM_VALIDATION_SAMPLES = 1024, 512


def distil(output_dir: str) -> dict:
    command = [sys.executable, str(ROOT / "training" / "train_gas.py"), "--output_dir", output_dir]
    command += ["--num_inference_steps", *map(str, STEP_COUNTS)]
    command += ["--num_teacher_samples", str(NUM_TEACHER_SAMPLES)]
    command += ["--num_validation_samples", str(NUM_VALIDATION_SAMPLES)]
    subprocess.run(command, check=True)
    return json.loads((Path(output_dir) / "comparison.json").read_text())


def summarize(results: dict) -> list[dict]:
    """For each step count ours beside the best of all others, and of those that start at the noisiest time."""
    rows = []
    for ours in results["ours"]:
        n = ours["num_inference_steps"]
        others = [row for row in results["others"] if row["num_inference_steps"] == n]
        full = [row for row in others if "leading" not in row["scheduler"]]
        best, best_full = (min(group, key=lambda row: row["distance"]) for group in (others, full))
        rows.append(
            {
                "steps": n,
                "ours": ours["distance"],
                "best": best["distance"],
                "best_scheduler": best["scheduler"],
                "relative": ours["distance"] / best["distance"],
                "best_full_range": best_full["distance"],
                "best_full_range_scheduler": best_full["scheduler"],
                "relative_full_range": ours["distance"] / best_full["distance"],
                **{name: results["fits"][str(n)][name] for name in ("evaluations", "seconds")},
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| steps | GS (ours) | best of Diffusers | ratio | best without `leading` spacing | ratio | distilled in |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['steps']} | {row['ours']:.5f} | {row['best']:.5f} ({row['best_scheduler']}) | {row['relative']:.2f} "
            f"| {row['best_full_range']:.5f} ({row['best_full_range_scheduler']}) | {row['relative_full_range']:.2f} "
            f"| {row['seconds']:.0f} s, {row['evaluations'] / 1e3:.0f} k evaluations |"
        )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    steps = [row["steps"] for row in rows]
    for name, label in (
        ("best_full_range", "best of Diffusers without `leading`"),
        ("best", "best of Diffusers"),
        ("ours", "GS, distilled"),
    ):
        axis.plot(steps, [row[name] for row in rows], marker="o", label=label)
    axis.set(yscale="log", xticks=steps, xlabel="network evaluations", ylabel="mean squared distance to the teacher")
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def main() -> None:
    with tempfile.TemporaryDirectory() as output_dir:
        rows = summarize(distil(output_dir))
    print(f"\nOn {NUM_VALIDATION_SAMPLES} held-out samples:\n\n{table(rows)}")
    path = Path(__file__).with_suffix("")
    path.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(rows) + "\n")
    draw(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
