"""What the converters in this folder share: output folders that appear complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..utils.files import partial_path, remove_leftovers


@contextmanager
def new_folder(path: str) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `path` at the end; a `ValueError` if that has content already."""
    target = Path(path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`--output_dir {path}` exists already: choose another, or remove it.")
    remove_leftovers(target.parent, target.name)
    partial = partial_path(target)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
