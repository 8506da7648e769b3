"""The stages of a long run, shown while it works: a line for each, with the time so far and the time that is left."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from surgeon.compiler.system.main_process import is_main_process
from surgeon.compiler.system.terminal import Progress, progress_bar

_QUIET_SECONDS = 60.0  # the longest silence within a stage, where its steps are shorter


@dataclass(frozen=True)
class Stage:
    """A stage of a run: the words that the names of its steps begin with, and the seconds that it should take."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """The expected needs of a run: its stages in order, and its peak memory in bytes, the weights included."""

    stages: tuple[Stage, ...]
    memory_bytes: float

    @property
    def seconds(self) -> float:
        """The time of all stages."""
        return sum(stage.seconds for stage in self.stages)


class StageDisplay:
    """Shows the progress of a long run; call it as `Progress`.

    Lines go to `write`: the forecast, and, unless there is a bar to move, one when a stage begins and one a minute.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        bar: Progress | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write, self._bar, self._clock = write, bar, clock
        self._started = clock()
        self._stages: tuple[Stage, ...] = ()
        self._stage = 0
        self._written: tuple[str, float] | None = None

    def expect(self, forecast: Forecast) -> None:
        """Takes the stages that are to come, and writes what they need."""
        self._stages = forecast.stages
        stages = "1 stage" if len(forecast.stages) == 1 else f"{len(forecast.stages)} stages"
        self._write(
            f"{stages}, about {duration(forecast.seconds)} and {forecast.memory_bytes / 1e9:.1f} GB of memory in all"
        )

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows that `done` of the `total` parts of a step are done."""
        self._stage = self._stage_of(what)
        if self._bar is not None:
            self._bar(what, done, total)
            return
        now = self._clock()
        if self._written is None or what != self._written[0] or now - self._written[1] >= _QUIET_SECONDS:
            self._written = (what, now)
            self._write(self._line(what, done, total, now - self._started))

    def _stage_of(self, what: str) -> int:
        """The first stage from the present one on that a step belongs to; the present one if it is in none."""
        for number, stage in enumerate(self._stages[self._stage :], start=self._stage):
            if what.startswith(stage.name):
                return number
        return self._stage

    def _line(self, what: str, done: int, total: int, spent: float) -> str:
        parts = f"{what}, {done} of {total} done" if done else what
        if not self._stages:
            return f"{parts}: {duration(spent)} so far"
        present, later = self._stages[self._stage], self._stages[self._stage + 1 :]
        left = present.seconds * (1 - done / max(total, 1)) + sum(stage.seconds for stage in later)
        number = f"stage {self._stage + 1} of {len(self._stages)}"
        return f"{number}, {parts}: {duration(spent)} so far, about {duration(left)} left"


@contextmanager
def stage_display() -> Iterator[StageDisplay | None]:
    """Yields a display on standard error: a bar on a terminal, lines elsewhere; None in all but the main process."""
    if not is_main_process() or sys.stderr is None:
        yield None
        return
    with progress_bar() as bar:
        yield StageDisplay(_say, bar)


def expect(progress: Progress | None, forecast: Callable[[], Forecast]) -> None:
    """Announces the stages to come to a display of stages; for any other progress, no forecast is made."""
    if isinstance(progress, StageDisplay):
        progress.expect(forecast())


def duration(seconds: float) -> str:
    """A time in words, in seconds, minutes or hours."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # nobody is reading; the work goes on
        print(f"surgeon: {line}", file=sys.stderr, flush=True)
