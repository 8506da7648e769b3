"""Rows of blocks that see every key, at the end of a prompt and in decoding: equal to the fp64 reference."""

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import reference
import topologies
from prefill_calls import check, expected, kernel_spec, make_call
from surgeon.compiler.kernels.gpu.tiling import tiling_of
from surgeon.compiler.topology.topology import Topology
from triton_interpreter import interpreter, launch, part_of, query_heads

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with interpreter() as executor:
        yield executor


@pytest.fixture(params=["code", "table"])
def schedule_as(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes the kernels hold their schedules as code or as tables."""
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", 0 if request.param == "table" else 10_000)
    return str(request.param)


def mixed(block_size: int, seed: int = 0, **shape: Any) -> Topology:
    """Heads of many kinds over 500 tokens or so, none of which sees everything."""
    options = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "num_blocks": -(-500 // block_size)} | shape
    return topologies.random_topology(np.random.default_rng(seed), num_layers=1, block_size=block_size, **options)


def windows(block_size: int, **shape: Any) -> Topology:
    options = {"num_kv_heads": 1, "head_dim": 16, "num_blocks": -(-500 // block_size)} | shape
    return topologies.window_topology([1, 2], sink=1, block_size=block_size, **options)


@pytest.mark.parametrize("block_size", [16, 64, 128, 256])
@pytest.mark.parametrize("dense_rows", [1, 70, 200, 100_000])
def test_the_rows_at_the_end_of_a_call(pool: Executor, schedule_as: str, block_size: int, dense_rows: int) -> None:
    """Each sequence has another position and padding, and so another first dense row."""
    topology = mixed(block_size, seed=block_size)
    rest = {"positions": [0, 77, 301], "cache_leftpads": [140, 70, 3], "spare_keys": 9}
    call = make_call(topology, length=150, dense_rows=dense_rows, **rest)
    assert bool(call.table) == (schedule_as == "table")
    check(pool, topology, call)
