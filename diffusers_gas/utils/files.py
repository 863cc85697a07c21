"""Files that appear complete or not at all, locks between processes, and safetensors files with a checksum."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor


CHECKSUM_KEY = "sha256"

# A temporary file that has not changed for this long has no living writer.
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
