"""Prefill of packed queries over keys and values in pages, in Triton's interpreter: equal to the fp64 reference."""

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import topologies
from gpu_sources import gpu_sources
from paged_calls import PagedSequence, check_paged, launch_paged, make_paged_call
from prefill_calls import use_tile
from surgeon.compiler.kernels.gpu.row_trees import num_leaves
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.specs.specialize import specialize_gpu
from surgeon.compiler.specs.tiles import Tile
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import TargetError
from surgeon.runtime.package.target import Target
from topologies import window_head

pytest.importorskip("triton")

MIXED_BATCH = [PagedSequence(*each) for each in ((150, 150), (1, 300), (0, 20), (33, 287), (2, 2), (129, 129))]
"""Whole prompts, a chunk, sequences that decode, and one that stands for none."""


def mixed(block_size: int, num_heads: int = 4, num_kv_heads: int = 2, seed: int = 0, **shape: Any) -> Topology:
    options = {"head_dim": 16, "num_blocks": -(-300 // block_size), "num_layers": 1} | shape
    return topologies.random_topology(
        np.random.default_rng(seed), num_heads=num_heads, num_kv_heads=num_kv_heads, block_size=block_size, **options
    )


@pytest.mark.parametrize("page_blocks", [1, 4])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_a_batch_of_prompts_chunks_and_decoding(
    pool: Executor, schedule_as: str, block_size: int, page_blocks: int
) -> None:
    call, _ = check_paged(pool, mixed(block_size), MIXED_BATCH, page_tokens=page_blocks * block_size)
    assert bool(call.sources[0].table) == (schedule_as == "table")


@pytest.mark.parametrize("head_dim", [64, 80])
def test_half_precision(pool: Executor, head_dim: int) -> None:
    check_paged(pool, mixed(64, head_dim=head_dim), [PagedSequence(70, 200)], page_tokens=64, dtype="float16")


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (3, 1), (8, 2)])
def test_query_heads_share_kv_heads(pool: Executor, num_heads: int, num_kv_heads: int) -> None:
    topology = mixed(16, num_heads, num_kv_heads, seed=1)
    check_paged(pool, topology, [PagedSequence(40, 90), PagedSequence(5, 260)], page_tokens=32)


