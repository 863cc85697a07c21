"""Learned parameters on disk: `solver/{n}_steps.safetensors` beside a scheduler's config, one file per step count.

The files lie one level below the config because a weight file directly inside a pipeline's `scheduler/` folder breaks
`DiffusionPipeline.from_pretrained(repo_id)`: its download filter would take the folder for a model's.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor

from ..utils.files import load_safetensors, save_safetensors


logger = logging.get_logger(__name__)

SOLVER_FOLDER = "solver"
METADATA_KEY = "diffusers_gas"
FILE_NAME = re.compile(r"([0-9]+)_steps\.safetensors")


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
            path.unlink(missing_ok=True)


def list_solver_files(folder: str | os.PathLike) -> dict[int, Path]:
    """Solver files of a local scheduler folder by step count. Raises an `OSError` if they cannot be listed."""
    solver_folder = Path(folder) / SOLVER_FOLDER
    # A broken link counts as a folder, so that listing it fails: the scheduler must not load as an untrained one.
    entries = sorted(solver_folder.iterdir()) if os.path.lexists(solver_folder) else []
    matches = [(FILE_NAME.fullmatch(path.name), path) for path in entries]
    return {int(match[1]): path for match, path in matches if match}


def read_solver_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a solver file.

    Raises:
        ValueError: If it is not a solver file, or holds NaN or infinity. The message names the file.
    """
    tensors, metadata = load_safetensors(path)
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} is a safetensors file of something else: it has no '{METADATA_KEY}' record.")
    try:
        record = json.loads(metadata[METADATA_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged '{METADATA_KEY}' record ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} has a damaged '{METADATA_KEY}' record: expected an object, got {record!r:.100}.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor '{name}' has NaN or infinite entries.")
    return tensors, record


def scheduler_folder(path: str | os.PathLike, subfolder: str | None = None) -> Path:
    """The folder from which Diffusers reads the config of a local scheduler."""
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
