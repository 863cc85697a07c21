"""Shared parts of the benchmarks: the output folder, figures, and the shipped models as teachers.

A benchmark writes `{name}.json`, `{name}.md` (its table) and `{name}.png` beside itself, or into the folder in the environment
variable DIFFUSERS_GAS_BENCHMARK_OUTPUT.
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from diffusers_gas import GASScheduler
from diffusers_gas.commands.arguments import PipelineSettings, TeacherSettings
from diffusers_gas.pipelines.inputs import SampleInputs
from diffusers_gas.pipelines.teacher import TeacherCache, TeacherSamples
from diffusers_gas.utils.files import write_text


if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

T = TypeVar("T")

FOLDER = Path(__file__).resolve().parent
TEACHERS = FOLDER.parent / "teachers"
OUTPUT_VARIABLE = "DIFFUSERS_GAS_BENCHMARK_OUTPUT"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def output_folder() -> Path:
    """The folder for results and for files that a benchmark keeps for its next run."""
    folder = Path(os.environ.get(OUTPUT_VARIABLE, FOLDER))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def output_path(script: str | os.PathLike, ending: str) -> Path:
    """The path of a benchmark's file, e.g. `output_path(__file__, ".json")` or `output_path(__file__, "-digits.png")`."""
    return output_folder() / f"{Path(script).stem}{ending}"


def write(script: str | os.PathLike, results: Any, table: str, figure: "Figure | None" = None) -> None:
    """Prints the table of a benchmark, and writes table, results and figure.

    Args:
        script: The benchmark, `__file__`.
        results: All measurements, in JSON's types.
        table: A table in Markdown.
        figure: A figure made by [`figure`].
    """
    print(f"\n{table}\n", flush=True)
    write_results(script, results)
    write_text(output_path(script, ".md"), table + "\n")
    if figure is not None:
        figure.savefig(output_path(script, ".png"), dpi=120)


def write_results(script: str | os.PathLike, results: Any) -> None:
    """Writes the measurements so far of a benchmark that takes long."""
    write_text(output_path(script, ".json"), json.dumps(results, indent=1) + "\n")


def measure_each(script: str | os.PathLike, names: Iterable[str], measure: Callable[[str], Any]) -> dict[str, Any]:
    """The results of `measure` by name. Those in the script's file stay, and each new one is written at once.

    An interrupted run therefore goes on, and runs of other names add to it.
    """
    path = output_path(script, ".json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in names:
        if name not in results:
            results[name] = measure(name)
            write_results(script, results)
    return results


def read(name: str) -> Any:
    """The results of another benchmark, from the output folder or else from the folder of the scripts."""
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
    """A figure and its axes, an array of shape `(num_rows, num_columns)`."""
    from matplotlib.figure import Figure  # not pyplot, which changes the user's backend

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False, **subplot_arguments)


@dataclass
class Settings(TeacherSettings, PipelineSettings):
    """The settings with which `train_gas.py` loads and calls a model."""


@dataclass(frozen=True)
class Teacher:
    """A shipped model, loaded and called as by `train_gas.py`.

    Attributes:
        name: Name of its folder in `examples/teachers`.
        pipe: The pipeline, without progress bars.
        scheduler, num_inference_steps: Scheduler and number of steps of the teacher.
        settings: Its prompts and the arguments of its calls.
    """

    name: str
    pipe: DiffusionPipeline
    scheduler: SchedulerMixin
    num_inference_steps: int
    settings: Settings

    @property
    def path(self) -> Path:
        return TEACHERS / self.name

    def inputs(self, first_seed: int, num_samples: int) -> SampleInputs:
        return self.settings.sample_inputs(self.pipe, first_seed, num_samples)

    def samples(self, first_seed: int, num_samples: int, batch_size: int = 64) -> TeacherSamples:
        """The teacher's samples, which are kept in the folder `.teacher_samples` of the output folder."""
        cache = TeacherCache(output_folder() / ".teacher_samples", self.name, self.scheduler, self.num_inference_steps)
        return cache.collect(self.pipe, self.inputs(first_seed, num_samples), batch_size, f"Teacher, {self.name}")


def load_teacher(name: str, device: str | torch.device = "cpu") -> Teacher:
    """Loads a model of `examples/teachers`."""
    settings = Settings(str(TEACHERS / name))
    pipe = settings.load_pipeline(torch.device(device))
    pipe.set_progress_bar_config(disable=True)
    return Teacher(name, pipe, settings.load_teacher(pipe), settings.teacher_num_inference_steps, settings)


def add_solver_with_all_coefficients(
    scheduler: GASScheduler, num_inference_steps: int, generator: torch.Generator
) -> None:
    """Gives a scheduler a solver that uses every coefficient, which is the most expensive case."""
    solver = scheduler.theory_solver(num_inference_steps, mu=1.0)
    with torch.no_grad():
        for parameter in solver.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    scheduler.add_solver(solver)


def in_own_process(function: Callable[..., T], *arguments: Any, seconds: int = 0) -> T:
    """Calls a function of a module in a new process, so that [`PeakMemory`] measures this call alone.

    The process is forked from a server that has only imported the package. A fork of this process would inherit its peak memory. After
    `seconds`, if they are not 0, the system ends the process, and this raises a `BrokenProcessPool`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [f"diffusers_gas.distillation.{name}" for name in ("gauss_newton", "gradient_descent")]
    )
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_call, dict(os.environ), function, arguments, seconds).result()


def _call(environment: Mapping[str, str], function: Callable[..., T], arguments: Sequence[Any], seconds: int) -> T:
    signal.alarm(seconds)
    # The server has the environment of the time when it was started.
    os.environ.update(environment)
    return function(*arguments)


class PeakMemory:
    """The rise of the peak memory since the object was made.

    The memory is that of an accelerator's tensors, or on the CPU the resident set of this process. The system only knows the
    largest resident set so far, so a process can do one measurement on the CPU.
    """

    def __init__(self, device: str = "cpu"):
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._before = self._peak()

    def rise(self) -> int:
        """The rise in bytes."""
        return self._peak() - self._before

    def _peak(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        kilobyte = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
