"""Prefill kernels for some of a layer's KV heads: equal to those for all, in Triton's interpreter."""

from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import topologies
from gpu_sources import prefill_sources
from prefill_calls import check, kernel_spec, make_call
from surgeon.compiler.kernels.gpu.row_trees import num_leaves
from surgeon.compiler.topology.topology import Topology
from triton_interpreter import launch, part_of, query_heads

pytest.importorskip("triton")


def mixed(block_size: int, num_heads: int, num_kv_heads: int) -> Topology:
    """Heads of many kinds over 400 tokens or so."""
    return topologies.random_topology(
        np.random.default_rng(num_heads),
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        block_size=block_size,
        num_blocks=-(-400 // block_size),
    )


@pytest.mark.parametrize(
    ("schedule_as", "block_size", "num_heads", "num_kv_heads"),
    [("code", 16, 6, 2), ("code", 128, 3, 3), ("code", 128, 12, 3), ("table", 16, 12, 3), ("table", 128, 6, 2)],
)
def test_a_part_of_the_kv_heads_is_the_whole_for_them(
    pool: Executor,
    schedule_as: str,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", 0 if schedule_as == "table" else 10_000)
    topology = mixed(block_size, num_heads, num_kv_heads)
    call = make_call(topology, length=70, positions=[0, 250], cache_leftpads=[65, 3], spare_keys=9)
    assert bool(call.table) == (schedule_as == "table")
    check(pool, topology, call)
    out, lse = pool.submit(launch, call, True).result()
    for own in (range(1), range(1, num_kv_heads)):
        heads = query_heads(call, own)
        part, part_lse = pool.submit(launch, part_of(call, own), True).result()
        np.testing.assert_array_equal(part, out[:, :, heads])
        np.testing.assert_array_equal(part_lse, lse[:, heads])


@pytest.mark.parametrize("own", [range(1), range(1, 3), range(1, 2)])
def test_kernels_for_groups_of_heads_give_their_heads_of_a_part(
    pool: Executor, own: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = topologies.window_topology([1, 2, 3, 4, 5, 2], num_kv_heads=3, block_size=128, head_dim=16, num_blocks=6)
    call = make_call(topology, length=200, positions=[400], cache_leftpads=[3])
    out, lse = pool.submit(launch, call, True).result()
    leaves = sum(map(num_leaves, kernel_spec(topology).schedule.heads[:3]))
    monkeypatch.setattr("surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", leaves)
    sources = prefill_sources([kernel_spec(topology)])
    assert [source.heads for source in sources] == [(0, 3), (3, 6)]  # the second KV head is in both
    first = query_heads(call, own).start
    for source in sources:
        kernel = replace(call, text=source.files[0].text, name=Path(source.files[0].path).stem, heads=source.heads)
        part, part_lse = pool.submit(launch, part_of(kernel, own), True).result()
        for head in range(part.shape[2]):
            if first + head in range(*source.heads):
                np.testing.assert_array_equal(part[:, :, head], out[:, :, first + head])
                np.testing.assert_array_equal(part_lse[:, head], lse[:, first + head])
            else:
                assert np.isnan(part[:, :, head]).all()
                assert np.isnan(part_lse[:, head]).all()
