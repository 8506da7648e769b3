"""Kernels for routed heads: in Triton's interpreter the choice is the oracle's and attention is exact; compiled."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
import routing
import topologies
from compiled_code import laid_out, operations, parameters, spills
from gpu_sources import gpu_sources
from prefill_calls import use_tile
from routed_calls import Found, RoutedCall, make_call, run
from surgeon.compiler.kernels.gpu.compile import build_triton
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.specs.artifacts import GpuSource
from surgeon.compiler.specs.specialize import MAX_ROUTE, specialize_gpu
from surgeon.compiler.specs.tiles import Tile
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.errors import TargetError
from surgeon.runtime.package.target import Target
from topologies import DENSE, head, window_head

pytest.importorskip("triton")

SIZE, DIM = 16, 16
HEADS = [window_head(1, 2, route=3), window_head(1, 2), head(0, 2.0, 0, 1, route=2), DENSE]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}


def routed(size: int = SIZE, dim: int = DIM, beyond: str = "window", num_kv_heads: int = 2) -> Topology:
    """One layer with both kinds of routed heads beside others."""
    trees = [{"linkage": topologies.balanced_tree(8)}]
    shape = {"num_kv_heads": num_kv_heads, "head_dim": dim, "block_size": size, "num_blocks": 8, "beyond": beyond}
    return topologies.build([HEADS], trees, **shape)


def inputs(
    topology: Topology, queries: int, keys: int, dtype: torch.dtype, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k and v; some keys are repeated, so that blocks tie."""
    generator = torch.Generator().manual_seed(queries + keys)
    model, size = topology.model, topology.block_size
    q = torch.randn(batch, model.num_attention_heads, queries, model.head_dim, generator=generator).to(dtype)
    k, v = torch.randn(2, batch, model.num_key_value_heads, keys, model.head_dim, generator=generator).to(dtype)
    k[:, :, 3 * size : 4 * size] = k[:, :, 2 * size : 3 * size]
    return q, k, v


def check(pool: Executor, topology: Topology, call: RoutedCall, attends: bool = True) -> Found:
    """Compares a call's choice with the oracle's, bit by bit, and its attention with the reference."""
    found: Found = pool.submit(run, call, attends).result()
    dtype = getattr(torch, call.dtype)
    q, k, v = (torch.from_numpy(tensor).to(dtype) for tensor in (call.q, call.k, call.v))
    for sequence, (position, leftpad) in enumerate(zip(call.positions, call.cache_leftpads, strict=True)):
        end, start = position + q.shape[2], position - leftpad
        dense = max(0, end - leftpad - call.dense_rows) // call.block_size if call.dense_rows else None
        own_k = k[sequence, :, min(leftpad, end) : end]
        expected = routing.chosen_blocks(topology, 0, q[sequence], own_k, start, dense)
        assert np.array_equal(found.chosen[sequence][:, :, : expected.shape[2]], expected.numpy())
        assert not found.chosen[sequence][:, :, expected.shape[2] :].any()
    if attends:
        places = call.positions, call.cache_leftpads
        out, lse = reference.attention(topology, 0, q, k, v, *places, dense_rows=call.dense_rows)
        assert reference.relative_error(torch.from_numpy(found.out), out) <= TOLERANCE[dtype]
        np.testing.assert_allclose(found.lse, lse.numpy(), rtol=1e-5, atol=1e-5)
    return found


