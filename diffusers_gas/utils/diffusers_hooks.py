"""Everything private of Diffusers that this package relies on, each with the reason. An upgrade of Diffusers is checked here.

Beside the names below, classes of this package set `_compatibles`, `_keep_in_fp32_modules` and `_no_split_modules`, as those of
Diffusers do. `EDMPipeline` reads its own `_execution_device`, and `as_grid` recognises pipelines that pack their latents by
`_pack_latents`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

from .files import PARTIAL


# Entry of a config with the names of the settings that nobody set. `from_config` takes the new class's defaults for them.
DEFAULT_VALUES = "_use_default_values"


class HookedSchedulerMixin(SchedulerMixin, ConfigMixin):
    """A scheduler with a private step of Diffusers as a method to override: uploading a folder.

    Attributes:
        uploaded_files: Patterns of names, in the folder of the scheduler. An upload deletes such files in the Hub repository that
            are not in the uploaded folder.
    """

    uploaded_files: tuple[str, ...] = ()

    def prepare_upload(self, folder: Path, repo_id: str, token: str | bool | None) -> list[str]:
        """Called with every folder that is about to be uploaded to the top level of a Hub repository.

        Returns:
            `list[str]`: Patterns of names that the upload leaves out.
        """
        return []

    def _upload_folder(self, working_dir: Any, repo_id: str, *, subfolder: str | None = None, **settings: Any) -> Any:
        # `save_pretrained(push_to_hub=True)` and `push_to_hub` both end here, and nowhere else. Diffusers' method cannot delete.
        left_out = [f"*{PARTIAL}*"]
        if not subfolder:  # what lies in a sub-folder of a repository is a part of something else
            left_out += self.prepare_upload(Path(working_dir), repo_id, settings.get("token"))
        settings["commit_message"] = settings.get("commit_message") or "Upload scheduler"
        settings |= {"delete_patterns": list(self.uploaded_files), "ignore_patterns": left_out}
        return upload_folder(repo_id=repo_id, folder_path=working_dir, path_in_repo=subfolder, **settings)


def register_package(name: str) -> None:
    """Lets Diffusers download pipelines with components of a package, which must be importable under this name.

    Without it `DiffusionPipeline.from_pretrained` refuses to download a pipeline with a component of an unknown library. The
    package must expose the base classes `ModelMixin` and `SchedulerMixin`, where Diffusers looks up how to load a component.
    """
    LOADABLE_CLASSES[name] = {
        base: ["save_pretrained", "from_pretrained"] for base in ("ModelMixin", "SchedulerMixin")
    }


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
                raise ValueError(f"Weight {name} of {type(network).__name__} is on the meta device: it has no value.")
            tensor = found[0]
        yield name, tensor.detach()


def has_feature_caches(networks: Iterable[nn.Module]) -> bool:
    """Whether Diffusers' caches keep features of networks (`enable_cache`), so that outputs depend on earlier evaluations."""
    hooks: list[Any] = [hook for registry in _hook_registries(networks) for hook in registry.hooks.values()]
    return any(hook._is_stateful for hook in hooks)


def reset_feature_caches(networks: Iterable[nn.Module]) -> None:
    """Makes the next evaluation the first of a sampling, as Diffusers does at the end of a pipeline's call."""
    for registry in _hook_registries(networks):
        registry.reset_stateful_hooks(recurse=False)


@contextmanager
def without_feature_caches(networks: Iterable[Any]) -> Iterator[None]:
    """Inside, feature caches are switched off. A `ValueError` says which cannot be."""
    cached = [network for network in networks if has_feature_caches([network])]
    if not all(getattr(network, "is_cache_enabled", False) for network in cached):
        raise ValueError(
            "The teacher samples without feature caches, and only those that `enable_cache` of a network has switched on can be "
            "switched off."
        )
    configs = [network._cache_config for network in cached]
    for network in cached:
        network.disable_cache()
    try:
        yield
    finally:
        for network, config in zip(cached, configs):
            network.enable_cache(config)


def _hook_registries(networks: Iterable[nn.Module]) -> list[Any]:
    found = [getattr(module, "_diffusers_hook", None) for network in networks for module in network.modules()]
    return [registry for registry in found if registry is not None]


def can_repeat_blocks(network: nn.Module) -> bool:
    """Whether a network of Diffusers can repeat its blocks in the backward pass. Others raise an error when asked to."""
    return isinstance(network, ModelMixin) and network._supports_gradient_checkpointing
