"""Settings of the command lines: dataclasses whose fields are the arguments, on the command line or in a YAML file."""

import argparse
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
import yaml
from diffusers import DiffusionPipeline, SchedulerMixin
from huggingface_hub import auth_check, create_repo

from ..papers.edm.pipeline import EDMPipeline
from ..pipelines.driving import scheduler_config
from ..pipelines.inputs import SampleInputs, load_sample_inputs
from ..pipelines.named_schedulers import load_scheduler
from ..pipelines.teacher import default_teacher
from ..utils.files import read_text
from .processes import process_state


# What a switch may be in a YAML file.
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def at_least_0(text: str, least: int = 0) -> int:
    """A whole number of at least 0, for `argparse`."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
    return int(text)


def at_least_1(text: str) -> int:
    """A whole number of at least 1, for `argparse`."""
    return at_least_0(text, least=1)


# Types of settings. An `int` is at least 1 if its default is.
AtLeast0 = Annotated[int, at_least_0]
AtLeast1 = Annotated[int, at_least_1]


def parse(
    settings_class: type,
    description: str | None,
    arguments: list[str] | None = None,
    model: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The settings that are given on the command line or in the file of `--config`; the command line wins.

    Transformers' `HfArgumentParser` would be an optional dependency, and leaves the types of a YAML file as they are.

    Args:
        settings_class: A dataclass whose fields all have defaults.
        description: A text whose first line is that of the help text.
        arguments: The words of the command line; those of the process by default.
        model: The settings of the model that is used if none is named.

    Returns:
        `dict[str, Any]`: Keyword arguments for `settings_class`. Settings that are not given are left out.
    """
    first_line = (description or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=first_line, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", help="YAML file with any of these arguments; those on the command line win")
    settings = add_settings(parser, settings_class)
    is_switch = {name: isinstance(setting.default, bool) for name, setting in settings.items()}
    given = vars(parser.parse_args(arguments))
    config = given.pop("config", None)
    if config is not None:
        given = {**vars(parser.parse_args(read_config(config, is_switch))), **given}
    return given if "pretrained_model_name_or_path" in given else {**(model or {}), **given}


def add_settings(parser: argparse.ArgumentParser, settings_class: type) -> dict[str, Field]:
    """Adds arguments for the fields of a dataclass, and returns these by name.

    The class and each of its bases is a group of arguments. The group's title is the first line of the docstring, whose `Args` are
    the help. Annotations say the types; the metadata of a field may have further options of `add_argument`.
    """
    texts: dict[str, str] = {}
    groups: dict[str, Any] = {}
    for base in filter(is_dataclass, reversed(settings_class.__mro__)):
        texts |= help_texts(base)
        group = parser.add_argument_group(str(base.__doc__).partition("\n")[0].rstrip("."))
        groups = {setting.name: group for setting in fields(base)} | groups
    settings = {setting.name: setting for setting in fields(settings_class)}
    for name, setting in settings.items():
        groups[name].add_argument(
            f"--{name}", **{"help": texts.get(name, "") + _default_text(setting), **_options(setting)}
        )
    return settings


def help_texts(settings_class: type) -> dict[str, str]:
    """What the `Args` of a docstring say of each setting."""
    _, _, arguments = inspect.cleandoc(str(settings_class.__doc__)).partition("\nArgs:\n")
    entries = re.findall(r"^    (\w[\w, ]*): (.+(?:\n {8}.+)*)", arguments, re.MULTILINE)
    return {name: " ".join(text.split()).replace("%", "%%") for names, text in entries for name in names.split(", ")}


def _default_text(setting: Field) -> str:
    """The default of a setting as on the command line, in parentheses, if there is one."""
    if setting.default in (None, MISSING, ""):
        return ""
    words = setting.default if isinstance(setting.default, tuple) else (setting.default,)
    return f" (default: {' '.join(map(str, words))})"


def _options(setting: Field) -> dict[str, Any]:
    """Arguments of `add_argument` for a setting."""
    if isinstance(setting.default, bool):
        return {"action": argparse.BooleanOptionalAction, **setting.metadata}
    options: dict[str, Any] = {"required": setting.default is MISSING}
    kind: Any = setting.type
    if get_origin(kind) in (Union, UnionType):
        kind = get_args(kind)[0]  # the other one is `None`
    if get_origin(kind) is Sequence:
        options["nargs"], kind = "+", get_args(kind)[0]
    if get_origin(kind) is Literal:
        options["choices"] = get_args(kind)
    elif get_origin(kind) is Annotated:
        options["type"] = kind.__metadata__[0]
    else:
        options["type"] = at_least_1 if kind is int and setting.default not in (0, None, MISSING) else kind
    return {**options, **setting.metadata}


def read_config(path: str, is_switch: Mapping[str, bool]) -> list[str]:
    """The arguments in a YAML file, as words of a command line. Arguments without a value (`null`) are left out.

    Text and numbers arrive as they are written, as on a command line: `revision: 0123` is a name and not 83.

    Args:
        path: The file.
        is_switch: The names of all arguments, and whether they are switches, `--name` or `--no-name`.
    """
    try:
        config = yaml.load(read_text(Path(path)), yaml.BaseLoader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not a YAML file: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold arguments and their values.")
    unknown = sorted(config.keys() - is_switch.keys())
    if unknown:
        raise ValueError(f"{path} has unknown arguments {unknown}; `--help` lists the known ones.")
    words: list[str] = []
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, str) for entry in values):
            raise ValueError(f"{path}: `{name}` must be text, a number or a list of them. Put JSON in quotes.")
        if value in ("", "~", "null"):
            continue
        if is_switch[name]:
            if isinstance(value, list) or value.lower() not in SWITCHES:
                raise ValueError(f"{path}: `{name}` must be true or false, got {', '.join(values)!r}.")
            words.append(f"--{name}" if SWITCHES[value.lower()] else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *values]
        else:
            words.append(f"--{name}={value}")  # the value may begin with a dash
    return words


