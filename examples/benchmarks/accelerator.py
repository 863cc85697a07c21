"""What only an accelerator shows, in eight minutes: placement and precision, sampling, distillation, compilation and offloading.

    python examples/benchmarks/accelerator.py
    python examples/benchmarks/accelerator.py --minutes 15
    python examples/benchmarks/accelerator.py --small

Networks have the published sizes and random weights, in bfloat16; nothing is downloaded. The cases are those of real_sizes.py, which
measures all of them and takes longer. The script says first what it will run. Each measurement has its own process, and is written to
accelerator.json at once. What fails is reported and the rest goes on. What would not fit into `--minutes` is left out, and what takes
longer, or three times as long as assumed, is ended. The next run keeps what was measured on this device and tries the rest.

"Beside the network" is a step's time without the network, for which the host waits before and after every evaluation: the pipeline's own
work and the scheduler's. The model's own scheduler is the reference.

The results are accelerator.json and .md beside this file, or in the folder DIFFUSERS_GAS_BENCHMARK_OUTPUT. `--small` runs tiny networks,
on a CPU too, and writes accelerator-small.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import real_sizes
import step_cost
import torch
from diffusers import DiffusionPipeline
from report import (
    DEVICE,
    FOLDER,
    add_solver_with_all_coefficients,
    in_own_process,
    markdown_table,
    output_path,
    write,
    write_results,
)
from tqdm.auto import tqdm

from diffusers_gas import GASScheduler, SampleInputs, SDMScheduler, distill
from diffusers_gas.pipelines.driving import scheduler_config
from diffusers_gas.pipelines.inputs import TRAINING_SEED


# The tests run on an accelerator where there is one.
TESTS, TESTS_SECONDS = ("tests/integration/test_precision_and_placement.py", "-n", "4"), 60
STEPS = 5  # of a sampling; SDM warns of fewer
NUM_SAMPLES, TEACHER_STEPS, MAX_EVALUATIONS = 24, 20, 2000
LATENTS = "large image, 2x4x128x128"

Measurement = dict[str, Any]  # with "result", what the table says of it


@dataclass(frozen=True)
class Row:
    """A measurement.

    Attributes:
        name: What is measured.
        seconds: The time that it is assumed to take on a GPU of a data centre, with the start of its process.
        measure: From the device to what was measured.
    """

    name: str
    seconds: int
    measure: Callable[[str], Measurement]


def run_tests(device: str) -> Measurement:
    """The package's own tests of placement and precision.

    Raises:
        RuntimeError: With the names of the tests that failed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True, timeout=2 * TESTS_SECONDS)
    lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
    if done.returncode:
        failed = [line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
        raise RuntimeError("; ".join([lines[-1].strip("= "), *failed]))
    return {"result": lines[-1].strip("= ")}


def time_steps(device: str) -> Measurement:
    """The time of a scheduler's step alone, as in step_cost.py."""
    shape, n = step_cost.SHAPES[LATENTS], step_cost.DRAWN_STEPS
    times = step_cost.medians(
        partial(step_cost.microseconds_per_step, num_inference_steps=n, shape=shape, device=device)
    )
    return {"microseconds": times, "result": ", ".join(f"{name} {us:.0f} us" for name, us in times.items())}


def sample(pipe: DiffusionPipeline, arguments: dict[str, Any], case: real_sizes.Case, device: str) -> Measurement:
    """Samples with the model's own scheduler and with ours.

    Raises:
        RuntimeError: If a sample is not finite.
    """
    config = scheduler_config(pipe)
    gs = GASScheduler.from_config(config, use_theory_for_untrained_steps=True)
    sdm = SDMScheduler.from_config(config)
    add_solver_with_all_coefficients(gs, case.steps, torch.Generator().manual_seed(0))
    named = {type(pipe.scheduler).__name__: pipe.scheduler, "GS": gs, "SDM": sdm}
    records = {
        name: real_sizes.sample_with(scheduler, pipe, arguments, case, device) for name, scheduler in named.items()
    }
    not_finite = [name for name, record in records.items() if not record["finite"]]
    if not_finite:
        raise RuntimeError(f"samples are not finite: {', '.join(not_finite)}")
    beside = [f"{name} {beside_network(record, case.steps):.2f} ms" for name, record in records.items()]
    network = 1e3 * records["GS"]["network_seconds"] / case.steps
    totals = {key: sum(record[key] for record in records.values()) for key in ("evaluations", "seconds")}
    return totals | {"records": records, "result": f"a step: network {network:.1f} ms; beside it {', '.join(beside)}"}


def beside_network(record: Measurement, steps: int) -> float:
    """Milliseconds of a step that are not the network's."""
    return 1e3 * (record["seconds"] - record["network_seconds"]) / steps


def distillation(
    pipe: DiffusionPipeline, arguments: dict[str, Any], case: real_sizes.Case, device: str
) -> Measurement:
    """A distillation by default settings but for its number of evaluations."""
    inputs = SampleInputs.create(TRAINING_SEED, NUM_SAMPLES, **arguments)
    settings = {"teacher_num_inference_steps": TEACHER_STEPS, "max_evaluations": MAX_EVALUATIONS}
    clock = real_sizes.Clock(real_sizes.network_of(pipe), device)
    n = real_sizes.DISTILLED_STEPS
    provenance = distill(pipe, n, inputs=inputs, **settings).solvers[n].provenance
    measured = {name: provenance[name] for name in ("initial_distance", "distance", "sampled_distance")}
    values = [f"{name.replace('_', ' ')} {value:.3g}" for name, value in measured.items()]
    return clock.record() | measured | {"result": ", ".join(values)}


def adversarial(pipe: DiffusionPipeline, arguments: dict[str, Any], case: real_sizes.Case, device: str) -> Measurement:
    record = real_sizes.adversarial_step(pipe, arguments, case, device)
    return record | {"result": f"gradient norm {record['gradient_norm']:.3g}"}


def rows(small: bool) -> list[Row]:
    """All measurements, the most telling first."""
    cases: dict[tuple[str, str], real_sizes.Case] = {}
    for case in real_sizes.small_cases() if small else real_sizes.accelerator_cases():
        cases.setdefault((case.model, case.task), case)  # the first is plain and in bfloat16

    def networks(name: str, seconds: int, model: str, task: str, measured: Callable, way: str = "plain") -> Row:
        case = replace(cases[model, task], steps=STEPS, way=way)
        return Row(name, seconds, partial(real_sizes.measure, case, task=measured))

    sd = "Stable Diffusion 1.5"
    return [
        Row("tests of placement and precision", TESTS_SECONDS, run_tests),
        Row(f"a step alone, {LATENTS}", 15, time_steps),
        networks(f"{sd}, distill {real_sizes.DISTILLED_STEPS} steps", 70, sd, "distill", distillation),
        *(
            networks(f"{model}, sample {STEPS} steps", seconds, model, "sample", sample)
            for model, seconds in ((sd, 20), ("SDXL", 25), ("FLUX.1-dev", 40), ("Wan 2.1 1.3B", 65))
        ),
        networks(f"{sd}, one adversarial step", 25, sd, "adversarial", adversarial),
        networks(f"{sd}, offloaded", 20, sd, "sample", sample, "offloaded"),
        networks(f"{sd}, offloaded layer by layer", 30, sd, "sample", sample, "offloaded layer by layer"),
        networks(f"{sd}, compiled", 90, sd, "sample", sample, "compiled"),
    ]


def table(found: list[Measurement]) -> str:
    lines = [[row["name"], *cells(row)] for row in found]
    return f"On {found[0]['device']}:\n\n" + markdown_table(
        ["", "result", "evaluations", "time", "peak memory"], lines
    )


def cells(row: Measurement) -> list[str]:
    if "not_run" in row:
        return [f"not run: {row['not_run']}", "", "", ""]
    memory = f"{row['peak_memory'] / 2**30:.1f} GiB" if "peak_memory" in row else ""
    evaluations = str(row.get("evaluations", ""))
    return [row["result"].replace("|", "/"), evaluations, f"{row['whole_seconds']:.0f} s", memory]


def run(row: Row, device: str, left: float) -> Measurement:
    """What was measured or why not, in at most `left` seconds and three times what is assumed."""
    if row.seconds > left:
        return {"not_run": f"takes about {row.seconds} s, and {max(0, left):.0f} s were left"}
    started = time.perf_counter()
    try:
        found = in_own_process(row.measure, device, seconds=max(1, int(min(left, 3 * row.seconds))))
    except BrokenProcessPool:
        return {"not_run": f"its process ended after {time.perf_counter() - started:.0f} s, for time or memory"}
    except Exception as error:  # the other rows go on
        return {"not_run": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return found | {"whole_seconds": time.perf_counter() - started}


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="the most time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=DEVICE)
    parser.add_argument("--small", action="store_true", help="tiny networks, on a CPU too")
    args = parser.parse_args()
    if args.device == "cpu" and not args.small:
        parser.error("full sizes need an accelerator, and there is none here; `--small` runs tiny networks.")
    script = "accelerator-small" if args.small else __file__
    device, path = real_sizes.name_of(args.device), output_path(script, ".json")
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    # The table is of one device.
    results = {row["name"]: row for row in kept if row["device"] == device and "not_run" not in row}
    pending = [row for row in rows(args.small) if row.name not in results]
    print(f"On {device}, {len(results)} measurements are there. To be run in at most {args.minutes:g} minutes:")
    for row in pending:
        print(f"  {row.name}: about {row.seconds} s on a GPU")
    print(f"Together about {sum(row.seconds for row in pending) / 60:.1f} minutes.", flush=True)
    for row in tqdm(pending, unit="row"):
        left = 60 * args.minutes - (time.perf_counter() - started)
        stated = {"name": row.name, "device": device, "versions": real_sizes.VERSIONS}
        results[row.name] = stated | run(row, args.device, left)
        write_results(script, list(results.values()))
    found = [results[row.name] for row in rows(args.small)]
    write(script, found, table(found))


if __name__ == "__main__":
    main()
