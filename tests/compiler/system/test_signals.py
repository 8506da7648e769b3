"""Signals do after a context what they did before it, whatever a library in C has set meanwhile."""

import ctypes
import signal
import threading

import pytest

from processes import ignored_signals
from surgeon.compiler.system.signals import signals_kept


def take(number: int) -> None:
    """Sets a signal back to its default behind Python's back, as a library in C does."""
    ctypes.CDLL(None).signal(number, ctypes.c_void_p(0))


@pytest.mark.parametrize("number", [signal.SIGXFSZ, signal.SIGPIPE])
def test_what_python_ignores_is_ignored_again(number: signal.Signals) -> None:
    assert number in ignored_signals()
    with signals_kept():
        take(number)
        assert number not in ignored_signals()
    assert number in ignored_signals()


def test_an_error_passes_and_handlers_are_back() -> None:
    """A shell ignores SIGINT in what it starts in the background, as it may have started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def work() -> None:
        with signals_kept():
            take(signal.SIGINT)
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError):
            work()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_changes_nothing() -> None:
    def work() -> None:
        with signals_kept():
            take(signal.SIGXFSZ)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.SIGXFSZ not in ignored_signals()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
