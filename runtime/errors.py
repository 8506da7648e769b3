"""Surgeon's exceptions: one hierarchy, whose messages say where, what was expected, what was found and what to do."""

import reprlib


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
