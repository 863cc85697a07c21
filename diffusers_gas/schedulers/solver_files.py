"""Learned parameters on disk: `{n}_steps.solver` beside a scheduler's config, one safetensors file per step count.

Names decide which files of a pipeline Diffusers downloads. A weight file in `scheduler/` makes it leave out the config, beside
`.bin` weights it leaves out all `*.safetensors`, and `variant=` fails on a name without a dot, also of a folder. It always
downloads files with another ending.

The config lists the step counts (`STEP_COUNTS`). Other solver files in the folder are what an earlier scheduler has left there.
Configs without the list are older: their files are `solver/{n}_steps.safetensors`.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.constants import REPO_ID_SEPARATOR
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from torch import Tensor

from ..utils.files import load_safetensors, save_safetensors


# Entry of a saved config. Diffusers' schedulers ignore entries that begin with an underscore.
STEP_COUNTS = "_solver_steps"
OLD_FOLDER = "solver"
METADATA_KEY = "diffusers_gas"
FILE_NAME, OLD_FILE_NAME = re.compile(r"([0-9]+)_steps\.solver"), re.compile(r"([0-9]+)_steps\.safetensors")
# The same for the Hub, of any folder. Its patterns have no repetition, and their * goes on into sub-folders.
SOLVER_FILE_PATTERNS = tuple(
    f"{start}{'[0-9]' * digits}_steps.{ending}"
    for start, ending in (("", "solver"), (f"{OLD_FOLDER}/", "safetensors"))
    for digits in range(1, 10)
)
# A solver of the most steps takes less.
LARGEST_FILE = 2**25


def save_solver_file(
    folder: str | os.PathLike, num_inference_steps: int, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Writes `{folder}/{n}_steps.solver`.

    Args:
        tensors: The learned parameters by name.
        record: What made them and what they belong to; anything JSON can hold, kept in the file's metadata.
    """
    save_safetensors(tensors, _solver_file(folder, num_inference_steps), {METADATA_KEY: json.dumps(record)})


def remove_other_solver_files(folder: str | os.PathLike, step_counts: set[int]) -> None:
    """Deletes solver files of step counts that the scheduler saved here does not have, and those with older names."""
    older = Path(folder) / OLD_FOLDER
    for num_inference_steps, path in _numbered_files(Path(folder), FILE_NAME).items():
        if num_inference_steps not in step_counts:
            path.unlink(missing_ok=True)
    for path in _numbered_files(older, OLD_FILE_NAME).values():
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it may not be empty
        older.rmdir()


def find_solver_files(folder: Path, config: Mapping[str, Any], **hub_kwargs: Any) -> dict[int, Path]:
    """The solver files that belong to the config of a local scheduler folder, by step count.

    What is missing in a snapshot of a Hub repository is downloaded, from the same commit.

    Args:
        hub_kwargs: `token`, `force_download` and `local_files_only`, as for `from_pretrained`.

    Raises:
        OSError: If there are not all files that the config lists.
    """
    if hasattr(diffusers, str(config.get("_class_name"))):
        return {}  # files of an earlier scheduler, and maybe a list that came with its config
    if STEP_COUNTS not in config:
        _download(folder, [f"{OLD_FOLDER}/*.safetensors"], **hub_kwargs)
        return _numbered_files(folder / OLD_FOLDER, OLD_FILE_NAME) | _numbered_files(folder, FILE_NAME)
    files = {n: _solver_file(folder, n) for n in config[STEP_COUNTS]}
    missing = [path.name for path in files.values() if not path.exists()]
    if missing:
        _download(folder, missing, **hub_kwargs)
        missing = [name for name in missing if not (folder / name).exists()]
    if missing:
        raise OSError(
            f"{folder} has no {', '.join(missing)}, which its {SCHEDULER_CONFIG_NAME} lists: fetch the whole folder again."
        )
    return files


def _solver_file(folder: str | os.PathLike, num_inference_steps: int) -> Path:
    return Path(folder) / f"{num_inference_steps}_steps.solver"


def _numbered_files(folder: Path, name: re.Pattern) -> dict[int, Path]:
    """Files by the number in their name. Raises an `OSError` if they cannot be listed."""
    # A broken link counts as a folder, so that listing it fails: the scheduler must not load as an untrained one.
    entries = sorted(folder.iterdir()) if os.path.lexists(folder) else []
    matches = [(name.fullmatch(path.name), path) for path in entries]
    return {int(match[1]): path for match, path in matches if match}


def _download(folder: Path, names: list[str], **hub_kwargs: Any) -> None:
    """Downloads files into a folder of the Hub's cache, `models--user--name/snapshots/commit/...`; does nothing elsewhere."""
    folder = folder.absolute()
    snapshot = next((path for path in (folder, *folder.parents) if path.parent.name == "snapshots"), None)
    if snapshot is None:
        return
    storage = snapshot.parent.parent
    repo_type, *repo_id = storage.name.split(REPO_ID_SEPARATOR)
    if repo_type != "models":
        return
    patterns = [Path(escape(str(folder.relative_to(snapshot))), name).as_posix() for name in names]
    settings = hub_kwargs | {"revision": snapshot.name, "cache_dir": storage.parent}
    try:
        snapshot_download("/".join(repo_id), allow_patterns=patterns, **settings)
    except OSError as error:
        raise OSError(
            f"{', '.join(names)} in {folder}: not all in the cache, and {'/'.join(repo_id)} cannot be reached: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_solver_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a solver file.

    Raises:
        ValueError: If it is not a solver file, or holds NaN or infinity. The message names the file.
    """
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} is no solver file: it has more than {LARGEST_FILE >> 20} MB.")
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
    inner = folder / (subfolder or "")
    return inner if (inner / SCHEDULER_CONFIG_NAME).is_file() else folder


def download_config(repo_id: str, subfolder: str | None = None, **hub_kwargs: Any) -> Path:
    """Downloads a scheduler's config from the Hub and returns its folder in the cache.

    Args:
        repo_id (`str`): The repository.
        subfolder (`str`, *optional*): Of the repository.
        hub_kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, as for `from_pretrained`.

    Raises:
        OSError: If there is no such repository, revision or scheduler, or the Hub cannot be reached and the cache does not
            have it.
    """
    try:
        return Path(hf_hub_download(repo_id, SCHEDULER_CONFIG_NAME, subfolder=subfolder, **hub_kwargs)).parent
    except (OSError, HFValidationError) as error:
        reason = _one_line(error)
        if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
            wanted = f"{subfolder}/{SCHEDULER_CONFIG_NAME}" if subfolder else SCHEDULER_CONFIG_NAME
            reason = f"it has no {wanted} (the scheduler of a pipeline needs `subfolder='scheduler'`)."
        raise OSError(
            f"{repo_id} is no folder here, and cannot be loaded from the Hub: {reason} Check the name and the connection; a "
            "private repository needs a `token`."
        ) from error
