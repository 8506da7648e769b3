"""Checks of a checkpoint's files and of the devices for it, before Transformers reads anything."""

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from surgeon.runtime.errors import ModelError, reason_of, remedy_for, short_repr

DeviceMap = str | Mapping[str, str | int]
"""A device for the whole model, a strategy to spread it, or a device, possibly "disk", for each of its modules."""

SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
"""The strategies of a DeviceMap."""

_POINTER = b"version https://git-lfs.github.com/spec/"


def check_files(place: Path) -> None:
    """Refuses what a library would wait for or report as damage: pipes, and the pointers of Git LFS.

    `place` is a folder, one file, or nothing, as for a name on the Hub; links are followed.

    Raises:
        ModelError: a file is one of these, or cannot be looked at.
    """
    try:
        for file in _files(place):
            mode = file.stat().st_mode
            if stat.S_ISFIFO(mode):
                raise ModelError(str(file), "a file", "a pipe", "name the model's folder or file")
            if stat.S_ISREG(mode) and _begins_with(file, _POINTER):
                raise ModelError(
                    str(file), "a file of the model", "the pointer to it that Git LFS leaves", "run git lfs pull there"
                )
    except (OSError, ValueError, RuntimeError) as error:  # a broken link, a null character, a circle of links
        raise ModelError(
            str(place), "a model's files", reason_of(error), remedy_for(error, "check the path or the name")
        ) from None


def check_devices(device_map: DeviceMap | None) -> None:
    """Refuses a device that this machine does not have.

    Raises:
        ModelError: a named device does not exist.
    """
    places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    for place in sorted(places - {None, "disk", *SPREADING}, key=str):
        try:
            torch.empty(0, device=place)
        except Exception as error:  # torch raises several classes, each backend others
            raise ModelError(
                "--device-map",
                "devices that exist",
                short_repr(f"{place}: {reason_of(error)}", 200),
                "name others, or none",
            ) from None


def _files(place: Path) -> Iterator[Path]:
    if place.is_dir():
        yield from sorted(place.iterdir())
    elif place.exists() or place.is_symlink():
        yield place


def _begins_with(file: Path, words: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(words)) == words
