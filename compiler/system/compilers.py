"""Compilers as processes that end with the work: at a time limit, a fault elsewhere, or a signal to Surgeon."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from surgeon.runtime.errors import BuildError, short_repr

TIME_LIMIT = "SURGEON_COMPILER_SECONDS"
"""The environment variable that changes the time limit of one compiler run."""

_DEFAULT_LIMIT = 1800.0


def time_limit() -> float | None:
    """The most seconds that one run of a compiler may take, None for no limit.

    Raises:
        BuildError: $SURGEON_COMPILER_SECONDS is not a number of seconds.
    """
    text = os.environ.get(TIME_LIMIT) or str(_DEFAULT_LIMIT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < threading.TIMEOUT_MAX:  # excludes nan
        raise BuildError(TIME_LIMIT, "a number of seconds, or 0 for no limit", short_repr(text), "correct or unset it")
    return seconds or None


def still_running(compiler: str, limit: float | None) -> BuildError:
    """The error for a compiler that was ended because its time was over."""
    return BuildError(
        compiler,
        f"an end within {limit or 0:g} s",
        "a compiler that was still running and has been ended",
        f"see if it hangs, or set {TIME_LIMIT} to more seconds, or to 0 for no limit",
    )


def end_group(leader: int) -> None:
    """Kills a process that leads a group of its own, and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


class Compilers:
    """The compilers that run now, each in a process group of its own; leaving the context ends those that still run."""

    def __init__(self) -> None:
        self._limit = time_limit()
        self._running: set[int] = set()
        self._ended = False
        self._lock = threading.Lock()

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Ends all that run, and lets no other begin."""
        with self._lock:
            self._ended = True
            for leader in self._running:
                end_group(leader)

    def run(
        self, command: Sequence[str], folder: Path, name: str, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in a folder, which also holds its temporary files; `name` is the compiler's in errors.

        Raises:
            BuildError: it takes longer than the time limit, or the compilers have been ended.
        """
        with self._lock:
            if self._ended:
                raise BuildError(name, "a compile that goes on", "one that has ended", "compile again")
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "TMPDIR": str(folder), **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                process_group=0,
            )
            self._running.add(process.pid)
        try:
            out, err = process.communicate(timeout=self._limit)
        except subprocess.TimeoutExpired:
            raise still_running(name, self._limit) from None
        finally:
            with self._lock:
                self._running.discard(process.pid)
                if process.returncode is None:
                    end_group(process.pid)
            process.__exit__(None, None, None)
        return subprocess.CompletedProcess(command, process.returncode, out, err)
