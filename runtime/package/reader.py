"""Reads a kernel package from disk, trusting nothing in it.

Source: package format version 1: a folder with manifest.json, which lists every other file with its size and SHA-256.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from surgeon.runtime.errors import PackageError, reason_of, remedy_for, short_repr
from surgeon.runtime.package.files import NotAFileError, read_regular
from surgeon.runtime.package.hub_cache import blob_of, blobs_of
from surgeon.runtime.package.interface import ROUTER_PHASES
from surgeon.runtime.package.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest
from surgeon.runtime.package.schedule import FILE as SCHEDULES
from surgeon.runtime.package.schedule import UNBOUNDED, PackagedSchedule, read_schedules
from surgeon.runtime.package.topology_facts import FILE as TOPOLOGY
from surgeon.runtime.package.topology_facts import check_topology

MANIFEST = "manifest.json"
MAX_FILES = 100_000
MAX_FILE_BYTES = 2**30
MAX_TOPOLOGY_BYTES = 2**27  # twice a topology file's limit: the canonical form is a little longer
MAX_PACKAGE_BYTES = 4 * 2**30
_MAX_PARTS = 8
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


def read_package(folder: str | os.PathLike[str], hub_cache: bool = False) -> PackageFiles:
    """Reads and verifies every file of a package; nothing in it is executed or imported.

    With `hub_cache`, a file may be a link to a blob of the Hub cache's repository whose snapshot the folder lies in.

    Raises:
        PackageError: a file is missing, unlisted, a link, too large, outside the folder or unlike its manifest entry.
    """
    root = Path(folder)
    try:
        for _ in range(_TRIES):
            with _opened(root) as descriptor:
                try:
                    return _read_package(_Place(root, descriptor, blobs_of(root) if hub_cache else None))
                except (PackageError, OSError):
                    # A compile that replaces the package removes the old files, which a reader may still be reading.
                    if _stands_at(root, descriptor):
                        raise
    except PackageError:
        raise
    except Exception as error:  # whatever the system or a library says of what somebody else wrote
        remedy = remedy_for(error, "check the path, or " + _AGAIN)
        raise PackageError(os.fsdecode(folder), "a package that can be read", reason_of(error), remedy) from error
    raise PackageError(str(root), "a package that stays for as long as reading takes", "others each time", "try later")


@dataclass(frozen=True)
class _Place:
    """An open package folder, whose files are those of one package even if another one takes its name.

    `root` is its path, for errors and links; `blobs` is the folder that links may lead to, or None.
    """

    root: Path
    descriptor: int
    blobs: Path | None


@contextlib.contextmanager
def _opened(root: Path, below: str = ".", within: int | None = None) -> Iterator[int]:
    """Opens a folder: `root`, or the one `below` an open one."""
    links = 0 if within is None else os.O_NOFOLLOW
    try:
        descriptor = os.open(root if within is None else below, os.O_RDONLY | os.O_DIRECTORY | links, dir_fd=within)
    except FileNotFoundError:
        raise PackageError(str(root), "a package folder", "nothing", "check the path") from None
    except NotADirectoryError:
        raise PackageError(str(root), "a package folder", "a file", "check the path") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _stands_at(root: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(root.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _exists(place: _Place, path: str) -> bool:
    try:
        os.stat(path, dir_fd=place.descriptor, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _read_package(place: _Place) -> PackageFiles:
    root = place.root
    if not _exists(place, MANIFEST):
        raise PackageError(
            str(root), f"a package with {MANIFEST}", "a folder without it", "check the path or " + _AGAIN
        )
    text = _read(place, MANIFEST, MAX_MANIFEST_BYTES)
    try:
        manifest = Manifest.from_json(text.decode("utf-8"))
    except UnicodeDecodeError:
        raise PackageError(f"{root}/{MANIFEST}", "UTF-8 text", "other bytes", _AGAIN) from None
    _check_listing(root, manifest)
    _check_folder(place, {entry.path for entry in manifest.files})
    files = {entry.path: _read_listed(place, entry) for entry in manifest.files}
    _check_kernels(root, manifest)
    check_topology(files[TOPOLOGY], manifest, str(root))
    return PackageFiles(root, hashlib.sha256(text).hexdigest(), manifest, text, MappingProxyType(files))


def _check_listing(root: Path, manifest: Manifest) -> None:
    listed = {entry.path for entry in manifest.files}
    if len(manifest.files) > MAX_FILES or len(listed) != len(manifest.files):
        raise PackageError(f"{root}: files", f"at most {MAX_FILES} files, each once", str(len(manifest.files)), _AGAIN)
    for entry in manifest.files:
        path = PurePosixPath(entry.path)
        if (
            path.is_absolute()
            or ".." in path.parts
            or "\\" in entry.path
            or not entry.path.isprintable()  # nor a surrogate, which no file system can name
            or len(path.parts) > _MAX_PARTS
            or str(path) != entry.path
        ):
            raise PackageError(
                f"{root}: files", "paths inside the package", short_repr(entry.path), "do not use this package"
            )
        most = MAX_TOPOLOGY_BYTES if entry.path == TOPOLOGY else MAX_FILE_BYTES
        if not 0 <= entry.size <= most:
            raise PackageError(f"{root}/{entry.path}", f"at most {most} bytes", str(entry.size), _AGAIN)
    if sum(entry.size for entry in manifest.files) > MAX_PACKAGE_BYTES:
        raise PackageError(str(root), f"at most {MAX_PACKAGE_BYTES} bytes in all", "more", _AGAIN)


def _check_folder(place: _Place, listed: Set[str]) -> None:
    """Refuses what the manifest does not list; a folder without a listed file is not looked into."""
    folders = {str(folder) for path in listed for folder in PurePosixPath(path).parents}
    root, pending = place.root, [""]
    while pending:
        below = pending.pop()
        with _opened(root / below, below or ".", place.descriptor) as inner, os.scandir(inner) as entries:
            for entry in entries:
                path = f"{below}/{entry.name}" if below else entry.name
                if entry.is_symlink() and blob_of(root / path, place.blobs) is None:
                    raise _link(root, path)
                if entry.is_dir(follow_symlinks=False) and path in folders:
                    pending.append(path)
                elif path != MANIFEST and path not in listed:
                    raise PackageError(
                        f"{root}/{path}",
                        "only files that the manifest lists",
                        f"an unlisted {'folder' if entry.is_dir(follow_symlinks=False) else 'file'}",
                        "remove it or " + _AGAIN,
                    )


def _link(root: Path, path: str) -> PackageError:
    """The error for a link that is not followed."""
    got, remedy = "a symbolic link", "do not use this package"
    if blob_of(root / path, blobs_of(root)) is not None:
        got = "a symbolic link into the Hub's cache"
        remedy = "copy the package (cp -rL), or download it with local_dir=..., which makes files"
    return PackageError(f"{root}/{path}", "a file or folder", got, remedy)


def _read_listed(place: _Place, entry: FileEntry) -> bytes:
    root, data = place.root, _read(place, entry.path, entry.size)
    if len(data) != entry.size:
        raise PackageError(f"{root}/{entry.path}", f"{entry.size} bytes", f"{len(data)} bytes", _AGAIN)
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise PackageError(
            f"{root}/{entry.path}", f"SHA-256 {short_repr(entry.sha256)}", found, "the file is damaged: " + _AGAIN
        )
    return data


def _read(place: _Place, path: str, limit: int) -> bytes:
    """Reads the bytes of a regular file, at most `limit`, or those of a blob that it is a link to."""
    where = f"{place.root}/{path}"
    try:
        if stat.S_ISLNK(os.stat(path, dir_fd=place.descriptor, follow_symlinks=False).st_mode):
            blob = blob_of(place.root / path, place.blobs)
            if blob is None:
                raise _link(place.root, path)
            data = read_regular(blob, limit)
        else:
            data = read_regular(path, limit, place.descriptor)
    except NotAFileError as error:
        raise PackageError(where, "a regular file", reason_of(error), "do not use this package") from None
    except OSError as error:
        raise PackageError(where, "a readable file", reason_of(error), remedy_for(error, _AGAIN)) from None
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
        for name in ("target", "dtype", "phase", "schedule", "table", "symbol"):  # shown in errors as they are
            if not (text := getattr(kernel, name)).isprintable():
                raise PackageError(f"{root}: kernels[{index}].{name}", "a printable name", short_repr(text), _AGAIN)
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
        expected, kind = manifest.layers, "covered"
        if phase in ROUTER_PHASES:
            expected, kind = manifest.routed, "routed"
        if set(layers) != set(expected):
            raise PackageError(where, f"each of {len(expected)} {kind} layers once", short_repr(sorted(layers)), _AGAIN)
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
