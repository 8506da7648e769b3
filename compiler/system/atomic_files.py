"""Folders and files that appear whole or not at all: written beside their destination and renamed into place."""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from surgeon.runtime.errors import PackageError, SurgeonError

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
_NEW, _OLD = ".partial", ".old"  # endings of the folders beside a place: its future contents, and its former ones


def check_replaceable(out: Path, kind: str, is_ours: Callable[[Path], bool]) -> None:
    """Refuses to replace anything but an empty folder or one of ours, or a folder that the process is in.

    `is_ours` returns true for a folder of the `kind` that may be replaced.

    Raises:
        PackageError: `out` exists and is neither of that kind nor an empty folder, holds the current folder, or cannot
            be written.
    """
    with naming(Path()):
        here = Path.cwd()
    try:
        place = out.resolve()
    except RuntimeError:  # before Python 3.13
        raise PackageError(str(out), kind, "links that lead in a circle", "name another --out") from None
    if place in (here, *here.parents):  # the swap would pull it out from under this process and its shell
        raise PackageError(str(out), "a folder of its own", "the current folder or one above it", "name another --out")
    place = out.absolute()
    while not place.parent.exists():
        place = place.parent
    check_writable(place, PackageError)
    if not (out.is_symlink() or out.exists()):
        return
    ours = out.is_dir() and (is_ours(out) or not any(out.iterdir()))
    if out.is_symlink() or not ours:
        raise PackageError(str(out), f"{kind}, an empty folder or nothing", "something else", "name another --out")


def check_writable(out: Path, error: type[SurgeonError]) -> None:
    """Refuses a file or folder that could not be written in the end, for want of a folder or of permission to write.

    Raises:
        error: its folder is missing, or nothing can be made in it.
    """
    if not out.parent.is_dir():
        raise error(str(out), "a place in a folder that exists", "none", "make the folder, or name another --out")
    try:
        with tempfile.TemporaryFile(dir=out.parent):  # without a name, so nothing stays if the process is killed
            pass
    except OSError as failure:
        raise error(str(out), "a place to write", failure.strerror or str(failure), "name another --out") from None


def check_file(out: Path, error: type[SurgeonError]) -> None:
    """Refuses a file that could not be written in the end, or whose name a folder has.

    Raises:
        error: it could not be written.
    """
    if out.is_dir():
        raise error(str(out), "a file to write", "a folder", "name a file")
    check_writable(out, error)


def check_folder(folder: Path, error: type[SurgeonError]) -> None:
    """Refuses a folder that could not be made, or that nothing could be made in.

    Raises:
        error: it could not be made or written.
    """
    place = folder.absolute() / "file"
    while not (place.parent.exists() or place.parent.is_symlink()):
        place = place.parent
    if not place.parent.is_dir():
        raise error(str(folder), "a folder", f"{place.parent}, which is none", "name another folder")
    check_writable(place, error)


def write(out: Path, files: Mapping[str, bytes]) -> None:
    """Writes files, by their paths with forward slashes, to a folder beside `out` and renames it into place.

    The old contents are removed only then; whatever killed writers left beside it is removed first. The umask decides
    who may read the folder and the files.
    """
    place = out.resolve()  # so that it has a name and a parent even if `out` ends in ".."
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(place)
    with _folder_beside(place) as temporary:
        for path, data in files.items():
            _write_durably(temporary / path, data)
        _put_in_place(temporary, place)


def write_file(file: Path, content: str | bytes) -> None:
    """Writes bytes, or a text in UTF-8, beside `file` and renames it into place."""
    scratch = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    try:
        with naming(file), scratch.open("xb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Adds a file's name to an error of the system that has none, as when a disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


@contextlib.contextmanager
def _folder_beside(place: Path) -> Iterator[Path]:
    """Makes a folder for the future contents of `place`, locked for as long as its writer lives."""
    while True:
        folder = place.with_name(f".{place.name}.{secrets.token_hex(4)}{_NEW}")
        folder.mkdir()  # tempfile.mkdtemp would keep it from everyone else, whatever the umask
        with _locked(folder, fcntl.LOCK_EX):
            if not folder.exists():  # another process saw it before it was locked
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


def _remove_abandoned(place: Path) -> None:
    """Removes folders that were made beside `place` for its contents and that no living process holds.

    If a writer died after it had moved the old contents away, they are moved back.
    """
    name = re.compile(rf"\.{re.escape(place.name)}\.\w{{8}}({re.escape(_NEW)}|{re.escape(_OLD)})")
    for folder in [path for path in place.parent.iterdir() if name.fullmatch(path.name)]:
        with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as locked:
            if locked and folder.suffix == _OLD and not place.exists():
                folder.rename(place)
            elif locked:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, mode: int) -> Iterator[bool]:
    """Holds a lock on a folder, released however the process dies; yields whether the lock was acquired.

    A file system without such locks grants none, so nothing on it counts as abandoned.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, mode)
            locked = True
        except OSError:
            locked = False
        yield locked


def _write_durably(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(temporary: Path, out: Path) -> None:
    """Swaps the two folders, so that at every moment there is one whole folder under the name."""
    while True:
        try:
            temporary.rename(out)  # over nothing or an empty folder
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if _exchange(temporary, out):
            return
        # A file system without exchange: between these two renames the name is free for an instant, and the old folder
        # is beside it.
        aside = temporary.with_suffix(_OLD)
        with _locked(out, fcntl.LOCK_EX):
            try:
                out.rename(aside)
                temporary.rename(out)
                return
            except OSError as error:  # another writer has removed the old folder, or taken the name
                if error.errno not in (errno.ENOENT, *_TAKEN):
                    raise
            finally:
                if out.exists():
                    shutil.rmtree(aside, ignore_errors=True)
                elif aside.exists():
                    aside.rename(out)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; returns false where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    rename = getattr(libc, "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
