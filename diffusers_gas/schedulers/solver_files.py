"""Learned parameters on disk: `solver/{n}_steps.safetensors` beside a scheduler's config, one file per step count.

The files lie one level below the config because a weight file directly inside a pipeline's `scheduler/` folder breaks
`DiffusionPipeline.from_pretrained(repo_id)`: its download filter would take the folder for a model's.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor


logger = logging.get_logger(__name__)

SOLVER_FOLDER = "solver"
METADATA_KEY = "diffusers_gas"
CHECKSUM_KEY = "sha256"
FILE_NAME = re.compile(r"([0-9]+)_steps\.safetensors")

# A writer that is alive changes its temporary file more often than that.
LEFTOVER_SECONDS = 3600


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of `path` at the end: complete or not at all.

    Raises:
        OSError: If something cannot be written, on a full disk say; it names `path`, where everything stays as it was.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}).") from error
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files at the end, when all are complete, take the places of those in `folder`."""
    remove_leftovers(folder)
    partial = partial_path(folder / "new")
    try:
        partial.mkdir()
        yield partial
        for path in sorted(partial.rglob("*")):
            target = folder / path.relative_to(partial)
            if path.is_dir():
                target.mkdir(exist_ok=True)
            else:
                os.replace(path, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_path(path: Path) -> Path:
    """A temporary path beside another, of this writer alone: processes of several machines may have the same number."""
    return path.with_name(f"{path.name}.partial-{uuid4().hex}")


def remove_leftovers(folder: str | os.PathLike, name: str | None = None) -> None:
    """Deletes from a folder what writers have left that were killed, under one name or all."""
    pattern = "*" if name is None else escape(name)
    for path in Path(folder).glob(f"{pattern}.partial-{'[0-9a-f]' * 32}"):
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def locked(path: str | os.PathLike, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Has a folder or a file for itself among all that ask like this, or with `shared` together with others that do.

    It is the system's lock, which ends with its process, killed or not. Where there is none, as on Windows, on some network
    file systems, or because nothing is at the path, nobody is kept out.

    Raises:
        BlockingIOError: If another has it and `wait` is off.
    """
    try:
        import fcntl

        # Network file systems lock for writing only what is open for that.
        descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    except (ImportError, OSError):
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if isinstance(error, BlockingIOError):
                raise
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough if another thread has forked meanwhile
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that appears complete or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file that appears complete or not at all, with a checksum of tensors and metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(tensors, partial, {**metadata, CHECKSUM_KEY: checksum(tensors, metadata)})


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, which need not have a checksum.

    Raises:
        ValueError: If it cannot be read or is not what was written.
    """
    try:
        if not path.is_file():  # a pipe would never end
            raise OSError("there is no such file")
        # Memory that is mapped to the file would change with it, or be gone.
        content = path.read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}). Fetch or make it again.") from error
    metadata = header.get("__metadata__") or {}
    expected = metadata.pop(CHECKSUM_KEY, None)
    if expected is not None and expected != checksum(tensors, metadata):
        raise ValueError(
            f"{path} is damaged: its checksum is that of other contents. Fetch or make it again; if it was changed on "
            f"purpose, leave out '{CHECKSUM_KEY}' of its metadata."
        )
    return tensors, metadata


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of what a file holds; its bytes may differ, as safetensors orders metadata at random."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
    """Solver files of a local scheduler folder by step count; an `OSError` if they cannot be listed."""
    solver_folder = Path(folder) / SOLVER_FOLDER
    # A link that leads nowhere is there: without its solvers the scheduler would pass for an untrained one.
    entries = sorted(solver_folder.iterdir()) if os.path.lexists(solver_folder) else []
    matches = [(FILE_NAME.fullmatch(path.name), path) for path in entries]
    return {int(match[1]): path for match, path in matches if match}


def read_solver_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and record of a solver file; a `ValueError` that names the file if it is not one or holds NaN or infinity."""
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
