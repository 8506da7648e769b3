"""Reads a kernel package from disk, trusting nothing in it.

Source: package format version 1: a folder with manifest.json, which lists every other file with its size and SHA-256.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from surgeon.runtime.errors import PackageError, short_repr
from surgeon.runtime.package.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest
from surgeon.runtime.package.schedule import FILE as SCHEDULES
from surgeon.runtime.package.schedule import UNBOUNDED, PackagedSchedule, read_schedules
from surgeon.runtime.package.topology_facts import FILE as TOPOLOGY
from surgeon.runtime.package.topology_facts import check_topology

MANIFEST = "manifest.json"
MAX_FILES = 100_000
MAX_FILE_BYTES = 2**30
MAX_PACKAGE_BYTES = 4 * 2**30
_AGAIN = "compile the package again"
_TRIES = 100  # of a folder that compiles keep replacing


@dataclass(frozen=True)
class PackageFiles:
    """A package whose files are in memory, each with the size and hash that the manifest lists.

    `files` maps paths with forward slashes to bytes; `manifest_bytes` is manifest.json, `id` its SHA-256.
    """

    folder: Path
    id: str
    manifest: Manifest
    manifest_bytes: bytes
    files: Mapping[str, bytes]

    @property
    def num_rows(self) -> int:
        """The number of rows of blocks that may be requested, `UNBOUNDED` unless the topology refuses others."""
        return self.manifest.num_blocks if self.manifest.beyond == "error" else UNBOUNDED

    @cached_property
    def schedules(self) -> Mapping[int, PackagedSchedule]:
        """The schedule of every covered layer, read and checked on first use.

        Raises:
            PackageError: schedule.safetensors does not match the manifest's kernels, or points outside itself.
        """
        return read_schedules(self.files.get(SCHEDULES), self.manifest, f"{self.folder}/{SCHEDULES}")


def read_package(folder: str | os.PathLike[str]) -> PackageFiles:
    """Reads and verifies every file of a package; nothing in it is executed or imported.

    Raises:
        PackageError: a file is missing, unlisted, a link, too large, outside the folder or unlike its manifest entry.
    """
    root = Path(folder)
    for _ in range(_TRIES):
        with _opened(root) as place:
            try:
                return _read_package(root, place)
            except (PackageError, OSError):
                # A compile that replaces the package removes the old files, which a reader may still be reading.
                if _stands_at(root, place):
                    raise
    raise PackageError(str(root), "a package that stays for as long as reading takes", "others each time", "try later")


@contextlib.contextmanager
def _opened(root: Path) -> Iterator[int]:
    """Opens a folder, whose files are then those of one package even if another one takes its name."""
    try:
        place = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise PackageError(str(root), "a package folder", "nothing", "check the path") from None
    except NotADirectoryError:
        raise PackageError(str(root), "a package folder", "a file", "check the path") from None
    except (OSError, ValueError) as error:  # a name may hold a null character
        raise PackageError(str(root), "a package folder", str(error), "check the path") from None
    try:
        yield place
    finally:
        os.close(place)


def _stands_at(root: Path, place: int) -> bool:
    try:
        return os.path.samestat(root.stat(), os.fstat(place))
    except OSError:
        return False


def _read_package(root: Path, place: int) -> PackageFiles:
    if not os.access(MANIFEST, os.F_OK, dir_fd=place):
        raise PackageError(
            str(root), f"a package with {MANIFEST}", "a folder without it", "check the path or " + _AGAIN
        )
    text = _read(root, place, MANIFEST, MAX_MANIFEST_BYTES)
    try:
        manifest = Manifest.from_json(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise PackageError(f"{root}/{MANIFEST}", "UTF-8 text", "other bytes", _AGAIN) from None
    _check_listing(root, place, manifest)
    files = {entry.path: _read_listed(root, place, entry) for entry in manifest.files}
    _check_kernels(root, manifest)
    check_topology(files[TOPOLOGY], manifest, str(root))
    return PackageFiles(root, hashlib.sha256(text).hexdigest(), manifest, text, MappingProxyType(files))


def _check_listing(root: Path, place: int, manifest: Manifest) -> None:
    listed = [entry.path for entry in manifest.files]
    if len(listed) > MAX_FILES or len(set(listed)) != len(listed):
        raise PackageError(f"{root}: files", f"at most {MAX_FILES} files, each once", str(len(listed)), _AGAIN)
    for entry in manifest.files:
        path = PurePosixPath(entry.path)
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in entry.path
            or "\0" in entry.path
            or str(path) != entry.path
        ):
            raise PackageError(
                f"{root}: files", "paths inside the package", short_repr(entry.path), "do not use this package"
            )
        if not 0 <= entry.size <= MAX_FILE_BYTES:
            raise PackageError(f"{root}/{entry.path}", f"at most {MAX_FILE_BYTES} bytes", str(entry.size), _AGAIN)
    if sum(entry.size for entry in manifest.files) > MAX_PACKAGE_BYTES:
        raise PackageError(str(root), f"at most {MAX_PACKAGE_BYTES} bytes in all", "more", _AGAIN)
    known = {MANIFEST, *listed}
    for found in _walk(root, place, ""):
        if found not in known:
            raise PackageError(
                f"{root}/{found}", "only files that the manifest lists", "an unlisted file", "remove it or " + _AGAIN
            )


def _walk(root: Path, place: int, below: str) -> Iterator[str]:
    with os.scandir(place) as entries:
        for entry in entries:
            path = f"{below}/{entry.name}" if below else entry.name
            if entry.is_symlink():
                raise PackageError(f"{root}/{path}", "a file or folder", "a symbolic link", "do not use this package")
            if entry.is_dir(follow_symlinks=False):
                inner = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=place)
                try:
                    yield from _walk(root, inner, path)
                finally:
                    os.close(inner)
            else:
                yield path


def _read_listed(root: Path, place: int, entry: FileEntry) -> bytes:
    data = _read(root, place, entry.path, entry.size)
    if len(data) != entry.size:
        raise PackageError(f"{root}/{entry.path}", f"{entry.size} bytes", f"{len(data)} bytes", _AGAIN)
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise PackageError(
            f"{root}/{entry.path}", f"SHA-256 {short_repr(entry.sha256)}", found, "the file is damaged: " + _AGAIN
        )
    return data


def _read(root: Path, place: int, path: str, limit: int) -> bytes:
    """Reads the bytes of a regular file, at most `limit`; `path` counts from the open folder `place`."""
    where = f"{root}/{path}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=place)
    except OSError as error:
        raise PackageError(where, "a readable file", error.strerror or str(error), _AGAIN) from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise PackageError(where, "a regular file", "another kind of file", "do not use this package")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise PackageError(where, f"at most {limit} bytes", "more", _AGAIN)
    return data


def _check_kernels(root: Path, manifest: Manifest) -> None:
    files = {entry.path for entry in manifest.files}
    for required in (TOPOLOGY, SCHEDULES):
        if required not in files:
            raise PackageError(f"{root}: files", required, "a package without it", _AGAIN)
    model = manifest.model
    if not manifest.layers or not all(0 <= layer < model.num_hidden_layers for layer in manifest.layers):
        raise PackageError(
            f"{root}: layers",
            f"some of the layers 0..{model.num_hidden_layers - 1}",
            short_repr(manifest.layers),
            _AGAIN,
        )
    covered: dict[tuple[str, str, str], dict[int, list[tuple[int, ...]]]] = {}
    for index, kernel in enumerate(manifest.kernels):
        if kernel.file not in files:
            raise PackageError(
                f"{root}: kernels[{index}].file", "a file of the package", short_repr(kernel.file), _AGAIN
            )
        if kernel.target == "cpu" and kernel.symbol != f"surgeon_{kernel.schedule}":
            raise PackageError(
                f"{root}: kernels[{index}].symbol",
                short_repr(f"surgeon_{kernel.schedule}"),
                short_repr(kernel.symbol),
                "do not use this package",
            )
        if len(kernel.heads) not in (0, 2):
            raise PackageError(
                f"{root}: kernels[{index}].heads", "nothing, or a first and an end", short_repr(kernel.heads), _AGAIN
            )
        layers = covered.setdefault((kernel.target, kernel.dtype, kernel.phase), {})
        for layer in kernel.layers:
            layers.setdefault(layer, []).append(kernel.heads or (0, model.num_attention_heads))
    for (target, dtype, phase), layers in covered.items():
        where = f"{root}: {phase} kernels for {target} {dtype}"
        if set(layers) != set(manifest.layers):
            raise PackageError(
                where, f"each of {len(manifest.layers)} covered layers once", short_repr(sorted(layers)), _AGAIN
            )
        for layer, groups in layers.items():
            ends = [0]
            for first, end in sorted(groups):
                ends.append(end if first == ends[-1] < end else -1)
            if ends[-1] != model.num_attention_heads or -1 in ends:
                raise PackageError(
                    f"{where}: layer {layer}",
                    f"each of {model.num_attention_heads} heads once",
                    short_repr(sorted(groups)),
                    _AGAIN,
                )
