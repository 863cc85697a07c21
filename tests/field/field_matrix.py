"""Goes through every pipeline class that the installed Diffusers exports, with small random networks, and records what works.

    python tests/field/field_matrix.py                 # all classes, from the beginning
    python tests/field/field_matrix.py --resume        # those that the results do not have yet
    python tests/field/field_matrix.py 'Flux*' 'Wan*'  # these classes again

Every class is examined in a process of its own. After each class the results are written to `field_matrix.json`, and at the end
the table in PIPELINES.md and the numbers in the README. Out of scope are automatic and modular pipelines, which are not
`DiffusionPipeline`s, the classes in Diffusers' folder of deprecated pipelines, and those that need packages that are not
installed.
"""

import argparse
import inspect
import json
import multiprocessing
import os
import sys
import time
import warnings
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from tqdm import tqdm

from diffusers_gas.utils.files import write_text


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "benchmarks"))
import results_page

from field import pipelines_page
from field.examine import examine


FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
RESULTS = FOLDER / "field_matrix.json"
DEPRECATED = "diffusers.pipelines.deprecated."


def exported() -> dict[str, Any]:
    """Diffusers' version, the classes in scope, and those out of scope by the reason."""
    found: dict[str, Any] = {"classes": [], "deprecated": [], "missing_packages": {}}
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name)
        if not inspect.isclass(kind) or kind is DiffusionPipeline:
            continue
        if "Pipeline" in name and hasattr(kind, "_backends"):  # stands for a class that cannot be imported
            found["missing_packages"][name] = [
                package
                for package in kind._backends
                if not diffusers.utils.import_utils.BACKENDS_MAPPING[package][0]()
            ]
        elif issubclass(kind, DiffusionPipeline) and kind.__module__.startswith("diffusers."):
            found["deprecated" if kind.__module__.startswith(DEPRECATED) else "classes"].append(name)
    return found


def isolated(name: str, seconds: float) -> dict[str, Any]:
    """What is recorded of a class, examined in a process of its own, with a limit of time."""
    context = multiprocessing.get_context("fork")  # which has imported everything
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(name, theirs))
    start = time.monotonic()
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            result = ours.recv()
        else:
            result = {
                "not_built": {"error": "TimeoutError", "message": f"It took more than {seconds} s.", "where": ""}
            }
    except EOFError:
        result = {"not_built": {"error": "EOFError", "message": "Its process ended without a result.", "where": ""}}
    process.kill()
    process.join()
    return result | {"seconds": round(time.monotonic() - start, 1)}


def _examine(name: str, results: Connection) -> None:
    """Runs in the process of one class, silently."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.dup2(null, sys.stderr.fileno())
    results.send(examine(getattr(diffusers, name)))


def main(arguments: list[str] | None = None) -> None:
    """Examines classes, and writes the results and the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="patterns of class names, e.g. 'Flux*'")
    parser.add_argument("--resume", action="store_true", help="keep what is recorded for the installed versions")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for a class")
    options = parser.parse_args(arguments)
    versions = {
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    scope = exported()
    results: dict[str, Any] = {}
    if (options.resume or options.patterns) and RESULTS.exists():
        recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
        if recorded["versions"] == versions:
            results = {name: found for name, found in recorded["classes"].items() if name in scope["classes"]}
    chosen = [
        name
        for name in scope["classes"]
        if (not options.patterns or any(fnmatchcase(name, pattern) for pattern in options.patterns))
        and not (options.resume and name in results)
    ]
    for name in (progress := tqdm(chosen, unit="class")):
        progress.set_postfix_str(name)
        results[name] = isolated(name, options.limit)
        record = {"versions": versions, **scope, "classes": dict(sorted(results.items()))}
        write_text(RESULTS, json.dumps(record, indent=1) + "\n")
    pipelines_page.refresh()
    results_page.refresh()


if __name__ == "__main__":
    main()
