"""Rows of blocks that see every key, at the end of a prompt and in decoding: equal to the fp64 reference."""

from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import reference
import topologies
from prefill_calls import TOLERANCE, check, expected, make_call
from surgeon.compiler.topology.topology import Topology
from triton_interpreter import launch, part_of, query_heads

pytest.importorskip("triton")


def sparse(block_size: int, seed: int = 0, tokens: int = 500, **shape: Any) -> Topology:
    """Heads with few blocks: of a tree with scattered clusters, and only the row's own."""
    num_blocks = -(-tokens // block_size)
    linkage = topologies.tree(num_blocks, np.random.default_rng(seed), contiguous=False)
    heads = [topologies.head(0, 1.0, 1, 1), topologies.head(0, 0.0, 0, 1)]
    options = {"num_kv_heads": 1, "head_dim": 16, "num_blocks": num_blocks, "block_size": block_size} | shape
    return topologies.build([heads], [{"linkage": linkage}], **options)


@pytest.mark.parametrize("block_size", [16, 64, 128, 256])
@pytest.mark.parametrize("dense_rows", [1, 70, 100_000])
def test_the_end_of_a_call(pool: Executor, schedule_as: str, block_size: int, dense_rows: int) -> None:
    """Each sequence has its own position and padding, and so its own first dense row."""
    topology = sparse(block_size, seed=block_size)
    call = make_call(
        topology, length=150, dense_rows=dense_rows, positions=[0, 77, 301], cache_leftpads=[140, 70, 3], spare_keys=9
    )
    assert bool(call.table) == (schedule_as == "table")
    check(pool, topology, call)


@pytest.mark.parametrize("dense_rows", [*range(1, 66, 16), 97, 129])
def test_every_place_in_a_tile_at_which_dense_rows_may_begin(pool: Executor, dense_rows: int) -> None:
    topology = sparse(16, tokens=320)
    check(pool, topology, make_call(topology, length=90, positions=[201], dense_rows=dense_rows))


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("length", [1, 3])
def test_a_few_tokens_after_a_long_cache(pool: Executor, block_size: int, length: int) -> None:
    topology = sparse(block_size)
    call = make_call(
        topology, length=length, dense_rows=length, positions=[0, 255, 256, 400], cache_leftpads=[0, 0, 0, 41]
    )
    check(pool, topology, call)


@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("tokens_ahead", [10, 20, 30, 60, 128, 500])
def test_rows_counted_from_an_end_that_later_calls_bring(pool: Executor, block_size: int, tokens_ahead: int) -> None:
    topology = sparse(block_size)
    call = make_call(
        topology, length=75, dense_rows=20, tokens_ahead=tokens_ahead, positions=[130, 170], cache_leftpads=[0, 5]
    )
    check(pool, topology, call)


@pytest.mark.parametrize("block_size", [16, 128])
def test_chunks_of_a_prompt_give_what_one_call_gives(pool: Executor, block_size: int) -> None:
    topology = sparse(block_size)
    whole = make_call(topology, length=300, cache_leftpads=[7], dense_rows=100)
    expected_out, expected_lse = expected(topology, whole)
    for begin, end in [(0, 150), (150, 220), (220, 299), (299, 300)]:
        chunk = replace(whole, q=whole.q[:, begin:end], position=whole.position + begin, tokens_ahead=300 - end)
        out, lse = pool.submit(launch, chunk, True).result()
        error = reference.relative_error(torch.from_numpy(out), expected_out[:, begin:end])
        assert error <= TOLERANCE["float32"]
        np.testing.assert_allclose(lse, expected_lse[:, :, begin:end], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_rows_before_the_dense_ones_keep_their_bits(pool: Executor, schedule_as: str, block_size: int) -> None:
    topology = sparse(block_size)
    call = make_call(topology, length=200, positions=[180])
    pattern, pattern_lse = pool.submit(launch, call, True).result()
    dense, dense_lse = pool.submit(launch, replace(call, dense_rows=60), True).result()
    first = 320 // block_size * block_size - 180
    assert 0 < first < 200
    np.testing.assert_array_equal(dense[:, :first], pattern[:, :first])
    np.testing.assert_array_equal(dense_lse[:, :, :first], pattern_lse[:, :, :first])
    assert (dense_lse[:, 1, first:] > pattern_lse[:, 1, first:]).all()  # which saw their own block alone


@pytest.mark.parametrize(("block_size", "dtype"), [(16, "float16"), (32, "float32"), (128, "float16")])
def test_dense_rows_of_heads_that_share_kv_heads(pool: Executor, block_size: int, dtype: str) -> None:
    topology = topologies.random_topology(
        np.random.default_rng(block_size),
        num_layers=1,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        block_size=block_size,
        num_blocks=-(-300 // block_size),
    )
    call = make_call(topology, length=130, positions=[170], cache_leftpads=[5], dtype=dtype, dense_rows=50)
    out = check(pool, topology, call)
    part, _ = pool.submit(launch, part_of(call, range(1, 2)), True).result()
    np.testing.assert_array_equal(part, out[:, :, query_heads(call, range(1, 2))])


@pytest.mark.parametrize("beyond", ["window", "dense"])
def test_dense_rows_beyond_the_topology(pool: Executor, schedule_as: str, beyond: str) -> None:
    topology = sparse(32, tokens=288, beyond=beyond)
    check(pool, topology, make_call(topology, length=200, positions=[180], dense_rows=60))


def test_dense_rows_that_the_topology_refuses_are_left_alone(pool: Executor, schedule_as: str) -> None:
    topology = sparse(32, tokens=288, beyond="error")
    covered = 288 - 150
    out, lse = pool.submit(launch, make_call(topology, length=200, positions=[150], dense_rows=150), True).result()
    assert np.isnan(out[:, covered:]).all()
    assert np.isnan(lse[:, :, covered:]).all()
    assert np.isfinite(out[:, :covered]).all()
    check(pool, topology, make_call(topology, length=covered, positions=[150], dense_rows=60))
