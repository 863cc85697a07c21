"""What the benchmarks share: where their results go, figures, and the shipped models as teachers.

A benchmark writes `{name}.json`, `.md` (its table) and `.png` beside itself, or into the folder that the environment variable
DIFFUSERS_GAS_BENCHMARK_OUTPUT names.
"""

import json
import multiprocessing
import os
import resource
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache, TeacherSamples
from diffusers_gas.utils.files import replacing


if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

T = TypeVar("T")

FOLDER = Path(__file__).resolve().parent
OUTPUT_VARIABLE = "DIFFUSERS_GAS_BENCHMARK_OUTPUT"
# Theory solvers that `best_initial_solver` tries for variance-preserving networks; for flow matching they are fewer.
NUM_START_CANDIDATES = 6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

sys.path.insert(0, str(FOLDER.parents[1] / "training"))  # scripts, not a package
import common  # noqa: E402


def output_folder() -> Path:
    """Where results, and what a benchmark keeps for its next run, lie."""
    folder = Path(os.environ.get(OUTPUT_VARIABLE, FOLDER))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def output_path(script: str | os.PathLike, ending: str) -> Path:
    """A file of a benchmark, e.g. `output_path(__file__, ".json")` or `output_path(__file__, "-digits.png")`."""
    return output_folder() / f"{Path(script).stem}{ending}"


def write(script: str | os.PathLike, results: Any, table: str, figure: "Figure | None" = None) -> None:
    """Prints a table, and writes it with the results it comes from and the figure of it; the figure is closed.

    Args:
        script: The benchmark, `__file__`.
        results: Everything that was measured, as JSON.
        table: Markdown.
        figure: Of [`figure`].
    """
    print(f"\n{table}\n", flush=True)
    for ending, text in ((".json", json.dumps(results, indent=1)), (".md", table)):
        with replacing(output_path(script, ending)) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    if figure is not None:
        save_figure(figure, output_path(script, ".png"))


def read(name: str) -> Any:
    """The results of another benchmark: those of the output folder, or else those that lie beside the scripts."""
    path = output_folder() / f"{name}.json"
    if not path.exists():
        path = FOLDER / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run `python examples/benchmarks/{name}.py` first.")
    return json.loads(path.read_text(encoding="utf-8"))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)])


def figure(
    num_rows: int = 1, num_columns: int = 1, size: tuple[float, float] = (6.4, 3.8), **subplot_arguments: Any
) -> tuple["Figure", "np.ndarray"]:
    """A figure without a screen, and its axes, always `(num_rows, num_columns)`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        num_rows, num_columns, figsize=size, squeeze=False, layout="constrained", **subplot_arguments
    )


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes and closes a figure."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@dataclass(frozen=True)
class Teacher:
    """A shipped model, called as `train_gas.py --teacher {name}` calls it.

    Attributes:
        name: Its folder in `examples/teachers`.
        pipe: The pipeline, without progress bars.
        scheduler, num_inference_steps: How it samples.
        cycle: What samples take in turn, e.g. prompts.
        common: What all calls are given, e.g. the guidance scale.
    """

    name: str
    pipe: DiffusionPipeline
    scheduler: SchedulerMixin
    num_inference_steps: int
    cycle: Sequence[Mapping[str, Any]]
    common: Mapping[str, Any]

    @property
    def path(self) -> Path:
        return common.TEACHERS / self.name

    def inputs(self, first_seed: int, num_samples: int) -> SampleInputs:
        return SampleInputs.create(first_seed, num_samples, self.cycle, **self.common)

    def samples(self, first_seed: int, num_samples: int, batch_size: int = 64) -> TeacherSamples:
        """Its samples, which are kept in the output folder's `.teacher_samples`."""
        cache = TeacherCache(output_folder() / ".teacher_samples", self.name, self.scheduler, self.num_inference_steps)
        return cache.collect(self.pipe, self.inputs(first_seed, num_samples), batch_size, f"Teacher, {self.name}")


def load_teacher(name: str, device: str | torch.device = "cpu") -> Teacher:
    """A model of `examples/teachers`: digits, text-to-digits or flow-digits."""
    parser = ArgumentParser()
    common.add_pipeline_arguments(parser)
    common.add_teacher_arguments(parser.add_argument)
    args = parser.parse_args(["--pretrained_model_name_or_path", str(common.TEACHERS / name)])
    pipe = common.load_pipeline(args, torch.device(device))
    pipe.set_progress_bar_config(disable=True)
    shared = common.common_arguments(args)
    cycle = common.sample_arguments(args, pipe, shared)
    steps = args.teacher_num_inference_steps
    return Teacher(name, pipe, common.teacher_scheduler(args, pipe), steps, cycle, shared)


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a module's function in a new process, so that [`PeakMemory`] sees what it alone takes.

    The process is forked from a server that has imported the package and done nothing else: one that is started by this
    process would inherit its peak.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [f"diffusers_gas.distillation.{name}" for name in ("gauss_newton", "gradient_descent")]
    )
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_call, dict(os.environ), function, arguments).result()


def _call(environment: Mapping[str, str], function: Callable[..., T], arguments: Sequence[Any]) -> T:
    # The server has the environment of its own start.
    os.environ.update(environment)
    return function(*arguments)


class PeakMemory:
    """By how much memory has risen since: an accelerator's tensors, or on the CPU this process's resident set.

    The latter is known by its largest size so far only, and shows what exceeds that: one measurement a process.
    """

    def __init__(self, device: str = "cpu"):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._before = self._peak()

    def rise(self) -> int:
        """In bytes."""
        return self._peak() - self._before

    def _peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        kilobyte = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
