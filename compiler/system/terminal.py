"""The terminal: the characters that it can show, and progress bars if somebody is watching."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from surgeon.compiler.system.main_process import is_main_process

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, the number of its parts that are done, and the total number."""


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """Yields one bar, which shows the latest step and vanishes at the end; None if nobody would see it."""
    if not _is_watched():
        yield None
        return
    # Rich takes a tenth of a second to load, which a run without a terminal can save.
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=escape(what), completed=done, total=total)


def say(line: str) -> None:
    """Writes a line to standard error in the main process, after the program's name."""
    if is_main_process() and sys.stderr is not None:
        with suppress(OSError):  # nobody is reading; the work goes on
            print(f"surgeon: {line}", file=sys.stderr, flush=True)


def quiet_unless_watched() -> None:
    """Keeps Transformers' own progress bars out of files and pipes, and to one process."""
    if not _is_watched():
        from transformers.utils import logging

        logging.disable_progress_bar()


def can_show(encoding: str, characters: str) -> bool:
    """True if an encoding has all these characters."""
    try:
        characters.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def stdout_encoding() -> str:
    """The encoding of standard output; ASCII if it is closed or has none."""
    return (sys.stdout and sys.stdout.encoding) or "ascii"


def _is_watched() -> bool:
    return is_main_process() and sys.stderr is not None and sys.stderr.isatty()
