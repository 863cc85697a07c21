"""What the scripts in this folder share: which pipeline, how it is called, and arguments from YAML files."""

import argparse
import json
import sys
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_gas.oracle import scheduler_config


TEACHERS = Path(__file__).resolve().parent.parent / "examples" / "teachers"


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pipeline, and how it is called."""
    add = parser.add_argument
    add("--config", help="YAML file with any of these arguments; those on the command line win")
    add("--pretrained_model_name_or_path", help="the model: a folder or a Hub id")
    shipped = sorted(path.parent.name for path in TEACHERS.glob("*/model_index.json"))
    add("--teacher", default="digits", choices=shipped, help="a model of this repository instead")
    add("--revision", help="of the Hub repository")
    add("--variant", help="of the weights, e.g. fp16")
    add("--torch_dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    add("--prompts_file", help="one prompt a line; in a .jsonl file one object of pipeline arguments a line")
    add("--guidance_scale", type=float)
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
        values = [json.dumps(value)] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


def load_pipeline(args: argparse.Namespace, device: torch.device) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        dtype=getattr(torch, args.torch_dtype),
    )
    scheduler_config(pipe)
    return pipe.to(device)


def common_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What every call of the pipeline is given."""
    try:
        common = dict(json.loads(args.pipeline_arguments))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`--pipeline_arguments {args.pipeline_arguments}` is not a JSON object: {error}.") from error
    if args.guidance_scale is not None:
        common["guidance_scale"] = args.guidance_scale
    return common
