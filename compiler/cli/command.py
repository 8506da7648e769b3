"""The contract of a command, which each command's file fulfils.

A command's file imports what its work needs inside functions: most of what a short command takes is imports, and help
and wrong usage need none of them.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The lines for standard output; `passed` is false where a threshold that the user gave was missed."""

    lines: Iterable[str]
    passed: bool = True


@dataclass(frozen=True)
class Command:
    """A subcommand: `configure` declares its arguments, `run` does the work.

    `run` returns the lines for standard output, in an Outcome where a threshold can be missed.
    """

    name: str
    summary: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Iterable[str] | Outcome]
