"""A text file, read and refused without a tokenizer, and so before torch is imported."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from surgeon.runtime.errors import ModelError, reason_of, remedy_for
from surgeon.runtime.package.files import read_any

MAX_TEXT_BYTES = 2**28
"""The largest text, all of which is tokenized: some 60 million tokens."""


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
        data = read_any(path, MAX_TEXT_BYTES)
    except (OSError, ValueError, MemoryError) as error:
        remedy = remedy_for(error, "check the path")
        raise ModelError(str(path), "a readable text file", reason_of(error), remedy) from None
    if len(data) > MAX_TEXT_BYTES:
        raise ModelError(str(path), f"at most {MAX_TEXT_BYTES} bytes", "a larger text", "name a part of it")
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
