"""Repeats all measurements: the main job, every benchmark, RESULTS.md and the numbers in the README.

    python examples/benchmarks/run_all.py
    python examples/benchmarks/run_all.py --only step_cost exact_solution

This takes about nine hours on a CPU core, a third of it for the fits of quality.py and solver_cost.py. They are kept, as are the
measurements of real_sizes.py, so that an interrupted run can be resumed. After a benchmark fails, the others still run.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import results_page
from tqdm.auto import tqdm


FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]


def main_job() -> None:
    """Runs the README's first command, and keeps its table, numbers and picture."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, ROOT / "training" / "train_gas.py", "--output_dir", folder], check=True)
        for ending in (".md", ".png"):
            shutil.copyfile(Path(folder) / f"comparison{ending}", FOLDER / f"main_job{ending}")
        results = json.loads((Path(folder) / "comparison.json").read_text(encoding="utf-8"))
        del results["arguments"]  # it has paths of this machine
        (FOLDER / "main_job.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def picture_solvers() -> None:
    """Draws the solvers and plans that the pages show."""
    for name, solver, steps in results_page.PICTURED:
        command = [sys.executable, "-m", "diffusers_gas", "inspect", ROOT / solver, "--output", FOLDER / name]
        subprocess.run([*command, "--num_inference_steps", *map(str, steps)], check=True)


def main() -> None:
    names = [name for name, *_ in results_page.SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    chosen = parser.parse_args().only
    failed = []
    bar = tqdm(chosen, unit="benchmark")
    for name in bar:
        bar.set_description(name)
        try:
            if name == "main_job":
                main_job()
            else:
                subprocess.run([sys.executable, FOLDER / f"{name}.py"], check=True)
            if name == "quality":
                picture_solvers()
        except subprocess.CalledProcessError as error:
            failed.append(f"{name} (exit code {error.returncode})")
    results_page.refresh()
    if failed:
        sys.exit(f"These benchmarks failed, and their results are the old ones: {', '.join(failed)}")


if __name__ == "__main__":
    main()
