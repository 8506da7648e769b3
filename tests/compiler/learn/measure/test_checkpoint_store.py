"""The checkpoint store: finished steps are found again, with the time that they took."""

import time
from pathlib import Path

import torch

from surgeon.compiler.learn.measure.checkpoint_store import CheckpointStore, Tensors

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
