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
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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
    """Writes a safetensors file that appears complete or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=dict(metadata))


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


def fetch_solver_folder(
    pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **hub_kwargs: Any
) -> Path:
    """The local folder of a scheduler with its solver files, downloaded first if a Hub repository is meant.

    `hub_kwargs` are those of `from_pretrained`: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.
    """
    subfolder = subfolder or ""
    folder = Path(pretrained_model_name_or_path)
    if folder.is_file():
        return folder.parent
    if (folder / SCHEDULER_CONFIG_NAME).is_file():
        return folder  # where Diffusers looks first, too
    if not folder.is_dir():
        pattern = "/".join(part for part in (subfolder, SOLVER_FOLDER, "*.safetensors") if part)
        folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=[pattern], **hub_kwargs))
    return folder / subfolder
