"""Learned parameters on disk: `solver/{n}_steps.safetensors` beside a scheduler's config, one file per step count.

The files lie one level below the config because a weight file directly inside a pipeline's `scheduler/` folder breaks
`DiffusionPipeline.from_pretrained(repo_id)`: its download filter would take the folder for a model's.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


logger = logging.get_logger(__name__)

SOLVER_FOLDER = "solver"
METADATA_KEY = "diffusers_gas"
FILE_NAME = re.compile(r"(\d+)_steps\.safetensors")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `path` at the end: complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file that appears complete or not at all; an `OSError` if that fails, on a full disk say."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}).") from error


def save_solver_file(
    folder: str | os.PathLike, num_inference_steps: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Writes `{folder}/solver/{n}_steps.safetensors`.

    Args:
        tensors: The learned parameters by name.
        record: What made them and what they belong to; anything JSON can hold, kept in the file's metadata.
    """
    path = Path(folder) / SOLVER_FOLDER / f"{num_inference_steps}_steps.safetensors"
    save_safetensors(tensors, path, {METADATA_KEY: json.dumps(record)})


def remove_other_solver_files(folder: str | os.PathLike, step_counts: set[int]) -> None:
    """Deletes solver files of step counts that the scheduler saved here does not have."""
    for num_inference_steps, path in list_solver_files(folder).items():
        if num_inference_steps not in step_counts:
            path.unlink()


def list_solver_files(folder: str | os.PathLike) -> dict[int, Path]:
    """Solver files of a local scheduler folder by step count."""
    solver_folder = Path(folder) / SOLVER_FOLDER
    entries = sorted(solver_folder.iterdir()) if solver_folder.is_dir() else []
    matches = [(FILE_NAME.fullmatch(path.name), path) for path in entries]
    return {int(match[1]): path for match, path in matches if match}


def read_solver_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a solver file; a `ValueError` that names the file if it is not one or holds NaN or infinity."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
        record = json.loads(metadata[METADATA_KEY])
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}). Fetch or train it again.") from error
    except KeyError as error:
        raise ValueError(
            f"{path} is a safetensors file of something else: it has no '{METADATA_KEY}' record."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a damaged '{METADATA_KEY}' record ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} has a damaged '{METADATA_KEY}' record: expected an object, got {record!r}.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor '{name}' has NaN or infinite entries.")
    return tensors, record


def scheduler_folder(path: str | os.PathLike, subfolder: str | None = None) -> Path:
    """The folder that Diffusers takes a local scheduler's config from."""
    folder = Path(path)
    if folder.is_file():
        return folder.parent
    if (folder / SCHEDULER_CONFIG_NAME).is_file():
        return folder  # whatever the sub-folder
    return folder / (subfolder or "")


def download_scheduler(repo_id: str, subfolder: str | None = None, **hub_kwargs: Any) -> Path:
    """Downloads a scheduler's config and solver files, all of one commit, from the Hub and returns their folder.

    Args:
        repo_id (`str`): The repository.
        subfolder (`str`, *optional*): Of the repository.
        hub_kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, as for `from_pretrained`.

    Raises:
        OSError: If there is no such repository, revision or scheduler, or the Hub cannot be reached and the cache does not
            have all files.
    """
    prefix = f"{subfolder}/" if subfolder else ""
    wanted = [prefix + SCHEDULER_CONFIG_NAME, f"{prefix}{SOLVER_FOLDER}/*.safetensors"]
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=wanted, **hub_kwargs), prefix)
    except (OSError, HFValidationError) as error:
        raise OSError(
            f"{repo_id} is no folder here, and cannot be loaded from the Hub: {error}\nCheck the name and the connection; a "
            "private repository needs a `token`."
        ) from error
    if not (folder / SCHEDULER_CONFIG_NAME).is_file():
        raise OSError(
            f"{repo_id} has no {wanted[0]}, or the cache has none. The scheduler of a pipeline needs `subfolder='scheduler'`."
        )
    if not list_solver_files(folder):
        logger.warning(f"{repo_id} has no solver files, or the cache has none: its scheduler is an untrained one.")
    return folder
