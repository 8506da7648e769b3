"""Surgeon's exceptions: one hierarchy, whose messages say where, what was expected, what was found and what to do."""

import errno
import reprlib

_REMEDIES = {
    errno.ENOSPC: "free some space, or use another disk (TMPDIR names the folder for scratch files)",
    errno.EDQUOT: "free some space, or use another disk (TMPDIR names the folder for scratch files)",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or use another disk",
    errno.EMFILE: "close some files, or raise the limit: ulimit -n",
    errno.ENFILE: "close some files, or raise the system's limit",
    errno.ENOMEM: "free some memory, or use a machine with more",
    errno.EACCES: "change its permissions, or use another place",
    errno.EPERM: "change its permissions, or use another place",
    errno.EROFS: "use a place that can be written",
    errno.ENAMETOOLONG: "use a shorter name",
}


class SurgeonError(Exception):
    """The base class of every error that Surgeon raises on purpose.

    `where` is a place in the user's input (`layers[3].heads[1].cut`, a file, a call), `remedy` an imperative sentence.
    """

    def __init__(self, where: str, expected: str, got: str, remedy: str) -> None:
        super().__init__(where, expected, got, remedy)
        self.where = where
        self.expected = expected
        self.got = got
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, got {self.got}; {self.remedy}"


class TopologyError(SurgeonError):
    """A topology file or object that breaks the format, or a call beyond what the topology covers."""


class ModelError(SurgeonError):
    """A model or text that cannot be read or that Surgeon cannot work on."""


class TargetError(SurgeonError):
    """A target that does not exist, cannot hold the kernel, or is missing from a package."""


class BuildError(SurgeonError):
    """A compiler that is missing or that failed."""


class PackageError(SurgeonError):
    """A kernel package that is damaged, incomplete or untrustworthy."""


class PatchError(SurgeonError):
    """A mismatch between a package and a model, or between a call and a patched model."""


class PilotError(SurgeonError):
    """A pilot's results that cannot be read or written, or that belong to another topology."""


def short_repr(value: object, limit: int = 60) -> str:
    """The value's repr on one line, shortened to `limit` characters, for the `got` of an error."""
    # reprlib bounds depth and length, so that not even a huge or deeply nested value makes the error itself fail.
    brief = reprlib.Repr()
    brief.maxstring = brief.maxlong = brief.maxother = 4 * limit
    brief.maxlist = brief.maxtuple = brief.maxdict = brief.maxset = brief.maxfrozenset = limit
    text = brief.repr(value).replace("\n", " ")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """The text with escapes for characters that cannot be shown on a line."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def reason_of(error: BaseException, limit: int = 200) -> str:
    """The text of any exception on one line: what the system says, or the first line of the message, or the class."""
    said = error.strerror if isinstance(error, OSError) else None
    lines = (said or str(error)).strip().splitlines() or [""]
    text = " ".join(lines[0].split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def remedy_for(error: BaseException, otherwise: str) -> str:
    """An imperative sentence for an error of the system that the file is not to blame for, such as a full disk."""
    if isinstance(error, MemoryError):
        return _REMEDIES[errno.ENOMEM]
    return _REMEDIES.get(error.errno or 0, otherwise) if isinstance(error, OSError) else otherwise
