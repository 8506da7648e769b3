"""The cache of Hugging Face's Hub: a snapshot's files are links into the folder of blobs of the same repository.

Source: huggingface_hub 2.4, file_download.py: snapshots/<revision>/<path> -> ../../blobs/<hash>.
"""

from pathlib import Path


def blobs_of(folder: Path) -> Path | None:
    """The folder of blobs of the repository whose snapshot a folder is or lies in; None outside such a cache."""
    place = folder.resolve()
    for snapshot in (place, *place.parents):
        blobs = snapshot.parent.parent / "blobs"
        if snapshot.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            return blobs
    return None


def blob_of(link: Path, blobs: Path | None) -> Path | None:
    """The blob that a link stands for; None if it leads anywhere but into that folder of blobs."""
    if blobs is None:
        return None
    target = link.parent.resolve() / link.readlink()
    return blobs / target.name if target.parent.resolve() == blobs else None
