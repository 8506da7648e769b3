"""The checkpoint store: finished steps are found again, with the time that they took."""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from surgeon.compiler.learn.measure.checkpoint_store import CheckpointStore, Tensors
from surgeon.runtime.errors import ModelError

BUSY = 0.05


def busy() -> Tensors:
    until = time.process_time() + BUSY
    while time.process_time() < until:
        pass
    return {"a": torch.arange(3)}


def test_a_step_found_says_what_it_took(tmp_path: Path) -> None:
    first = CheckpointStore(tmp_path)
    done = first.once({"step": "busy"}, busy)
    assert (first.computed, first.found, first.found_seconds) == (1, 0, 0.0)
    for _ in range(2):
        assert torch.equal(first.once({"step": "busy"}, busy)["a"], done["a"])
    assert (first.computed, first.found, first.found_seconds) == (1, 0, 0.0)  # its own, not an earlier run's

    second = CheckpointStore(tmp_path)
    for _ in range(2):
        assert torch.equal(second.once({"step": "busy"}, busy)["a"], done["a"])
    assert (second.computed, second.found) == (0, 1)
    assert BUSY <= second.found_seconds < 100 * BUSY
    second.once({"step": "another"}, busy)
    assert second.computed == 1


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"x"), lambda file: (file.unlink(), os.mkfifo(file))])
def test_a_damaged_result_says_what_to_delete(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    CheckpointStore(tmp_path).keep({"step": 1}, {"a": torch.arange(3)}, 0.0)
    (file,) = tmp_path.iterdir()
    damage(file)
    with pytest.raises(ModelError, match=rf"{file}: expected the result of an earlier step, .*; delete {tmp_path} and"):
        CheckpointStore(tmp_path).find({"step": 1})


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    store, limits = CheckpointStore(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            store.keep({"step": 1}, {"a": torch.zeros(1000)}, 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value.filename).startswith(f"{tmp_path}/")
    assert list(tmp_path.iterdir()) == []
