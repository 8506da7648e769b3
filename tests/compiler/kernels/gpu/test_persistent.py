"""Persistent programs of prefill kernels, in Triton's interpreter: together they do each task once."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import topologies
from gpu_sources import prefill_sources
from prefill_calls import check, kernel_spec, make_call, render_whole, use_tile
from surgeon.compiler.specs.tiles import Tile
from surgeon.compiler.topology.topology import Topology
from triton_interpreter import Call, count_tasks, launch, part_of

pytest.importorskip("triton")


def mixed(block_size: int, **shape: Any) -> Topology:
    """Heads of many kinds over 400 tokens or so."""
    options = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "num_blocks": -(-400 // block_size)} | shape
    rng = np.random.default_rng(block_size)
    return topologies.random_topology(rng, num_layers=1, block_size=block_size, **options)


def both(topology: Topology, tile: Tile, monkeypatch: pytest.MonkeyPatch, programs: int = 3) -> tuple[Call, Call]:
    """A chunk's call with a program for each task, and with persistent ones; the last rows are dense.

    One sequence starts before its first key, one has only padding.
    """
    found = []
    for persistent in (False, True):
        with monkeypatch.context() as patch:
            use_tile(replace(tile, persistent=persistent), patch)
            found.append(
                make_call(
                    topology,
                    length=150,
                    positions=(250, 0, 0),
                    cache_leftpads=(3, 77, 150),
                    dense_rows=40,
                    programs=programs,
                )
            )
    one, other = found
    assert (one.programs, other.programs) == (None, programs)
    return one, other


@pytest.mark.parametrize("programs", [1, 5, 100])
@pytest.mark.parametrize("block_size", [32, 128])
def test_any_number_of_programs_does_every_task_once(
    pool: Executor, schedule_as: str, block_size: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = mixed(block_size)
    _, call = both(topology, Tile(128, 64, 8, 3), monkeypatch, programs)
    assert bool(call.table) == (schedule_as == "table")
    check(pool, topology, call)
    there, done = pool.submit(count_tasks, call).result()
    assert done == there
    assert 5 < there < 100


@pytest.mark.parametrize("tile", [Tile(128, 64, 8, 3, "descriptors"), Tile(64, 64, 8, 3, "descriptors", heads=2)])
@pytest.mark.parametrize(
    ("block_size", "shape"),
    [(32, {"num_heads": 8}), (32, {"beyond": "error"}), (128, {"head_dim": 80}), (128, {"beyond": "error"})],
)
def test_persistent_programs_give_what_others_give(
    pool: Executor, tile: Tile, shape: dict[str, Any], block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in zip(*(parts(call) for call in both(mixed(block_size, **shape), tile, monkeypatch)), strict=True):
        one, other = (pool.submit(launch, each, True).result() for each in call)
        for found, expected in zip(other, one, strict=True):
            np.testing.assert_array_equal(found, expected)


def parts(call: Call) -> tuple[Call, Call]:
    """The call, and that of its last KV head."""
    return call, part_of(call, range(1, 2))


def test_golden(golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    use_tile(Tile(128, 64, 8, 3, persistent=True), monkeypatch)
    topology = topologies.window_topology([1, 2], num_kv_heads=1, block_size=128, head_dim=64, num_blocks=6)
    golden("persistent_triton.py.txt", render_whole(kernel_spec(topology)).files[0].text)


def test_persistent_programs_for_a_group_of_heads(pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = topologies.window_topology([1, 2, 3, 4], num_kv_heads=2, block_size=128, head_dim=16, num_blocks=6)
    _, call = both(topology, Tile(128, 64, 8, 3), monkeypatch)
    out, lse = pool.submit(launch, call, True).result()
    use_tile(Tile(128, 64, 8, 3, persistent=True), monkeypatch)
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", 4)
    for source in prefill_sources([kernel_spec(topology)]):
        first, end = source.heads
        kernel = replace(call, text=source.files[0].text, name=Path(source.files[0].path).stem, heads=source.heads)
        own, own_lse = pool.submit(launch, kernel, True).result()
        np.testing.assert_array_equal(own[:, :, first:end], out[:, :, first:end])
        np.testing.assert_array_equal(own_lse[:, first:end], lse[:, first:end])
        assert np.isnan(np.delete(own, range(first, end), axis=2)).all()
