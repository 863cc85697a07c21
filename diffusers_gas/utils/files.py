"""Atomic writes, locks between processes, states of trainings, and safetensors files with a checksum and the tensors that are expected."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from uuid import uuid4

import torch
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor


CHECKSUM_KEY = "sha256"

# A pattern of the ends of temporary files' names.
PARTIAL = f".partial-{'[0-9a-f]' * 32}"

# A temporary file that has not changed for so long is taken for the remains of a killed writer.
LEFTOVER_SECONDS = 3600


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Writes a file, or a new folder, atomically: gives a temporary path to write to, which replaces `path` at the end.

    After an error `path` is as it was before. A folder must be new, or empty. Read what is to be written before entering, as
    every `OSError` inside is reported as an error of writing.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full. The message names `path`.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        synced_replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}).") from error
    finally:
        with suppress(OSError):
            _remove(partial)


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to write to. At the end its files replace the files of the same names in `folder`."""
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
                synced_replace(path, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def synced_replace(source: Path, target: Path) -> None:
    """Renames a file, as `os.replace`, so that after a power failure either file is there as a whole; or a folder."""
    if source.is_file():
        _sync(source)
    os.replace(source, target)
    with suppress(OSError):  # not every system can do this for folders
        _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """A temporary path beside `path`. It has a random name, because writers on several machines may share a folder."""
    return path.with_name(f"{path.name}.partial-{uuid4().hex}")


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Deletes the temporary files that killed writers left in a folder."""
    for path in Path(folder).glob(f"*{PARTIAL}"):
        with suppress(FileNotFoundError):  # another process may delete the same files
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def locked(lock_file: Path, *, wait: bool = True) -> Iterator[None]:
    """Excludes other processes, and other threads of this one, that lock the same file.

    The lock ends with its process. Nothing is locked where no file can be written, and on file systems without locks.

    Raises:
        BlockingIOError: If another has the lock and `wait` is off.
    """
    lock = FileLock(lock_file)
    with ExitStack() as stack:
        try:
            lock_file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.acquire(timeout=None if wait else 0))
        except Timeout as timeout:
            raise BlockingIOError(f"{lock_file} is locked.") from timeout
        except (OSError, NotImplementedError):
            pass
        yield


def lock_file_of(path: str | os.PathLike) -> Path:
    """The file that locks a folder. It lies in Hugging Face's cache: one who reads a folder leaves nothing in it.

    Few files serve for all folders. Two that share one wait for each other.
    """
    name = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:3]
    return Path(HF_HOME) / "diffusers_gas" / f"{name}.lock"


def read_text(path: Path) -> str:
    """The content of a file in UTF-8, with or without a byte-order mark, with its line ends; a `ValueError` for others."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Save it with the encoding UTF-8.") from error
    if "\0" in text:
        raise ValueError(f"{path} is not UTF-8 text: it has zero bytes. Save it with the encoding UTF-8.")
    return text


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_state(state: dict[str, Any], path: Path) -> None:
    """Writes the state of a training, of tensors and plain data, atomically.

    Raises:
        OSError: If it cannot be written. An earlier file stays.
    """
    for killed in path.parent.glob(f"{path.name}.partial-*"):  # such files are large, and no other run writes here
        killed.unlink(missing_ok=True)
    with replacing(path) as partial:
        try:
            torch.save(state, partial)
        except RuntimeError as error:  # PyTorch's writer raises this on a full disk
            raise OSError(str(error).partition("\n")[0]) from error


def load_state(path: Path) -> dict[str, Any]:
    """Reads what [`save_state`] has written. Nothing in the file runs.

    Raises:
        ValueError: If the file is damaged, or is none of those.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a readable checkpoint ({error}). Remove it to begin anew.") from error


def save_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file atomically, with a checksum of its tensors and metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(tensors, partial, {**metadata, CHECKSUM_KEY: checksum(tensors, metadata)})


def load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file, with or without a checksum.

    Raises:
        ValueError: If the file cannot be read, or its content does not match its checksum.
    """
    try:
        if not path.is_file():  # reading a pipe could block forever
            raise OSError("there is no such file")
        # The file is not mapped into memory, because another process may overwrite it while the tensors are in use.
        content = path.read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}). Fetch or make it again.") from error
    metadata = header.get("__metadata__") or {}
    expected = metadata.pop(CHECKSUM_KEY, None)
    if expected is not None and expected != checksum(tensors, metadata):
        raise ValueError(
            f"{path} is damaged: its content does not match its checksum. Fetch or make it again. If it was changed on "
            f"purpose, remove '{CHECKSUM_KEY}' from its metadata."
        )
    return tensors, metadata


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor | Sequence[int]]) -> None:
    """Raises a `ValueError` that names what is missing, unexpected, or not of the expected shape (and, of a tensor, dtype)."""
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(f"missing tensors {missing}, unexpected tensors {unexpected}.")
    for name, like in expected.items():
        tensor, shape = tensors[name], tuple(like.shape if isinstance(like, Tensor) else like)
        if tensor.shape != shape:
            raise ValueError(f"'{name}' should be of shape {shape}, got {tuple(tensor.shape)}.")
        if isinstance(like, Tensor) and tensor.dtype != like.dtype:
            raise ValueError(f"'{name}' should be {like.dtype}, got {tensor.dtype}.")


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Checksum of a file's content, not of its bytes, because safetensors writes metadata in random order."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
