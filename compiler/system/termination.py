"""SIGTERM and SIGHUP as an exception, so that running compilers end and scratch folders go, as at an interrupt."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(BaseException):
    """The process has been asked to end by `signal`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raises Terminated in the main thread at the first such signal, where nobody else handles or ignores it.

    Processes that a launcher started together end at once, as it expects: one may wait for others in a call that no
    exception leaves.
    """
    ours = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if not ours or not alone or threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, _frame: FrameType | None) -> None:
        for other in ours:
            signal.signal(other, signal.SIG_IGN)  # so that the clean-up comes to its end
        raise Terminated(number)

    for number in ours:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
