"""The layout of the Hub's cache, as snapshot_download leaves it."""

import hashlib
import shutil
from pathlib import Path


def cached(folder: Path, repository: Path) -> Path:
    """Copies a folder into the cache of a repository and returns the snapshot, whose files are links to blobs."""
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    blobs = repository / "blobs"
    blobs.mkdir()
    for file in [file for file in snapshot.rglob("*") if file.is_file()]:
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        up = Path(*[".."] * (len(file.relative_to(snapshot).parts) + 1))
        file.symlink_to(up / "blobs" / blob.name)
    return snapshot
