"""Training states on disk. Files appear complete or not at all, and reading them runs no code."""

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..utils.files import replacing


class Checkpoints:
    """The checkpoints of one training in a folder, `checkpoint-{step}.pt`.

    Args:
        folder: The folder.
        total_limit: How many checkpoints to keep; all by default.
    """

    def __init__(self, folder: str | os.PathLike, total_limit: int | None = None):
        self.folder, self.total_limit = Path(folder), total_limit

    def paths(self) -> list[Path]:
        """The checkpoints in the folder, the oldest first."""
        steps = {path: path.stem.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*.pt")}
        return sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes the state after a number of steps, then removes the oldest checkpoints beyond the limit.

        Raises:
            OSError: If the checkpoint cannot be written. Earlier checkpoints stay.
        """
        path = self.folder / f"checkpoint-{step}.pt"
        for killed in self.folder.glob("checkpoint-*.partial-*"):  # such files are large, and no other run writes here
            killed.unlink(missing_ok=True)
        with replacing(path) as partial:
            try:
                torch.save(state, partial)
            except RuntimeError as error:  # PyTorch's writer raises this on a full disk
                raise OSError(str(error).partition("\n")[0]) from error
        if self.total_limit is not None:
            for old in self.paths()[: -self.total_limit]:
                old.unlink(missing_ok=True)
        return path

    def clear(self) -> None:
        """Removes all checkpoints."""
        for path in self.paths():
            path.unlink(missing_ok=True)

    def load(self, which: str) -> dict[str, Any]:
        """Reads a state: that of `"latest"`, of a file in the folder, or of a path.

        Raises:
            ValueError: If there is no such checkpoint, or if the file is damaged or is not a checkpoint.
        """
        paths = self.paths()
        if which == "latest" and not paths:
            raise ValueError(f"There is no checkpoint in {self.folder} to resume from.")
        path = paths[-1] if which == "latest" else self.folder / which
        path = path if path.exists() else Path(which)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            names = [existing.name for existing in paths]
            raise ValueError(f"There is no checkpoint {path}; {self.folder} has {names}.") from error
        except (RuntimeError, EOFError, UnpicklingError, ValueError, KeyError) as error:
            raise ValueError(
                f"{path} is not a readable checkpoint ({error}). Resume from an earlier one, or remove it."
            ) from error
