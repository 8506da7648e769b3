"""Prefill kernels whose tiles are several rows of blocks, and those that read a table: in Triton's interpreter."""

from concurrent.futures import Executor
from typing import Any

import numpy as np
import pytest

import topologies
from gpu_sources import prefill_sources
from prefill_calls import check, kernel_spec, make_call
from surgeon.compiler.kernels.gpu.compile import build_triton
from surgeon.compiler.kernels.gpu.tiling import tiling_of
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.schedule.segment_tables import TableShape
from surgeon.compiler.specs.specialize import specialize_gpu
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.target import Target
from triton_interpreter import launch

pytest.importorskip("triton")


def mixed(block_size: int, seed: int = 0, **shape: Any) -> Topology:
    """Heads of many kinds over 400 tokens or so."""
    options = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "num_blocks": -(-400 // block_size)} | shape
    return topologies.random_topology(np.random.default_rng(seed), num_layers=1, block_size=block_size, **options)


@pytest.mark.parametrize(("block_size", "beyond"), [(16, "window"), (32, "dense"), (64, "window")])
def test_tiles_of_several_rows(pool: Executor, schedule_as: str, block_size: int, beyond: str) -> None:
    topology = mixed(block_size, seed=block_size, num_heads=4, num_kv_heads=2, beyond=beyond)
    cut = tiling_of(kernel_spec(topology))
    assert (cut.query_tile, cut.rows, cut.blocks) == (128, 128 // block_size, 64 // block_size)
    call = make_call(topology, length=530)
    assert bool(call.table) == (schedule_as == "table")
    check(pool, topology, call)


@pytest.mark.parametrize(("block_size", "num_heads", "num_kv_heads"), [(16, 3, 3), (16, 8, 1), (32, 3, 1), (64, 4, 1)])
def test_query_heads_share_kv_heads(pool: Executor, block_size: int, num_heads: int, num_kv_heads: int) -> None:
    topology = mixed(block_size, seed=num_heads, num_heads=num_heads, num_kv_heads=num_kv_heads)
    check(pool, topology, make_call(topology, length=300, dtype="float16"))


@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (32, 80), (64, 128)])
def test_head_sizes(pool: Executor, schedule_as: str, block_size: int, head_dim: int) -> None:
    topology = mixed(block_size, seed=head_dim, head_dim=head_dim)
    check(pool, topology, make_call(topology, length=150, positions=[140]))


@pytest.mark.parametrize("block_size", [16, 64])
def test_left_padding_and_chunks_of_a_longer_cache(pool: Executor, schedule_as: str, block_size: int) -> None:
    topology = mixed(block_size, seed=5)
    call = make_call(topology, length=150, positions=[0, 77, 250], cache_leftpads=[140, 70, 3], spare_keys=9)
    out = check(pool, topology, call)
    assert not out[0, :140].any()


@pytest.mark.parametrize("length", [1, 129])
def test_short_lengths(pool: Executor, schedule_as: str, length: int) -> None:
    topology = mixed(32, seed=length)
    check(pool, topology, make_call(topology, length=length, positions=[0, 200], cache_leftpads=[0, 0]))


def test_rows_that_the_topology_refuses_are_left_alone(pool: Executor, schedule_as: str) -> None:
    topology = mixed(32, seed=1, num_blocks=9, beyond="error")  # the third tile has one row that is not refused
    call = make_call(topology, length=200, positions=[150])
    out, lse = pool.submit(launch, call, True).result()
    covered = 9 * 32 - 150
    assert np.isnan(out[:, covered:]).all()
    assert np.isnan(lse[:, :, covered:]).all()
    check(pool, topology, make_call(topology, length=covered, positions=[150]))


@pytest.mark.parametrize("block_size", [128, 256])
def test_a_table_for_blocks_that_hold_a_tile(pool: Executor, monkeypatch: pytest.MonkeyPatch, block_size: int) -> None:
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", 0)
    topology = mixed(block_size, seed=block_size, num_heads=3, num_blocks=5)
    call = make_call(topology, length=2 * block_size + 30, positions=[3 * block_size - 20], cache_leftpads=[3])
    assert call.table
    check(pool, topology, call)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:86"])
def test_tiles_of_keys_that_are_smaller_than_a_block(pool: Executor, schedule_as: str, target: str) -> None:
    topology = mixed(64, seed=3, head_dim=128)
    cut = tiling_of(kernel_spec(topology, target))
    assert (cut.rows, cut.blocks, cut.key_tile) == (2, 1, 32)
    check(pool, topology, make_call(topology, length=300, positions=[9], target=target))


def scattered(block_size: int) -> Topology:
    """Eight heads that see clusters of eight blocks out of 256, scattered at random."""
    rng = np.random.default_rng(0)
    trees = []
    for _ in range(8):
        place = [*rng.permutation(256).tolist(), *range(256, 512)]
        rows = topologies.balanced_tree(256)
        trees.append({"linkage": [[place[int(left)], place[int(right)], *rest] for left, right, *rest in rows]})
    heads = [topologies.head(index, 3.0, 1, 1) for index in range(8)]
    return topologies.build(
        [heads] * 2, trees, num_kv_heads=2, num_blocks=256, block_size=block_size, head_dim=64, beyond="error"
    )


@pytest.mark.parametrize("block_size", [16, 128])
def test_a_layer_of_scattered_trees_is_a_table(pool: Executor, block_size: int) -> None:
    topology = scattered(block_size)
    pieces = sum(len(head.pieces) for head in kernel_spec(topology).schedule.heads)
    assert pieces > 2000
    (source,) = prefill_sources(specialize_gpu(topology, schedule_layers(topology), Target.parse("cuda:90")))
    assert source.files[0].path == "cuda-90/attention_by_table.py"
    assert len(source.files[0].text.splitlines()) < 250  # its size does not depend on the pieces
    (entry,) = build_triton(source, "bf16").kernels
    assert (entry.schedule, entry.table) == ("attention_000", "prefill_8x4" if block_size == 16 else "prefill_1x1")
    call = make_call(topology, length=40, positions=[block_size * 250 - 25], cache_leftpads=[3])
    check(pool, topology, call)


def test_layers_whose_schedules_are_tables_share_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", 25)
    windows = topologies.head(0, 0.0, 1, 2)
    layers = [[topologies.head(0, cut)] for cut in (3.0, 6.0)] + [[windows]]
    trees = [{"linkage": topologies.tree(64, np.random.default_rng(0), contiguous=False)}]
    topology = topologies.build(layers, trees, num_blocks=64, block_size=128, head_dim=64)
    code, table = prefill_sources(specialize_gpu(topology, schedule_layers(topology), Target.parse("cuda:90")))
    assert [spec.layers for spec in code.specs] == [(2,)]
    assert [spec.layers for spec in table.specs] == [(0,), (1,)]
    entries = build_triton(table, "fp16").kernels
    assert [(entry.schedule, entry.layers) for entry in entries] == [("attention_000", (0,)), ("attention_001", (1,))]
    assert {(entry.file, entry.symbol) for entry in entries} == {
        ("cuda-90/attention_by_table.fp16.cubin", "attention_by_table")
    }


def test_a_layer_in_too_many_groups_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", 10)  # three heads, of three leaves each
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_KERNELS", 2)
    few, many = (topologies.window_topology(range(2, 2 + heads), block_size=128) for heads in (6, 7))
    assert [source.table for source in prefill_sources([kernel_spec(few)])] == ["", ""]
    assert [source.table for source in prefill_sources([kernel_spec(many)])] == [TableShape("prefill").name]
