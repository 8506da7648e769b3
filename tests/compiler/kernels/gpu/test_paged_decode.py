"""Decoding over keys and values in pages, in Triton's interpreter: equal to the fp64 reference."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import topologies
from compiled_code import spills
from gpu_sources import gpu_sources
from paged_calls import PagedSequence, check_paged, launch_paged, make_paged_call, paged_sources
from surgeon.compiler.kernels.gpu.compile import build_triton
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.specs.specialize import specialize_gpu
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.target import Target

pytest.importorskip("triton")


def mixed(block_size: int, num_heads: int = 4, num_kv_heads: int = 2, seed: int = 0, **shape: Any) -> Topology:
    options = {"head_dim": 16, "num_blocks": -(-400 // block_size), "num_layers": 2} | shape
    return topologies.random_topology(
        np.random.default_rng(seed), num_heads=num_heads, num_kv_heads=num_kv_heads, block_size=block_size, **options
    )


def decoded(*lengths: int) -> list[PagedSequence]:
    return [PagedSequence(1, length) for length in lengths]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("page_blocks", [1, 4])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_sequences_of_different_lengths(pool: Executor, block_size: int, page_blocks: int, dtype: str) -> None:
    topology = mixed(block_size)
    for layer in range(2):
        check_paged(
            pool,
            topology,
            decoded(400, 1, block_size, block_size + 1, 777),
            page_tokens=page_blocks * block_size,
            layer=layer,
            dtype=dtype,
        )


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (3, 1), (8, 1)])
def test_query_heads_share_kv_heads(pool: Executor, num_heads: int, num_kv_heads: int) -> None:
    check_paged(pool, mixed(16, num_heads, num_kv_heads, seed=1), decoded(333, 50), page_tokens=32)


@pytest.mark.parametrize("num_splits", [1, 2, 33])
def test_any_number_of_splits(pool: Executor, num_splits: int) -> None:
    check_paged(pool, mixed(16, seed=2), decoded(1, 5, 160), page_tokens=16, num_splits=num_splits)


@pytest.mark.parametrize("block_size", [16, 128])
def test_each_sequence_has_its_own_dense_rows(pool: Executor, block_size: int) -> None:
    sequences = [PagedSequence(1, 390, dense_from) for dense_from in (0, 391, 390, 300, 384, 385, -7, 1000)]
    check_paged(pool, mixed(block_size, seed=3), sequences, page_tokens=128)


def test_pages_that_no_head_reads_are_holes(pool: Executor) -> None:
    topology = topologies.window_topology([1, 2], sink=1, num_kv_heads=1, block_size=16, head_dim=16)
    call, _ = check_paged(pool, topology, decoded(320), page_tokens=32)
    assert (call.block_table[0] == 0).tolist() == [False, *[True] * 8, False]
    assert np.isnan(call.cache[0]).all()


def test_sequences_with_no_query_or_several_are_left_alone(pool: Executor) -> None:
    topology = mixed(16)
    call, _ = make_paged_call(
        topology, [PagedSequence(0, 30), PagedSequence(1, 70), PagedSequence(3, 44)], page_tokens=16
    )
    decoding = tuple(source for source in call.sources if source.phase != "paged_prefill")
    out = pool.submit(launch_paged, replace(call, sources=decoding)).result()
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1:]).all()


def test_a_query_that_stands_for_none_gets_zeros(pool: Executor) -> None:
    call, _ = make_paged_call(mixed(16), decoded(20, 20), page_tokens=16)
    call.lengths[0] = 0
    out = pool.submit(launch_paged, call).result()
    assert not out[0].any()
    assert out[1].all()


def test_rows_that_the_topology_refuses_are_nan(pool: Executor) -> None:
    heads = [topologies.DENSE, topologies.head(0, 1.0, 1, 2)]
    tree = {"linkage": topologies.balanced_tree(4)}
    topology = topologies.build([heads], [tree], num_blocks=4, beyond="error", block_size=16, head_dim=16)
    call, _ = make_paged_call(topology, decoded(64, 64), page_tokens=16)
    call.lengths[1] = 65
    out = pool.submit(launch_paged, call).result()
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (12, 3)])
def test_a_part_of_the_kv_heads_is_the_whole_for_them(pool: Executor, num_heads: int, num_kv_heads: int) -> None:
    group = num_heads // num_kv_heads
    call, out = check_paged(pool, mixed(16, num_heads, num_kv_heads, seed=4), decoded(300, 7), page_tokens=64)
    for own in (range(1), range(1, num_kv_heads)):
        part = pool.submit(launch_paged, call.part(own)).result()
        np.testing.assert_array_equal(part, out[:, group * own.start : group * own.stop])


# Compiled


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:120", "hip:gfx942"])
def test_targets_build_without_spills(target: str, tmp_path: Path) -> None:
    topology = mixed(128, 8, 2, head_dim=128)
    for source in paged_sources(topology, 0, target):
        binary = build_triton(source, "bf16")
        (entry,) = binary.kernels
        assert entry.phase == source.phase
        assert entry.file.startswith(f"{target.replace(':', '-')}/paged_")
        assert spills(binary, tmp_path) == 0


def test_as_many_keys_are_in_flight_as_without_a_table() -> None:
    topology = mixed(128, 8, 2, head_dim=128)
    specs = specialize_gpu(topology, schedule_layers(topology), Target.parse("cuda:90"), paged=True)
    shared = {}
    for source in gpu_sources([spec for spec in specs if 0 in spec.layers]):
        (entry,) = build_triton(source, "bf16").kernels
        assert entry.launch is not None
        shared[source.phase] = entry.launch.shared_bytes
    for phase in ("prefill", "decode"):
        assert shared[phase] <= shared[f"paged_{phase}"] < shared[phase] + 2048


def test_golden(golden: Callable[[str, str], None]) -> None:
    topology = mixed(64, 8, 2, head_dim=80)
    specs = specialize_gpu(topology, schedule_layers(topology), Target.parse("cuda:90"), paged=True)
    texts = {source.phase: source.files[0].text for source in gpu_sources(specs)}
    golden("paged_decode_triton.py.txt", texts["paged_decode"])
    golden("paged_combine_triton.py.txt", texts["paged_combine"])
