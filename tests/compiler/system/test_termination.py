"""Signals that ask a process to end, as an exception."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from surgeon.compiler.system.termination import Terminated, terminable


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    """Signals as a shell in a terminal gives them: who runs the tests under nohup has SIGHUP ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_an_exception_and_a_second_one_waits_for_the_clean_up(number: signal.Signals) -> None:
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(number)

    with pytest.raises(Terminated, match=number.name) as caught, terminable():
        work()
    assert caught.value.signal == number
    assert cleaned == [number]
    assert signal.getsignal(number) == signal.SIG_DFL


def test_what_others_handle_or_ignore_stays_theirs() -> None:
    seen: list[int] = []
    handlers = signal.SIG_IGN, lambda number, _frame: seen.append(number)
    before = signal.signal(signal.SIGHUP, handlers[0]), signal.signal(signal.SIGTERM, handlers[1])
    try:
        with terminable():
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_one_of_several_processes_ends_as_its_launcher_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with terminable():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_another_thread_leaves_signals_alone() -> None:
    def handler() -> object:
        with terminable():
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(handler).result() == signal.SIG_DFL
