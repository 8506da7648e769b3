"""Triton's interpreter, and the two ways in which prefill kernels hold their schedules."""

from collections.abc import Iterator
from concurrent.futures import Executor

import pytest

from triton_interpreter import interpreter


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    """A process in which Triton interprets."""
    with interpreter() as executor:
        yield executor


@pytest.fixture(params=["code", "table"])
def schedule_as(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the kernels hold their schedules as code or as tables."""
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", 0 if request.param == "table" else 10_000)
    return str(request.param)
