"""Where the benchmarks keep what they fetch and make: one folder, filled by whole renames only."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """The folder that SURGEON_CACHE names, else `surgeon` in the user's XDG cache folder."""
    named = os.environ.get("SURGEON_CACHE")
    if named:
        return Path(named).resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "surgeon"


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """Returns `folder`, which `make` fills the first time; a run that is stopped in between leaves nothing behind it.

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
        except OSError:  # another process was first, and its folder is as good
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