def test_programs_of_two_heads(pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tile(Tile(64, 64, 8, 3, heads=2), monkeypatch)
    call, _ = check_paged(pool, mixed(32), [PagedSequence(100, 150), PagedSequence(9, 270)], page_tokens=64)
    assert call.sources[0].tile.heads == 2


@pytest.mark.parametrize("tile", [Tile(128, 64, 8, 3, "descriptors"), Tile(128, 64, 8, 3, persistent=True)])
def test_other_variants_have_plain_loads_and_a_program_for_each_tile(
    pool: Executor, tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tile(tile, monkeypatch)
    call, _ = check_paged(pool, mixed(64), [PagedSequence(100, 150)], page_tokens=64)
    assert call.sources[0].tile.variant == ()


@pytest.mark.parametrize("block_size", [16, 128])
def test_each_sequence_has_its_own_dense_rows(pool: Executor, schedule_as: str, block_size: int) -> None:
    sequences = [PagedSequence(60, 290, dense_from) for dense_from in (0, 250, 289, 290, 291, -9, 400)]
    call, _ = check_paged(pool, mixed(block_size, 2, 1, seed=2), sequences, page_tokens=128)
    assert bool(call.sources[0].table) == (schedule_as == "table")


@pytest.mark.parametrize("block_size", [16, 64])
def test_chunks_of_a_prompt_give_what_one_call_gives(pool: Executor, block_size: int) -> None:
    topology = mixed(block_size, seed=3)
    call, _ = make_paged_call(topology, [PagedSequence(280, 280, 200)], page_tokens=64)
    whole = pool.submit(launch_paged, call).result()
    for begin, end in [(0, 64), (64, 190), (190, 279), (279, 280)]:
        chunk = replace(
            call,
            q=call.q[begin:end],
            query_start=np.array([0, end - begin], dtype=np.int32),
            lengths=np.array([end], dtype=np.int32),
        )
        found = pool.submit(launch_paged, chunk).result()
        np.testing.assert_allclose(found, whole[begin:end], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("beyond", ["window", "dense"])
def test_rows_beyond_the_topology(pool: Executor, schedule_as: str, beyond: str) -> None:
    topology = mixed(32, beyond=beyond, num_blocks=5)
    check_paged(pool, topology, [PagedSequence(100, 300), PagedSequence(170, 170)], page_tokens=32)


def test_rows_that_the_topology_refuses_are_left_alone(pool: Executor, schedule_as: str) -> None:
    topology = mixed(32, num_blocks=5, beyond="error")
    call, _ = make_paged_call(topology, [PagedSequence(100, 160)], page_tokens=32)
    call.lengths[0] = 200
    out = pool.submit(launch_paged, replace(call, block_table=np.tile(call.block_table, 2))).result()
    assert np.isnan(out[60:]).all()
    check_paged(pool, topology, [PagedSequence(100, 160)], page_tokens=32)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (12, 3)])
def test_a_part_of_the_kv_heads_is_the_whole_for_them(pool: Executor, num_heads: int, num_kv_heads: int) -> None:
    group = num_heads // num_kv_heads
    topology = mixed(32, num_heads, num_kv_heads, seed=4)
    call, out = check_paged(pool, topology, [PagedSequence(70, 200), PagedSequence(1, 9)], page_tokens=64)
    for own in (range(1), range(1, num_kv_heads)):
        part = pool.submit(launch_paged, call.part(own)).result()
        np.testing.assert_array_equal(part, out[:, group * own.start : group * own.stop])


def test_heads_in_kernels_of_their_own(pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = mixed(128, 4, 2, seed=5)
    specs = specialize_gpu(topology, schedule_layers(topology), Target.parse("cuda:90"))
    monkeypatch.setattr(
        "surgeon.compiler.kernels.gpu.prefill.MAX_LEAVES", max(map(num_leaves, specs[0].schedule.heads))
    )
    call, _ = check_paged(pool, topology, [PagedSequence(150, 280)], page_tokens=128)
    heads = [source.heads for source in call.sources if source.phase == "paged_prefill"]
    assert len(heads) > 1
    assert heads[0][0] == 0
    assert heads[-1][1] == 4


def test_a_group_with_too_many_heads_is_decoded_by_the_prefill_kernel(pool: Executor) -> None:
    topology = topologies.window_topology([1, 2] * 16, num_kv_heads=1, block_size=16, head_dim=16, num_blocks=8)
    call, _ = check_paged(pool, topology, [PagedSequence(1, 60), PagedSequence(5, 30)], page_tokens=16)
    assert [source.phase for source in call.sources] == ["paged_prefill"]


def test_routed_heads_have_no_kernels_for_pages() -> None:
    topology = topologies.build([[window_head(1, 1, route=3)]], num_kv_heads=1, block_size=64, num_blocks=8)
    with pytest.raises(TargetError, match="expected no heads that choose blocks in kernels for pages, for cuda:90"):
        specialize_gpu(topology, schedule_layers(topology), Target.parse("cuda:90"), paged=True)


def test_without_being_asked_there_are_no_kernels_for_pages() -> None:
    topology = mixed(64)
    specs = specialize_gpu(topology, schedule_layers(topology), Target.parse("cuda:90"))
    assert [source.phase for source in gpu_sources(specs)] == ["prefill", "decode", "combine"]


def test_golden(golden: Callable[[str, str], None]) -> None:
    for name, block_size in (("attention", 128), ("attention_tiles", 16)):
        topology = topologies.window_topology([1, 2], num_kv_heads=1, block_size=block_size, head_dim=64, num_blocks=6)
        specs = specialize_gpu(topology, schedule_layers(topology), Target.parse("cuda:90"), paged=True)
        (text,) = (source.files[0].text for source in gpu_sources(specs) if source.phase == "paged_prefill")
        golden(f"paged_{name}_triton.py.txt", text)
