"""The interface that every command's file implements.

A command's file imports what its work needs inside functions: a short command spends most of its time on imports, and
neither help nor a usage error needs any of them.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The lines for standard output; `reason`, on one line, says which threshold was missed, if one was."""

    lines: Iterable[str]
    reason: str | None = None


@dataclass(frozen=True)
class Command:
    """A subcommand: `configure` declares its arguments, `run` does the work.

    `run` returns the lines for standard output, in an Outcome if a threshold can be missed.
    """

    name: str
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Iterable[str] | Outcome]
