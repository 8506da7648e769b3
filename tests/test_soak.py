"""A small part of each soak; `python -m tests.soak` runs them in full."""

import itertools
from pathlib import Path

import pytest

from load_soak import load_beside_compiles
from models import sparse_topology
from surgeon.compiler import compile_package
from surgeon.runtime import load
from thread_soak import THREADS, call_from_threads, mixed_calls


@pytest.mark.slow
def test_a_package_is_loaded_while_compiles_replace_it(tmp_path: Path) -> None:
    found = load_beside_compiles(tmp_path, times=150)
    assert found.faults == []
    assert found.loads == 150
    assert found.changes > 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_threads_get_what_a_single_thread_gets(tmp_path: Path) -> None:
    package = load(compile_package(sparse_topology(), tmp_path / "kernels", dtypes=("fp32",)), strict=True)
    calls = dict(itertools.islice(mixed_calls(package).items(), 0, None, 3))  # some of each kind
    found = call_from_threads(calls, seconds=0)
    assert found.faults == []
    assert found.calls == THREADS * len(calls)
