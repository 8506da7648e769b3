"""A cache of compiled parts, addressed by the content of everything that went into them.

An entry is a file named by its key that holds the SHA-256 of the data and the data, so that a damaged one is a miss.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def cache_folder() -> Path:
    """What is made or fetched once lies here: $SURGEON_CACHE, or $XDG_CACHE_HOME/surgeon, or ~/.cache/surgeon."""
    named = os.environ.get("SURGEON_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(named or f"{base}/surgeon").expanduser().absolute()


class Cache:
    """Compiled parts below a folder; several processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def default(cls) -> "Cache":
        """The user's cache of compiled parts."""
        return cls(cache_folder() / "compiled")

    @staticmethod
    def key(parts: Iterable[str | bytes]) -> str:
        """The address of what is made from these parts; their boundaries count."""
        digest = hashlib.sha256()
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()

    def get(self, key: str) -> bytes | None:
        """The data stored under a key, or None where there is none or it is damaged."""
        try:
            entry = (self._folder / key).read_bytes()
        except OSError:
            return None
        digest, data = entry[:32], entry[32:]
        return data if hashlib.sha256(data).digest() == digest else None

    def put(self, key: str, data: bytes) -> None:
        """Stores data; a cache that cannot be written is left as it is, since nothing depends on it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                file.write(hashlib.sha256(data).digest() + data)
            Path(file.name).replace(self._folder / key)
        except OSError:
            return
