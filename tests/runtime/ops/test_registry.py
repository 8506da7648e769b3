"""The registry of loaded packages, from several threads."""

import gc
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from surgeon.runtime.errors import PackageError
from surgeon.runtime.ops import registry


class Loaded:
    """Stands for the kernels of one load."""

    def __init__(self, name: str) -> None:
        self.id = name


@pytest.fixture
def quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("quick_switches")
def test_a_package_is_found_while_others_load() -> None:
    kept = Loaded("kept")
    registry.register(kept)  # type: ignore[arg-type]
    ended = threading.Event()

    def load(name: str) -> None:
        for _ in range(300):
            loads = [Loaded("kept"), Loaded(name)]
            for one in loads:
                registry.register(one)  # type: ignore[arg-type]
            assert registry.find(name) is loads[1]

    def call() -> int:
        calls = 0
        while not ended.is_set():
            assert registry.find("kept").id == "kept"
            calls += 1
        return calls

    with ThreadPoolExecutor(6) as pool:
        calling = [pool.submit(call) for _ in range(2)]
        try:
            for loading in [pool.submit(load, f"thread {number}") for number in range(4)]:
                loading.result()
        finally:
            ended.set()
        assert all(call.result() for call in calling)
    gc.collect()
    assert registry.find("kept") is kept


def test_what_nobody_holds_is_forgotten() -> None:
    one = Loaded("package:strict")
    registry.register(one)  # type: ignore[arg-type]
    del one
    gc.collect()
    with pytest.raises(PackageError, match=r"expected package package loaded with strict, got none with this id"):
        registry.find("package:strict")
    registry.register(Loaded("another"))  # type: ignore[arg-type]
    assert "package:strict" not in registry._runners
