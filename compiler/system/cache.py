"""A cache of compiled parts, addressed by the content of everything that went into them.

An entry is a file named by its key that holds the SHA-256 of the data, then the data, so a damaged entry is a miss.
Its modification time is the time of its last use.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from surgeon.compiler.system.atomic_files import write_file
from surgeon.runtime.errors import BuildError, short_repr
from surgeon.runtime.package.files import read_regular

DEFAULT_LIMIT = "1G"
_LARGEST = 2**31  # bytes of an entry; what is larger is damaged
_SIZE = re.compile(r"([0-9]{1,15})([kMGT]?)")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_ENTRY = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}-.*")  # a whole entry, or one being written


def cache_folder() -> Path:
    """The folder of things made or fetched once: $SURGEON_CACHE, or $XDG_CACHE_HOME/surgeon, or ~/.cache/surgeon."""
    named = os.environ.get("SURGEON_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(named or f"{base}/surgeon").expanduser().absolute()


class Cache:
    """Compiled parts in a folder, at most `limit` bytes in all, None for no limit; processes may share it."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self._folder = folder
        self._limit = limit

    @classmethod
    def default(cls) -> "Cache":
        """The user's cache of compiled parts, of at most $SURGEON_CACHE_SIZE.

        Raises:
            BuildError: its value is not a size.
        """
        return cls(cache_folder() / "compiled", _limit(os.environ.get("SURGEON_CACHE_SIZE") or DEFAULT_LIMIT))

    @staticmethod
    def key(parts: Iterable[str | bytes]) -> str:
        """The key of whatever is made from these parts; the boundaries between them count."""
        digest = hashlib.sha256()
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()

    def get(self, key: str) -> bytes | None:
        """Returns the data stored under a key, or None if there is none or it is damaged."""
        file = self._folder / key
        try:
            entry = read_regular(file, _LARGEST)
        except (OSError, MemoryError):
            return None
        with contextlib.suppress(OSError):  # removed in the meantime, or another user's
            os.utime(file)
        digest, data = entry[:32], entry[32:]
        return data if hashlib.sha256(data).digest() == digest else None

    def put(self, key: str, data: bytes) -> None:
        """Stores data, and removes the least recently used entries if the limit is exceeded.

        A cache that cannot be written is left alone, since nothing depends on it.
        """
        entry = hashlib.sha256(data).digest() + data
        if self._limit is not None and len(entry) > self._limit:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_file(self._folder / key, entry)
            self._shrink()

    def _shrink(self) -> None:
        """Removes entries down to the limit.

        A process that is reading one has it open and reads on; one that comes too late gets a miss and compiles.
        """
        if self._limit is None:
            return
        found = sorted(self._entries(), key=lambda entry: entry[1].st_mtime_ns)
        size = sum(status.st_size for _, status in found)
        for file, status in found:
            if size <= self._limit:
                return
            file.unlink(missing_ok=True)
            size -= status.st_size

    def _entries(self) -> Iterator[tuple[Path, os.stat_result]]:
        with os.scandir(self._folder) as files:
            for file in files:
                if _ENTRY.fullmatch(file.name):  # other files here are not the cache's
                    with contextlib.suppress(FileNotFoundError):  # another process removed it
                        yield Path(file), file.stat(follow_symlinks=False)


def _limit(text: str) -> int | None:
    """Parses a size such as 500M into bytes; None for 0, no limit."""
    size = _SIZE.fullmatch(text)
    if size is None:
        raise BuildError(
            "SURGEON_CACHE_SIZE",
            "a size such as 500M or 2G, or 0 for no limit",
            short_repr(text),
            "correct or unset it",
        )
    return int(size[1]) * _UNITS[size[2]] or None
