"""The processes that compile for GPUs end with the work, and leave nothing behind."""

import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_sources import prefill_sources
from prefill_calls import kernel_spec
from processes import ended
from surgeon.compiler.kernels.gpu import pool
from surgeon.compiler.kernels.gpu.pool import build_gpu
from surgeon.compiler.specs.artifacts import Binary, GpuSource
from surgeon.compiler.system.cache import Cache
from surgeon.runtime.errors import BuildError
from topologies import window_topology

pytest.importorskip("triton")

HANGS = """
import pathlib, subprocess, sys
sleeping = subprocess.Popen(["sleep", "600"])
pathlib.Path({file!r}).write_text(str(sleeping.pid))
sleeping.wait()
"""


DIES = """
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def hanging(tmp_path: Path) -> GpuSource:
    """A source whose compilation starts another process and waits for it."""
    (source,) = prefill_sources([kernel_spec(window_topology([1]))])
    (file,) = source.files
    return replace(source, files=(replace(file, text=HANGS.format(file=str(tmp_path / "sleeping"))),))


@pytest.mark.parametrize("interrupted", [False, True], ids=["the time is over", "an interrupt"])
def test_a_compiler_that_hangs_is_ended(
    hanging: GpuSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    def until_it_hangs(
        left: Iterable[Future[Binary]], limit: float | None, _when: str
    ) -> tuple[set[Future[Binary]], Iterable[Future[Binary]]]:
        assert limit == 7
        while not (tmp_path / "sleeping").exists() or not (tmp_path / "sleeping").read_text():
            assert not any(future.done() for future in left)
            time.sleep(0.02)
        if interrupted:
            raise KeyboardInterrupt
        return set(), left

    monkeypatch.setenv("SURGEON_COMPILER_SECONDS", "7")
    monkeypatch.setattr(pool, "wait", until_it_hangs)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = KeyboardInterrupt if interrupted else BuildError
    message = None if interrupted else r"triton, compiling for cuda:90: expected an end within 7 s, got .*_SECONDS"
    with pytest.raises(expected, match=message):
        build_gpu([hanging], Cache(tmp_path / "cache"), 2)
    ended(int((tmp_path / "sleeping").read_text()))
    assert not list(tmp_path.glob("surgeon-*"))


def test_a_process_that_ends_early_is_an_error_that_says_what_to_do(hanging: GpuSource, tmp_path: Path) -> None:
    (file,) = hanging.files
    dying = replace(hanging, files=(replace(file, text=DIES),))
    with pytest.raises(BuildError, match=r"cuda:90: expected processes .* got one that ended early; see"):
        build_gpu([dying], Cache(tmp_path / "cache"), 1)