@dataclass
class PipelineSettings:
    """The pipeline and the arguments of its calls.

    Args:
        pretrained_model_name_or_path: The model: a folder or a Hub id.
        revision: Of the Hub repository.
        variant: Of the weights, e.g. fp16.
        torch_dtype: Of the weights; float32 by default.
        trust_remote_code: Run the code of pipelines and networks that the model brings with it.
        enable_model_cpu_offload: Keep networks on the CPU while they are not used.
        prompts_file: A .txt file with one prompt a line, or a .jsonl file with one object of pipeline arguments a line.
        guidance_scale: Several, e.g. 2 3 4.5 6.7 10, are for solvers of the whole range; samples take them in turn.
        pipeline_arguments: Further arguments of every pipeline call, as JSON.
    """

    pretrained_model_name_or_path: str = ""
    revision: str | None = None
    variant: str | None = None
    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    trust_remote_code: bool = False
    enable_model_cpu_offload: bool = False
    prompts_file: str | None = None
    guidance_scale: Sequence[float] | None = None
    pipeline_arguments: str = "{}"

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise ValueError(
                "Pass `--pretrained_model_name_or_path` with a folder or a Hub id. Only the scripts of the repository work without, "
                "on its models."
            )

    @property
    def pipeline_name(self) -> str:
        """The settings that determine the pipeline's weights, as long as the content behind a name stays the same."""
        return f"{self.pretrained_model_name_or_path} {self.revision} {self.variant} {self.torch_dtype}"

    def provenance(self) -> dict[str, Any]:
        """What solvers record of these settings beside the pipeline itself, without local paths."""
        return {"revision": self.revision, "prompts_file": self.prompts_file and Path(self.prompts_file).name}

    def load_pipeline(self, device: torch.device) -> DiffusionPipeline:
        name, revision = self.pretrained_model_name_or_path, self.revision
        saved = DiffusionPipeline.load_config(name, revision=revision).get("_class_name")
        pipeline_class = EDMPipeline if saved == EDMPipeline.__name__ else DiffusionPipeline
        options = {"dtype": getattr(torch, self.torch_dtype or "float32"), "trust_remote_code": self.trust_remote_code}
        pipe = pipeline_class.from_pretrained(name, revision=revision, variant=self.variant, **options)
        scheduler_config(pipe)  # refuses a pipeline without a scheduler
        if not self.enable_model_cpu_offload:
            return pipe.to(device)
        pipe.enable_model_cpu_offload(device=device)
        return pipe

    def sample_inputs(self, pipe: DiffusionPipeline, first_seed: int, num_samples: int) -> SampleInputs:
        """The samples of consecutive seeds. Defaults may lie beside the model: `pipeline_arguments.json`, `prompts.txt`."""
        folder = Path(self.pretrained_model_name_or_path)
        defaults, prompts = folder / "pipeline_arguments.json", self.prompts_file
        common = json.loads(defaults.read_text(encoding="utf-8")) if defaults.is_file() else {}
        try:
            given = dict(json.loads(self.pipeline_arguments))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`--pipeline_arguments {self.pipeline_arguments}` is not a JSON object: {error}."
            ) from error
        if self.guidance_scale is not None:
            several = len(self.guidance_scale) > 1
            given["guidance_scale"] = list(self.guidance_scale) if several else self.guidance_scale[0]
        common |= given
        if prompts is None and "prompt" not in common and (folder / "prompts.txt").is_file():
            prompts = str(folder / "prompts.txt")
        cycle = load_sample_inputs(pipe, prompts, common)
        if twice := sorted(given.keys() & cycle[0].keys()):
            raise ValueError(f"{prompts} has {twice}, and so has the command line: give them once.")
        return SampleInputs.create(first_seed, num_samples, cycle, **common)


@dataclass
class TeacherSettings:
    """How the teacher samples.

    Args:
        teacher_scheduler: A Diffusers class, with settings as in Class:name=value, or a folder; by default DPM-Solver++ 2M, or Euler
            for flow matching.
        teacher_num_inference_steps: Its number of steps.
    """

    teacher_scheduler: str | None = None
    teacher_num_inference_steps: int = 50

    def load_teacher(self, pipe: DiffusionPipeline) -> SchedulerMixin:
        name = self.teacher_scheduler
        return default_teacher(pipe) if name is None else load_scheduler(name, pipe)


@dataclass
class HubSettings:
    """Where the result is pushed to.

    Args:
        push_to_hub: Push it.
        hub_model_id: Of the repository to push to; the name of --output_dir by default.
    """

    push_to_hub: bool = False
    hub_model_id: str | None = None

    def create_repository(self, output_dir: Path) -> None:
        """Creates the repository if the result is to be pushed, and fills in its whole name.

        What the Hub refuses is to be known before the work.

        Raises:
            OSError: If the Hub does not let us.
        """
        if self.push_to_hub and process_state().is_main_process:
            name = self.hub_model_id or output_dir.resolve().name
            try:
                self.hub_model_id = create_repo(name, exist_ok=True).repo_id
                auth_check(self.hub_model_id, write=True)  # one that exists may be another's, or the token for reading
            except Exception as error:  # of the connection, too
                advice = "Log in with `hf auth login`, choose another `--hub_model_id`, or push later, without `--push_to_hub` now."
                raise OSError(f"The Hub does not give a repository {name} to push to: {error} {advice}") from error
