"""Folders that are filled once, completely or not at all."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """Returns `folder`, which `make` fills the first time; an interrupted run leaves nothing behind.

    `make` gets an empty folder beside `folder`, which is renamed into place when it returns.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process was first, and its folder serves as well
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
