"""A text file, read and refused without a tokenizer, and so before torch is imported."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from surgeon.runtime.errors import ModelError


@dataclass(frozen=True)
class TextFile:
    """A text, with its file's name and SHA-256."""

    name: str
    sha256: str
    text: str


def read_text_file(path: Path) -> TextFile:
    """Reads a UTF-8 text file.

    Raises:
        ModelError: it cannot be read, is not text, or is empty.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(str(path), "a readable text file", reason, "check the path") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(
            str(path), "UTF-8 text", f"a stray byte at {error.start}", "convert it, or name a text file"
        ) from None
    if "\0" in text:
        raise ModelError(str(path), "text", f"a null character at {text.index(chr(0))}", "name a text file")
    if not text.strip():
        raise ModelError(str(path), "a text", "an empty file", "name a file with text in it")
    return TextFile(path.name, hashlib.sha256(data).hexdigest(), text)
