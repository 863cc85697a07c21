"""Everything private of Diffusers that this package relies on, each with the reason. An upgrade of Diffusers is checked here.

Beside the names below, classes of this package set `_compatibles`, `_keep_in_fp32_modules` and `_no_split_modules`, as those of
Diffusers do. `EDMPipeline` reads its own `_execution_device`, and `as_grid` recognises pipelines that pack their latents by
`_pack_latents`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

# The zero-terminal-SNR rescaling of alphas_cumprod. The other schedulers of Diffusers have it for betas only.
from diffusers.schedulers.scheduling_ddim_cogvideox import rescale_zero_terminal_snr as rescale_zero_terminal_snr

# The published sigmas of Align Your Steps, which no public function returns.
from diffusers.schedulers.scheduling_utils import AysSchedules as AysSchedules

# The names of the schedulers that Diffusers calls compatible with each other.
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers as KarrasDiffusionSchedulers
from huggingface_hub import upload_folder
from safetensors import safe_open
from torch import Tensor, nn


# Entry of a config with the names of the settings that nobody set.
DEFAULT_VALUES = "_use_default_values"

# The code of every function that is decorated with `torch.no_grad()` or `torch.inference_mode()`. It calls `func` with `args` and
# `kwargs`.
_NO_GRAD_CODE = torch.no_grad()(lambda: None).__code__


class HookedSchedulerMixin(SchedulerMixin, ConfigMixin):
    """A scheduler with two private steps of Diffusers as methods to override: reading a config file and uploading a folder.

    Attributes:
        uploaded_files: Patterns of names, in the folder of the scheduler. An upload deletes such files in the Hub repository that
            are not in the uploaded folder.
    """

    uploaded_files: tuple[str, ...] = ()

    @classmethod
    def checked_config(cls, json_file: Path, config: Any) -> dict[str, Any]:
        """What is to be used of the content of a config file. A `ValueError` refuses the content."""
        return config

    def prepare_upload(self, folder: Path, repo_id: str, token: str | bool | None) -> None:
        """Called with every folder that is about to be uploaded to the top level of a Hub repository."""

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        # `ConfigMixin.load_config` reads local and downloaded files with this. It checks nothing, and goes on with a
        # string, say, as the name of a repository.
        try:
            config = super()._dict_from_json_file(json_file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{json_file} is not a valid JSON file ({error}).") from error
        return cls.checked_config(Path(json_file), config)

    def _upload_folder(
        self,
        working_dir: Any,
        repo_id: str,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> Any:
        # `save_pretrained(push_to_hub=True)` and `push_to_hub` both end here, and nowhere else. Diffusers' method cannot delete.
        if not subfolder:  # what lies in a sub-folder of a repository is a part of something else
            self.prepare_upload(Path(working_dir), repo_id, token)
        return upload_folder(
            repo_id=repo_id,
            folder_path=working_dir,
            path_in_repo=subfolder,
            token=token,
            commit_message=commit_message or "Upload scheduler",
            create_pr=create_pr,
            delete_patterns=list(self.uploaded_files),
        )


def register_package(name: str) -> None:
    """Lets Diffusers download pipelines with components of a package, which must be importable under this name.

    Without it `DiffusionPipeline.from_pretrained` refuses to download a pipeline with a component of an unknown library. The
    package must expose the base classes `ModelMixin` and `SchedulerMixin`, where Diffusers looks up how to load a component.
    """
    LOADABLE_CLASSES[name] = {
        base: ["save_pretrained", "from_pretrained"] for base in ("ModelMixin", "SchedulerMixin")
    }


def default_values(config: Mapping[str, Any]) -> list[str]:
    """The settings of a config that nobody set. `from_config` takes the new class's defaults for them."""
    return list(config.get(DEFAULT_VALUES, ()))


def with_default_values(config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """A config in which exactly these settings count as set by nobody."""
    return {**config, DEFAULT_VALUES: names}


def progress_bar_config(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What `set_progress_bar_config` was given, to restore it. There is a public setter only."""
    return dict(getattr(pipe, "_progress_bar_config", {}))


def differentiable_call(pipe: DiffusionPipeline) -> Any:
    """The function `__call__` of a pipeline without its decorator `torch.no_grad()`.

    Raises:
        ValueError: If it is not decorated, or in another way.
    """
    call = getattr(type(pipe).__call__, "__wrapped__", None)
    if call is None:
        raise ValueError(f"{type(pipe).__name__}.__call__ is not decorated with `torch.no_grad()`: cannot undo it.")
    return call


def stored_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a network's weights, wherever offloading keeps them meanwhile.

    Raises:
        ValueError: If a weight has no value.
    """
    on_disk: dict[int, tuple[str, str]] = {}
    for module in network.modules():
        # Diffusers' group offloading leaves tensors without content where it has written them to a file.
        hooks: Any = getattr(module, "_diffusers_hook", None)
        group = getattr(hooks and hooks.get_hook("group_offloading"), "group", None)
        path = getattr(group, "safetensors_file_path", None)
        if group is not None and path is not None:
            on_disk |= {id(tensor): (path, key) for tensor, key in group.tensor_to_key.items()}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) in on_disk:
            path, key = on_disk[id(tensor)]
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor(key)
        elif tensor.is_meta:
            module_name, _, own_name = name.rpartition(".")
            hook = getattr(network.get_submodule(module_name), "_hf_hook", None)  # of Accelerate, one or several
            maps = [getattr(one, "weights_map", None) for one in getattr(hook, "hooks", [hook])]
            found = [weights[own_name] for weights in maps if weights is not None]
            if not found:
                raise ValueError(
                    f"The weight {name} of {type(network).__name__} is on the meta device: it has no value."
                )
            tensor = found[0]
        yield name, tensor.detach()


def can_repeat_blocks(network: nn.Module) -> bool:
    """Whether a network of Diffusers can repeat its blocks in the backward pass. Others raise an error when asked to."""
    return isinstance(network, ModelMixin) and network._supports_gradient_checkpointing


class PipelineCall(NamedTuple):
    """A call of a pipeline that is running.

    Attributes:
        pipe: The pipeline.
        arguments: What it was given, by name, without `None`.
        defaults: What it uses for the parameters that it was not given.
    """

    pipe: DiffusionPipeline
    arguments: dict[str, Any]
    defaults: dict[str, Any]


def pipeline_call(scheduler: SchedulerMixin) -> PipelineCall | None:
    """The innermost running call of a pipeline that has this scheduler or makes copies of it; `None` outside of calls.

    A pipeline may replace its arguments before it passes them on, and may call another, or the class that it extends. What was
    passed is known to the decorator `torch.no_grad()` of every `__call__`, and is read there. The local variables of the
    pipeline itself are not touched: Python would keep what the pipeline deletes of them.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _NO_GRAD_CODE:
            function, args, kwargs = (frame.f_locals[name] for name in ("func", "args", "kwargs"))
            pipe = args[0] if args else None
            is_call = isinstance(pipe, DiffusionPipeline) and getattr(function, "__name__", "") == "__call__"
            if is_call and any(isinstance(value, type(scheduler)) for value in vars(pipe).values()):
                return _call_of(function, args, kwargs)
        frame = frame.f_back
    return None


def _call_of(function: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PipelineCall:
    parameters = inspect.signature(function).parameters
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, parameter in parameters.items() if parameter.kind in by_position]
    passed = {**dict(zip(names, args)), **kwargs}
    defaults = {name: p.default for name, p in parameters.items() if name not in passed and p.default is not p.empty}
    return PipelineCall(args[0], {name: value for name, value in passed.items() if value is not None}, defaults)