CALLS: dict[str, tuple[int, int, list[int], list[int], int]] = {
    # queries, keys, positions of the first query in each sequence, first valid keys, dense rows
    "a prompt": (150, 150, [0, 0], [0, 0], 0),
    "padding, tiles count from the first real token": (130, 130, [0, 0], [37, 130], 0),
    "a chunk of whole tiles": (48, 150, [96, 80], [0, 0], 0),
    "a chunk that splits tiles at both ends": (45, 160, [101, 96], [3, 0], 0),
    "queries that fill no tile": (21, 160, [130, 99], [0, 5], 0),
    "dense rows behind others": (64, 150, [80, 64], [0, 0], 40),
    "one query": (1, 160, [150, 37], [0, 5], 0),
    "one query in the padding": (1, 160, [4, 150], [9, 0], 0),
    "one dense query": (1, 160, [150, 37], [0, 0], 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_choice_is_the_oracles_and_attention_over_it_is_exact(pool: Executor, name: str) -> None:
    topology = routed()
    queries, keys, positions, leftpads, dense_rows = CALLS[name]
    call = make_call(topology, *inputs(topology, queries, keys, torch.float32), positions, leftpads, 0, dense_rows)
    found = check(pool, topology, call)
    assert found.chosen.any() == (dense_rows != 1)


@pytest.mark.parametrize("queries", [1, 90])
def test_half_precision(pool: Executor, queries: int) -> None:
    topology = routed()
    check(
        pool, topology, make_call(topology, *inputs(topology, queries, 150, torch.float16), [150 - queries] * 2, [0, 3])
    )


@pytest.mark.parametrize("queries", [1, 90])
def test_the_choice_in_bf16(pool: Executor, queries: int) -> None:
    """The interpreter's attention in bf16 is not right, so only the choice is compared."""
    topology = routed()
    call = make_call(topology, *inputs(topology, queries, 150, torch.bfloat16), [150 - queries] * 2, [0, 3])
    check(pool, topology, call, attends=False)


@pytest.mark.parametrize(("size", "dim", "num_kv_heads"), [(32, 64, 1), (64, 80, 4), (256, 16, 2)])
def test_other_shapes(pool: Executor, size: int, dim: int, num_kv_heads: int) -> None:
    topology = routed(size, dim, num_kv_heads=num_kv_heads)
    for queries in (1, 37):
        call = make_call(
            topology, *inputs(topology, queries, 6 * size + 5, torch.float32, batch=1), [6 * size - 32], [0]
        )
        assert check(pool, topology, call).chosen.any()


def test_schedules_in_tables(pool: Executor, schedule_as: str) -> None:
    topology = routed()
    call = make_call(topology, *inputs(topology, 60, 160, torch.float32), [100, 61], [0, 1])
    assert call.texts["prefill"][0] == ("attention_000" if schedule_as == "code" else "routed_attention_by_table")
    check(pool, topology, call)


@pytest.mark.parametrize("queries", [1, 40])
def test_some_kv_heads_of_a_layer(pool: Executor, queries: int) -> None:
    topology = routed()
    whole = make_call(topology, *inputs(topology, queries, 150, torch.float32), [150 - queries] * 2, [0, 0])
    found = check(pool, topology, whole)
    q, k, v = whole.q[:, 2:], whole.k[:, 1:], whole.v[:, 1:]
    part = pool.submit(run, dataclasses.replace(whole, q=q, k=k, v=v, first_kv_head=1)).result()
    assert np.array_equal(part.chosen, found.chosen[:, 2:])
    np.testing.assert_array_equal(part.out, found.out[:, :, 2:])


@pytest.mark.parametrize(
    "tile",
    [
        Tile(64, 32, 8, 3, loads="descriptors"),
        Tile(32, 32, 8, 3, heads=2),
        Tile(64, 32, 8, 3, loads="descriptors", persistent=True),
    ],
    ids=["descriptors", "two heads", "persistent"],
)
def test_variants_of_prefill(pool: Executor, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tile(tile, monkeypatch)
    topology = routed()
    call = make_call(topology, *inputs(topology, 60, 160, torch.float32), [100, 61], [0, 1], dense_rows=20)
    assert (call.program_heads, call.programs is not None) == (tile.heads, tile.persistent)
    check(pool, topology, call)


def test_nodes_are_those_of_the_definition_and_only_of_heads_that_choose(pool: Executor) -> None:
    heads = [window_head(1, 1), window_head(1, 1), window_head(1, 1, route=1), DENSE]
    topology = topologies.build([heads], num_kv_heads=2, head_dim=DIM, block_size=SIZE, num_blocks=8)
    q, k, v = inputs(topology, 1, 150, torch.float32, batch=1)
    k *= 3  # some steps are cut off
    found = check(pool, topology, make_call(topology, q, k, v, [140], [9]))
    assert topology.router is not None
    router = topology.router.layers[0]
    assert router is not None
    centre, scale = torch.tensor(router.centre[1]), torch.tensor(router.scale[1])
    expected = routing.nodes_of(k[0, 1, 9:141], centre, scale)
    assert np.array_equal(found.nodes[0, 1, : len(expected)], expected.numpy())
    assert (found.nodes[0, 1, len(expected) :] == 99).all()
    assert (found.nodes[0, 0] == 99).all()


def test_rows_that_the_topology_refuses_choose_nothing(pool: Executor) -> None:
    topology = routed(beyond="error")
    call = make_call(topology, *inputs(topology, 1, 160, torch.float32, batch=2), [8 * SIZE, 8 * SIZE - 1], [0, 0])
    found = pool.submit(run, call).result()
    assert not found.chosen[0].any()
    assert found.chosen[1].any()
    assert np.isnan(found.out[0]).all()
    assert np.isfinite(found.out[1]).all()


# Compiled


def sources(target: str, dim: int, route: int, size: int = 32) -> dict[str, GpuSource]:
    heads = [window_head(1, 2, route=route), *HEADS[1:]] * 2
    trees = [{"linkage": topologies.balanced_tree(8)}]
    topology = topologies.build([heads], trees, num_kv_heads=2, head_dim=dim, block_size=size, num_blocks=8)
    specs = specialize_gpu(topology, schedule_layers(topology), Target.parse(target), ["bf16"])
    return {source.phase: source for source in gpu_sources(specs)}


EVERY_TARGET = [f"cuda:{arch}" for arch in (80, 86, 89, 90, 100, 120)] + ["hip:gfx90a", "hip:gfx942", "hip:gfx950"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dim", "route"), [*((target, 128, 19) for target in EVERY_TARGET), ("cuda:80", 256, MAX_ROUTE)]
)
def test_every_target_builds_with_few_spills(target: str, dim: int, route: int, tmp_path: Path) -> None:
    for source in sources(target, dim, route).values():
        binary = build_triton(source, "bf16")
        # The kernels of the choice run once a call, and do not wait for a few bytes.
        most = 64 if source.phase in ("choose", "attend_chosen") else 0
        assert spills(binary, tmp_path) <= most, source.phase
        if target.startswith("cuda"):
            assert parameters(binary, tmp_path) == laid_out(binary.kernels[0].arguments)


def test_scores_are_products_of_integers_and_nothing_that_decides_is_fused(tmp_path: Path) -> None:
    found = sources("cuda:90", 64, 19)
    choose, nodes = (build_triton(found[phase], "bf16") for phase in ("choose", "write_nodes"))
    assert any(name.startswith("IMMA") for name in operations(choose, tmp_path))
    assert (choose.tools[0].version.split(", ")[1], nodes.tools[0].version.split(", ")[1]) == ("fp fusion off",) * 2
    attended = build_triton(found["attend_chosen"], "bf16")
    assert attended.tools[0].version.endswith("fp fusion on")
    assert any(name.startswith("HMMA") for name in operations(attended, tmp_path))


def test_compiling_again_gives_the_same_bytes() -> None:
    for source in sources("cuda:90", 64, 19).values():
        assert build_triton(source, "fp16") == build_triton(source, "fp16")


def test_more_blocks_than_a_program_sorts_are_refused() -> None:
    assert sources("cuda:90", 64, MAX_ROUTE)
    line = rf"route: expected at most {MAX_ROUTE} blocks for cuda:90, got {MAX_ROUTE + 1}; compile it for cpu, or learn"
    with pytest.raises(TargetError, match=line):
        sources("cuda:90", 64, MAX_ROUTE + 1)


def test_a_group_with_too_many_heads_for_a_table_is_refused() -> None:
    heads = [window_head(1, 1, route=1)] * 32
    topology = topologies.build([heads], num_kv_heads=1, head_dim=16, block_size=16, num_blocks=8)
    line = r"route: expected at most 31 query heads per KV head where heads choose blocks, for cuda:90, got 32; compile"
    with pytest.raises(TargetError, match=line):
        specialize_gpu(topology, schedule_layers(topology), Target.parse("cuda:90"))


def test_golden(golden: Callable[[str, str], None]) -> None:
    found = sources("cuda:90", 80, 19)
    for phase in ("write_nodes", "choose", "attend_chosen"):
        golden(f"{phase}_triton.py.txt", found[phase].files[0].text)
    golden("routed_attention_triton.py.txt", found["prefill"].files[0].text)
