"""What the scripts in this folder share: which pipeline, how it is called, and arguments from YAML files."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from diffusers import DiffusionPipeline, SchedulerMixin

from ..pipelines.driving import scheduler_config
from ..pipelines.inputs import load_sample_inputs, with_guidance_scales
from ..pipelines.named_schedulers import load_scheduler
from ..pipelines.teacher import default_teacher
from ..schedulers.model_card import write_model_card
from ..schedulers.scheduling_utils import ODEScheduler
from ..utils.files import locked, remove_leftovers


TEACHERS = Path(__file__).resolve().parents[2] / "examples" / "teachers"


def start_all_processes() -> None:
    """Starts the processes that `accelerate launch --cpu --num_processes n` was asked for.

    Accelerate starts several on a CPU by MPI only, and otherwise a single one without a word. It leaves the address at which
    they would meet, but no rank; the number is on its command line.
    """
    ranked = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    meeting = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ
    if not meeting or any(name in os.environ for name in ranked):
        return
    launcher = psutil.Process().parent().cmdline()
    names = ("launch", "accelerate-launch")
    first = next((i for i, word in enumerate(launcher, start=1) if re.split(r"[./]", word)[-1] in names), None)
    if first is None:
        return
    asked = launch_command_parser().parse_args(launcher[first:])
    if asked.num_processes is None or (asked.num_machines or 1) > 1:
        raise ValueError(
            "Pass `--num_processes` to `accelerate launch --cpu`; for several machines without GPUs use `torchrun` with "
            "ACCELERATE_USE_CPU=true, or MPI."
        )
    arguments = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(asked.num_processes),
        *sys.argv,
    ]
    if not _chose_threads():
        os.environ.pop("OMP_NUM_THREADS", None)  # Accelerate's one
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *arguments])


def use_all_cores() -> None:
    """Undoes what Accelerate's and PyTorch's launchers do: leave a process one thread, as fits those that drive a GPU."""
    if not {"ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE"} & os.environ.keys() or _chose_threads():
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _chose_threads() -> bool:
    """Whether somebody told the launcher how many threads to use, which the launcher, once it has, does not show."""
    try:
        return "OMP_NUM_THREADS" in psutil.Process().parent().environ()
    except (AttributeError, psutil.Error):  # no parent any more, or another user's
        return False


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pipeline, and how it is called."""
    add = parser.add_argument
    add("--config", help="YAML file with any of these arguments; those on the command line win")
    add("--pretrained_model_name_or_path", help="the model: a folder or a Hub id")
    shipped = sorted(path.parent.name for path in TEACHERS.glob("*/model_index.json"))
    add("--teacher", default="digits", choices=shipped, help="a model of this repository instead")
    add("--revision", help="of the Hub repository")
    add("--variant", help="of the weights, e.g. fp16")
    add("--torch_dtype", choices=("float32", "float16", "bfloat16"), help="of the weights; float32 by default")
    add("--enable_model_cpu_offload", action="store_true", help="keep networks on the CPU while they are not used")
    add("--enable_xformers_memory_efficient_attention", action="store_true")
    add("--prompts_file", help="one prompt a line; in a .jsonl file one object of pipeline arguments a line")
    add("--guidance_scale", type=float, nargs="+", help="several are taken in turn")
    add("--pipeline_arguments", default="{}", help="further arguments of every pipeline call, as JSON")


def positive(text: str) -> int:
    """A whole number of at least 1, for `argparse`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Arguments of the command line, and of the file that `--config` names where the command line is silent."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    if args.config is not None:
        args = parser.parse_args([*read_config(args.config, vars(args)), *arguments])
    args.num_inference_steps = sorted(set(args.num_inference_steps))
    if args.pretrained_model_name_or_path is None:
        args.pretrained_model_name_or_path = str(TEACHERS / args.teacher)
    return args


def read_config(path: str, known: Container[str]) -> list[str]:
    """The arguments in a YAML file, as on a command line."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not a YAML file: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold arguments and their values, got {values!r}.")
    unknown = sorted(name for name in values if name not in known)
    if unknown:
        raise ValueError(f"{path} has unknown arguments {unknown}; `--help` lists the known ones.")
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words += [f"--{name}"] * value
            continue
        values = [json.dumps(value)] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def add_teacher_arguments(add: Callable[..., Any]) -> None:
    """How the teacher samples; `add` is a parser's or a group's `add_argument`."""
    add(
        "--teacher_scheduler",
        help="a Diffusers class, with settings as in Class:name=value, or a folder; DPM-Solver++ 2M, or Euler for flow matching",
    )
    add("--teacher_num_inference_steps", type=positive, default=50)


