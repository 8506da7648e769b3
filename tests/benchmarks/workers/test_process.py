"""A worker's process: its answers and times, what its library prints, and every way in which it may end."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from surgeon.runtime.errors import ModelError
from workers.process import Worker

ENGINE = """
import os
import time

class Counting:
    versions = {"counting": "1.2"}

    def __init__(self, start):
        self.start = start

    def generate(self, prompt, new_tokens, on_token):
        print("a library that talks")
        os.write(1, b"and one in C\\n")
        if prompt == [0]:
            raise ValueError("a prompt\\nof nothing")
        if prompt == [1]:
            os._exit(7)
        for token in range(new_tokens):
            time.sleep(0.05)
            on_token(self.start + sum(prompt) + token)

def load(start):
    print("loading")
    if start < 0:
        raise OSError("no weights")
    return Counting(start)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "counting.py").write_text(ENGINE, encoding="utf-8")
    return tmp_path


@pytest.fixture
def worker(place: Path) -> Iterator[Worker]:
    with started(place) as worker:
        yield worker


def started(place: Path, module: str = "counting", start: int = 100, python: str = sys.executable) -> Worker:
    return Worker(Path(python), module, {"start": start}, place / "log", {"PYTHONPATH": str(place)})


def test_answers_and_their_times(worker: Worker) -> None:
    assert worker.versions == {"counting": "1.2"}
    started = time.perf_counter()
    one, other = worker.ask([1, 2], 4), worker.ask([5], 1)
    clock = time.perf_counter() - started
    assert (one.tokens, other.tokens) == ((103, 104, 105, 106), (105,))
    assert one.first_s >= 0.05
    assert one.first_s + 3 * 0.05 <= one.whole_s
    assert one.whole_s + other.whole_s <= clock
    assert other.first_s == other.whole_s
    assert 0 <= one.first_cpu_s <= one.whole_cpu_s < one.whole_s, "sleeping takes no CPU time"


def test_what_a_library_prints_goes_to_the_log(place: Path, worker: Worker) -> None:
    worker.ask([5], 1)
    log = (place / "log").read_text(encoding="utf-8")
    assert "and one in C" in log


def test_an_engine_that_fails_says_why_and_is_gone(place: Path, worker: Worker) -> None:
    with pytest.raises(
        ModelError, match=r"counting: expected its answer, got ValueError: a prompt of nothing; read .*log"
    ):
        worker.ask([0], 1)
    with pytest.raises(ModelError, match="its process ended with 1"):
        worker.ask([5], 1)


def test_a_process_that_dies(worker: Worker) -> None:
    with pytest.raises(ModelError, match="expected its answer, got its process ended with 7"):
        worker.ask([1], 1)


def test_an_engine_that_does_not_load(place: Path) -> None:
    with pytest.raises(ModelError, match="counting: expected its ready, got OSError: no weights"):
        started(place, start=-1)


def test_a_library_that_is_not_installed(place: Path) -> None:
    with pytest.raises(ModelError, match="got ModuleNotFoundError: No module named 'absent'"):
        started(place, module="absent")


def test_an_environment_that_is_not_there(place: Path) -> None:
    with pytest.raises(ModelError, match=r"expected an interpreter, got .*No such file.*; make its environment first"):
        started(place, python=str(place / "bin/python"))
