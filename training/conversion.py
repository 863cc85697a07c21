"""What the converters in this folder share: output folders that appear complete or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: str) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `path` at the end; a `ValueError` if that has content already."""
    target = Path(path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`--output_dir {path}` exists already: choose another, or remove it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{target.name}.partial-", dir=target.parent) as partial:
        # A folder of its own inside, with the usual permissions.
        content = Path(partial) / "content"
        content.mkdir()
        yield content
        os.replace(content, target)