@contextmanager
def only_run(output_dir: str) -> Iterator[None]:
    """Keeps other runs out of an output folder while this one, of all its processes together, is at work there.

    Raises:
        ValueError: If another run is.
    """
    lock = Path(output_dir) / ".lock"
    with ExitStack() as stack:
        busy = [False]
        # Accelerate's states of a CPU's processes must be told that it is one; the `Accelerator` does so, later.
        if PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).is_main_process:
            lock.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
            try:
                stack.enter_context(locked(lock, wait=False))
            except BlockingIOError:
                busy = [True]
        if broadcast_object_list(busy)[0]:
            raise ValueError(
                f"`--output_dir {output_dir}` is in use by another run: wait for its end, or choose another."
            )
        remove_leftovers(output_dir)
        yield


class Processes:
    """What scripts for several processes do with them; sets `accelerator`."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        if accelerator.device.type == "cpu":
            use_all_cores()

    def print(self, text: str) -> None:
        """Once, and at once."""
        self.accelerator.print(text, flush=True)

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        if self.accelerator.num_processes == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.accelerator.device), "sum").to(tensor.device)


def add_hub_arguments(add: Callable[..., Any]) -> None:
    """Where the result is pushed to."""
    add("--push_to_hub", action="store_true")
    add("--hub_model_id", help="of the repository to push to; the name of --output_dir by default")
    add("--hub_token")


def push_to_hub(args: argparse.Namespace, scheduler: ODEScheduler, results: str, samples: Path) -> str:
    """Pushes `{output_dir}/scheduler` with a model card; returns the repository."""
    output_dir = Path(args.output_dir)
    repo_id, folder = args.hub_model_id or output_dir.name, output_dir / "scheduler"
    write_model_card(scheduler, folder, results=results, samples=samples)
    scheduler.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, token=args.hub_token)
    return repo_id


def pipeline_record(args: argparse.Namespace) -> dict[str, Any]:
    """What solvers record of the pipeline that they were made with; no path of this machine."""
    path = Path(args.pretrained_model_name_or_path)
    return {
        "teacher": path.name if path.is_dir() else str(path),
        "revision": args.revision,
        "torch_dtype": args.torch_dtype or "float32",
        "prompts_file": args.prompts_file and Path(args.prompts_file).name,
    }


def pipeline_name(args: argparse.Namespace) -> str:
    """What its samples depend on of where a pipeline comes from."""
    return f"{args.pretrained_model_name_or_path} {args.revision} {args.variant} {args.torch_dtype}"


def load_pipeline(args: argparse.Namespace, device: torch.device) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        dtype=getattr(torch, args.torch_dtype or "float32"),
    )
    scheduler_config(pipe)
    if args.enable_xformers_memory_efficient_attention:
        pipe.enable_xformers_memory_efficient_attention()
    if args.enable_model_cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def common_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What every call of the pipeline is given; defaults may lie beside the model as `pipeline_arguments.json`."""
    beside = Path(args.pretrained_model_name_or_path) / "pipeline_arguments.json"
    common = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    try:
        common |= dict(json.loads(args.pipeline_arguments))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`--pipeline_arguments {args.pipeline_arguments}` is not a JSON object: {error}.") from error
    if args.guidance_scale is not None:
        common.pop("guidance_scale", None)
        if len(args.guidance_scale) == 1:
            (common["guidance_scale"],) = args.guidance_scale
    return common


def sample_arguments(
    args: argparse.Namespace, pipe: DiffusionPipeline, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """What the samples' own arguments are, to be taken in turn; prompts may lie beside the model as `prompts.txt`."""
    path, beside = args.prompts_file, Path(args.pretrained_model_name_or_path) / "prompts.txt"
    if path is None and beside.is_file() and "prompt" not in common:
        path = str(beside)
    cycle = load_sample_inputs(pipe, path, common)
    several = args.guidance_scale is not None and len(args.guidance_scale) > 1
    return with_guidance_scales(cycle, args.guidance_scale) if several else cycle


def teacher_scheduler(args: argparse.Namespace, pipe: DiffusionPipeline) -> SchedulerMixin:
    """The teacher's scheduler."""
    if args.teacher_scheduler is not None:
        return load_scheduler(args.teacher_scheduler, pipe)
    return default_teacher(pipe)
