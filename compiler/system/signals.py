"""Handlers of signals, kept from libraries that replace them behind Python's back."""

import contextlib
import signal
import threading
from collections.abc import Iterator

_ASKED_FOR = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGPIPE,
    signal.SIGTERM,
    signal.SIGXCPU,
    signal.SIGXFSZ,
)
"""Signals that come from outside; what follows a fault of the process's own is left to faulthandler."""


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Puts back what Python has set for signals, in the main thread, when the context ends.

    LLVM takes them when it first compiles: a file that grows too large then kills the process, where Python raises.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _ASKED_FOR}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # not Python's to set again
                signal.signal(number, handler)
