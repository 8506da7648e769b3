"""Runs numbered cases in forked processes, whose crashes are seen, and keeps where it is in a file."""

import contextlib
import json
import mmap
import os
import random
import resource
import select
import signal
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PIECE = 400
"""Cases that one process takes before the next is forked."""
CPU_SECONDS = 20.0
"""The most that a case may take; a piece is killed after ten times as many."""
EXTRA_BYTES = 2 * 2**30
"""Address space that a process may take beyond what it began with."""
_NUMBER = struct.Struct("q")


class Verdict(NamedTuple):
    """The outcome of a case, which is counted, and the fault that it shows, empty for none."""

    outcome: str
    fault: str


class Kind(NamedTuple):
    """A kind of cases: `run` makes and judges a case from its own numbers; `describe` makes it again and shows it.

    `prepare` makes once, in a scratch folder, what all cases share.
    """

    name: str
    prepare: Callable[[Path], Any]
    run: Callable[[Any, random.Random], Verdict]
    describe: Callable[[Any, random.Random], str]


@dataclass
class Progress:
    """The work done on a kind: all cases before `next`, what came of them, and the faults by case."""

    next: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)
    cpu_seconds: float = 0.0


def numbers(seed: int, kind: str, case: int) -> random.Random:
    """The random numbers of a case: the same wherever and whenever it runs."""
    return random.Random(f"{seed}/{kind}/{case}")


def run(
    kind: Kind, seed: int, progress: Progress, cases: int, jobs: int = 1, seconds: float | None = None
) -> Iterator[Progress]:
    """Runs the next `cases` cases in `jobs` processes, at most for `seconds`; yields after every finished piece."""
    with scratch() as folder:
        yield from _run(kind, kind.prepare(folder), seed, progress, cases, jobs, seconds)


def _run(
    kind: Kind, shared: Any, seed: int, progress: Progress, cases: int, jobs: int, seconds: float | None
) -> Iterator[Progress]:
    end = progress.next + cases
    finish = None if seconds is None else time.monotonic() + seconds
    waiting = [(first, min(first + PIECE, end)) for first in range(progress.next, end, PIECE)][::-1]
    done: dict[int, tuple[int, Progress]] = {}  # by first case: pieces end in any order
    running: dict[int, _Worker] = {}
    try:
        while waiting or running:
            late = finish is not None and time.monotonic() > finish
            while waiting and len(running) < jobs and not late:
                worker = _Worker(kind, shared, seed, *waiting.pop())
                running[worker.results] = worker
            if not running:
                break
            for results in select.select(list(running), [], [])[0]:
                worker = running[results]
                if not worker.read():
                    continue
                del running[results]
                found = worker.finish()
                if isinstance(found, Progress):
                    done[worker.first] = (worker.end, found)
                else:  # the others of the piece run again
                    at, fault = found
                    done[at] = (at + 1, Progress(0, Counter({"crash": 1}), {at: fault}))
                    waiting += [piece for piece in ((at + 1, worker.end), (worker.first, at)) if piece[0] < piece[1]]
            while progress.next in done:
                progress.next, part = done.pop(progress.next)
                progress.outcomes += part.outcomes
                progress.faults |= part.faults
                progress.cpu_seconds += part.cpu_seconds
                yield progress
    finally:
        for worker in running.values():
            worker.stop()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the time of a run, in memory where the machine has such a place."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="surgeon-fuzz-", dir=memory) as folder:
        yield Path(folder)


class _Worker:
    """A forked process that runs the cases from `first` to before `end` and writes what came of them to a pipe."""

    def __init__(self, kind: Kind, shared: Any, seed: int, first: int, end: int) -> None:
        self.first, self.end = first, end
        self._at = mmap.mmap(-1, _NUMBER.size)
        self._at[:] = _NUMBER.pack(first)
        self._data = b""
        self.results, write = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                os.close(self.results)
                _limit()
                found = self._work(kind, shared, seed)
                with os.fdopen(write, "wb") as file:
                    file.write(found)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(70)
        os.close(write)

    def _work(self, kind: Kind, shared: Any, seed: int) -> bytes:
        outcomes: Counter[str] = Counter()
        faults: dict[int, str] = {}
        began = before = time.process_time()
        for case in range(self.first, self.end):
            self._at[:] = _NUMBER.pack(case)
            verdict = run_case(kind, shared, seed, case)
            now = time.process_time()
            if now - before > CPU_SECONDS:
                verdict = Verdict("slow", verdict.fault or f"{now - before:.0f} CPU seconds")
            before = now
            outcomes[verdict.outcome] += 1
            if verdict.fault:
                faults[case] = verdict.fault
        return json.dumps([outcomes, list(faults.items()), before - began]).encode()

    def read(self) -> bool:
        """Reads what there is; true at the end."""
        data = os.read(self.results, 2**20)
        self._data += data
        return not data

    def finish(self) -> "Progress | tuple[int, str]":
        """The finds of the process, or the case in which it ended before its time, and how."""
        os.close(self.results)
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        at: int = _NUMBER.unpack(self._at[:])[0]
        if status:
            return at, f"crash: {signal.Signals(-status).name if status < 0 else f'status {status}'}"
        outcomes, faults, cpu_seconds = json.loads(self._data)
        return Progress(0, Counter(outcomes), dict(faults), cpu_seconds)

    def stop(self) -> None:
        """Ends the process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def run_case(kind: Kind, shared: Any, seed: int, case: int) -> Verdict:
    """Runs one case; an exception that no contract names is a fault."""
    try:
        return kind.run(shared, numbers(seed, kind.name, case))
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Verdict(
            "traceback", f"traceback: {type(error).__name__}: {error!s:.150} ({Path(last.filename).name}:{last.lineno})"
        )


def _limit() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + EXTRA_BYTES, now + EXTRA_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (round(10 * CPU_SECONDS), round(10 * CPU_SECONDS) + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# The state file


def stored(file: Path, seed: int, kind: str) -> Progress:
    """The progress of a kind by a state file, from the start if there is none."""
    found = _read(file, seed)["kinds"].get(kind)
    if not found:
        return Progress()
    return Progress(
        found["next"],
        Counter(found["outcomes"]),
        {int(n): text for n, text in found["faults"].items()},
        found["cpu_seconds"],
    )


def store(file: Path, seed: int, kind: str, progress: Progress) -> None:
    """Writes the progress of a kind into the state file, beside that of the others."""
    state = _read(file, seed)
    state["kinds"][kind] = {
        "next": progress.next,
        "outcomes": dict(sorted(progress.outcomes.items())),
        "faults": progress.faults,
        "cpu_seconds": round(progress.cpu_seconds, 1),
    }
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    new.replace(file)


def _read(file: Path, seed: int) -> dict[str, Any]:
    if not file.exists():
        return {"seed": seed, "kinds": {}}
    state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if state["seed"] != seed:
        raise SystemExit(f"{file}: it continues seed {state['seed']}; choose another file for seed {seed}")
    return state
