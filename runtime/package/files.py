"""Reads files that somebody else wrote: never waits for a pipe, never takes more memory than the file has bytes."""

import contextlib
import os
import stat
from collections.abc import Iterator

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a symbolic link",
}
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe opens without waiting for its writer


class NotAFileError(OSError):
    """Something other than a file has the name; `strerror` says what it is."""

    def __init__(self, mode: int, path: str | os.PathLike[str]) -> None:
        super().__init__(None, _KINDS.get(stat.S_IFMT(mode), "another kind of file"), os.fspath(path))


def read_regular(path: str | os.PathLike[str], limit: int, folder: int | None = None) -> bytes:
    """Reads a regular file, but no more than `limit` + 1 bytes; `folder` is an open one that the path begins in.

    Raises:
        NotAFileError: it is a link, a folder, a pipe or a device.
        OSError: it cannot be read.
    """
    mode = os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode
    if not stat.S_ISREG(mode):
        raise NotAFileError(mode, path)
    descriptor = os.open(path, _FLAGS | os.O_NOFOLLOW, dir_fd=folder)
    with _closed_after(descriptor):
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):  # replaced in the meantime
            raise NotAFileError(status.st_mode, path)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(min(limit, status.st_size) + 1)


def read_any(path: str | os.PathLike[str], limit: int) -> bytes:
    """Reads what a user named, but no more than `limit` + 1 bytes: also a link, a device, or a pipe of the shell's.

    Raises:
        NotAFileError: it is a folder, or a pipe with a name of its own, which may never have a writer.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, _FLAGS)
    with _closed_after(descriptor):
        mode = os.fstat(descriptor).st_mode
        # What the shell makes for <(command) has no name in the file system: the link in /dev/fd leads nowhere.
        if stat.S_ISDIR(mode) or (stat.S_ISFIFO(mode) and os.path.lexists(os.path.realpath(path))):
            raise NotAFileError(mode, path)
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit + 1)


@contextlib.contextmanager
def _closed_after(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)
