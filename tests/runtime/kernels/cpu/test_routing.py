"""Routed heads on a CPU: the choice is the oracle's, block for block, and attention over it is exact."""

import dataclasses
import functools
import itertools
from pathlib import Path

import pytest
import torch

import reference
import routing
import topologies
from surgeon.compiler import compile_package
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PatchError
from surgeon.runtime.operands import PATTERN_ALONE, Nodes, Operands
from surgeon.runtime.packed_batch import PackedBatch
from topologies import DENSE, head, window_head

SIZE, DIM = 32, 64
VARIANTS = ("x86_64_amx", "x86_64_v4", "x86_64_v3", "portable")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TOPOLOGY = topologies.build(
    [
        [window_head(1, 2, route=3), window_head(1, 2), head(0, 2.0, 0, 1, route=2), DENSE],
        [window_head(0, 1, route=1), window_head(2, 1, route=40), DENSE, window_head(1, 1)],
        [window_head(1, 2)] * 4,
    ],
    [{"linkage": topologies.balanced_tree(8)}],
    num_kv_heads=2,
    head_dim=DIM,
    block_size=SIZE,
    num_blocks=8,
)

CALLS: list[tuple[int, int, list[int], list[int], int]] = [
    # queries, keys, positions of the first query in each sequence, first valid keys, dense rows
    (500, 500, [0, 0], [0, 0], 0),
    (300, 300, [0, 0], [0, 77], 0),  # tiles count from the first real token
    (300, 300, [0, 0], [299, 300], 0),
    (160, 400, [240, 224], [0, 0], 0),
    (61, 400, [333, 320], [9, 0], 0),  # a chunk that splits tiles at both ends
    (15, 400, [384, 300], [0, 0], 0),
    (7, 400, [393, 211], [3, 0], 0),
    (1, 400, [399, 37], [0, 5], 0),
    (200, 400, [200, 200], [0, 0], 100),
    (0, 5, [5, 5], [0, 0], 0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_package(TOPOLOGY, tmp_path_factory.mktemp("packages") / "routed", targets=["cpu"])


def loaded(folder: Path, variant: str) -> Package:
    if variant not in load(folder).cpu_variants:
        pytest.skip(f"this processor does not run {variant}")
    return load(folder, strict=True, cpu_variant=variant)


def inputs(
    queries: int, keys: int, dtype: torch.dtype, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k and v; some keys are repeated, so that blocks tie."""
    generator = torch.Generator().manual_seed(queries + keys)
    q = torch.randn(batch, queries, 4, DIM, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, batch, 2, keys, DIM, generator=generator).to(dtype)
    k[:, :, 3 * SIZE : 5 * SIZE] = k[:, :, SIZE : 3 * SIZE][:, :, : k[:, :, 3 * SIZE : 5 * SIZE].shape[2]]
    return q, k, v


@functools.cache
def expected(index: int, layer: int, dtype: torch.dtype) -> torch.Tensor:
    """What attention in one of the calls is by the oracle."""
    queries, keys, position, leftpad, dense_rows = CALLS[index]
    out, _ = reference.attention(
        TOPOLOGY, layer, *inputs(queries, keys, dtype), position, leftpad, dense_rows=dense_rows
    )
    return out


@functools.cache
def to_be_read(queries: int, keys: int, layer: int, dtype: torch.dtype) -> torch.Tensor:
    """The blocks that the last queries of a sequence read by the oracle, bool `[heads, queries, blocks]`."""
    q, k, _ = inputs(queries, keys, dtype, batch=1)
    scheduled = reference.token_mask(TOPOLOGY, layer, queries, keys, keys - queries, 0)[:, :, ::SIZE]
    chosen = routing.chosen_blocks(TOPOLOGY, layer, q[0], k[0], keys - queries)
    assert chosen.any()
    assert not (scheduled & chosen).any()
    return scheduled | chosen


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_exact_over_what_is_chosen(folder: Path, variant: str, dtype: torch.dtype) -> None:
    package = loaded(folder, variant)
    for index, (queries, keys, position, leftpad, dense_rows) in enumerate(CALLS):
        q, k, v = inputs(queries, keys, dtype)
        numbers = {"position": torch.tensor(position), "cache_leftpad": torch.tensor(leftpad)}
        for layer in range(3):
            found = package.attention(layer, q, k, v, dense_rows=dense_rows, **numbers)
            if q.numel():
                error = reference.relative_error(found, expected(index, layer, dtype))
                assert error < reference.TOLERANCE[dtype], (layer, queries, keys, position, error)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_choice_is_the_oracles(folder: Path, variant: str, dtype: torch.dtype) -> None:
    """Values say which block they are of, so that an output's channels show the blocks that it read."""
    package = loaded(folder, variant)
    for queries, keys in ((480, 480), (45, 448), (1, 460)):
        q, k, v = inputs(queries, keys, dtype, batch=1)
        v = torch.nn.functional.one_hot(torch.arange(keys) // SIZE, DIM).to(dtype).expand_as(v)
        for layer in (0, 1):
            # A weight that is not there may be a little above zero, where two tiles share a panel.
            read = package.attention(layer, q, k, v, scale=1e-3)[0].transpose(0, 1) > 1e-30
            assert torch.equal(read[:, :, : -(-keys // SIZE)], to_be_read(queries, keys, layer, dtype))


def test_chunks_of_whole_tiles_change_nothing_and_others_only_the_tiles_that_they_split(folder: Path) -> None:
    package = load(folder, strict=True)
    q, k, v = inputs(400, 400, torch.float32)
    whole = package.attention(0, q, k, v)
    for bounds, same in (((0, 96, 208, 400), range(400)), ((0, 300, 400), [*range(288), *range(304, 400)])):
        parts = [
            package.attention(0, q[:, :, begin:end], k[:, :, :end], v[:, :, :end])
            for begin, end in itertools.pairwise(bounds)
        ]
        joined = torch.cat(parts, dim=1)
        torch.testing.assert_close(joined[:, list(same)], whole[:, list(same)], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(joined[:, 288:304], whole[:, 288:304], rtol=1e-3, atol=1e-3)


def test_nodes_that_are_kept_are_used_and_only_new_ones_are_written(folder: Path) -> None:
    package = load(folder, strict=True)
    kernels = package.kernels.devices.cpu
    q, k, v = inputs(1, 400, torch.float32, batch=1)
    nodes = Nodes(torch.zeros(1, 2, 400 // 8, DIM, dtype=torch.int8), torch.tensor([0]))
    operands = Operands(q, k, v, None, None, DIM**-0.5)
    expected = package.attention(0, q, k, v)
    assert TOPOLOGY.router
    router = TOPOLOGY.router.layers[0]
    assert router is not None
    torch.testing.assert_close(kernels.attend(0, operands, nodes=nodes), expected, rtol=0, atol=0)
    for kv_head in range(2):
        centre, scale = torch.tensor(router.centre[kv_head]), torch.tensor(router.scale[kv_head])
        assert torch.equal(nodes.values[0, kv_head].int(), routing.nodes_of(k[0, kv_head], centre, scale))
    assert nodes.written.tolist() == [50]
    nodes.values[0, :, -1] = 7  # the last node is written again, the others are taken as they are
    changed = Nodes(nodes.values, torch.tensor([49]))
    torch.testing.assert_close(kernels.attend(0, operands, nodes=changed), expected, rtol=0, atol=0)
    zeros = Nodes(torch.zeros_like(nodes.values), torch.tensor([50]))
    assert not torch.equal(kernels.attend(0, operands, nodes=zeros), expected)
    assert not zeros.values.any()


@pytest.mark.parametrize("with_nodes", [False, True])
def test_pools_of_blocks_change_no_bit(folder: Path, with_nodes: bool) -> None:
    package = load(folder, strict=True)
    kernels = package.kernels.devices.cpu
    for queries, first in ((1, 399), (100, 300)):
        q, k, v = inputs(queries, 416, torch.float32, batch=1)
        end = first + queries
        pool_k, pool_v = (each[0].reshape(2 * 13, SIZE, DIM).flip(0).contiguous() for each in (k, v))
        table = (25 - torch.arange(26)).view(1, 2, 13).int()
        operands = Operands(q, pool_k, pool_v, torch.tensor([first]), torch.tensor([0]), DIM**-0.5)
        for layer in (0, 1):
            values = torch.zeros(26, SIZE // 8, DIM, dtype=torch.int8)
            nodes = Nodes(values, torch.tensor([0])) if with_nodes else None
            found = kernels.attend_paged(layer, operands, table, nodes=nodes)
            assert torch.equal(found, package.attention(layer, q, k[:, :, :end], v[:, :, :end]))


def test_sequences_that_are_packed_choose_as_alone(folder: Path) -> None:
    package = load(folder, strict=True)
    queries, first = (1, 100, 0, 33), (399, 300, 50, 64)
    q, k, v = inputs(134, 416, torch.float32, batch=4)
    starts = torch.tensor([0, *itertools.accumulate(queries)])
    pools = (each.reshape(4 * 2 * 13, SIZE, DIM) for each in (k, v))
    table = torch.arange(4 * 26).view(4, 2, 13).int()
    tails = torch.full((4,), PATTERN_ALONE)
    out = torch.empty(134, 4, DIM)
    packed = q[0].transpose(0, 1)
    batch = PackedBatch(starts, torch.tensor(first), tails, table, SIZE)
    package.kernels.run_packed(0, batch, packed, *pools, DIM**-0.5, out)
    for sequence, count in enumerate(queries):
        begin, end = int(starts[sequence]), first[sequence] + count
        own = packed[None, begin : begin + count].transpose(1, 2)
        keys, values = (each[sequence : sequence + 1, :, :end] for each in (k, v))
        assert torch.equal(out[None, begin : begin + count], package.attention(0, own, keys, values))


def test_nodes_of_a_pool_are_kept_from_step_to_step_whoever_wrote_them(folder: Path) -> None:
    package = load(folder, strict=True)
    q, k, v = inputs(800, 416, torch.float32, batch=1)
    pools = tuple(each[0].reshape(26, SIZE, DIM) for each in (k, v))
    table = torch.arange(26).view(1, 2, 13).int()
    nodes = torch.full((26, SIZE // 8, DIM), 99, dtype=torch.int8)
    packed = q[0].transpose(0, 1)

    def step(first: int, count: int, kept: torch.Tensor | None) -> torch.Tensor:
        starts, tails = torch.tensor([0, count]), torch.full((1,), PATTERN_ALONE)
        out = torch.empty(count, 4, DIM)
        batch = PackedBatch(starts, torch.tensor([first]), tails, table, SIZE)
        package.kernels.run_packed(0, batch, packed[:count], *pools, DIM**-0.5, out, kept)
        return out

    for first, count in ((0, 200), (200, 1), (201, 100), (301, 1), (200, 150), (350, 66)):  # the fifth begins again
        assert torch.equal(step(first, count, nodes), step(first, count, None))
    own = nodes.clone()
    nodes[:] = 99
    step(0, 416, nodes)
    assert torch.equal(nodes, own)
    assert not bool((nodes[:13] == 99).all(-1).any())
    nodes[3:9] = 0  # what is kept is what they choose by
    assert not torch.equal(step(415, 1, nodes), step(415, 1, None))


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (torch.zeros(25, 4, DIM, dtype=torch.int8), r"nodes: expected \[26, 4, 64\], contiguous, got \[25, 4, 64\]"),
        (torch.zeros(26, 8, DIM, dtype=torch.int8)[:, ::2], r"nodes: expected \[26, 4, 64\], contiguous"),
        (torch.zeros(26, 4, DIM), "nodes: expected torch.int8 on cpu, got torch.float32"),
    ],
)
def test_nodes_that_do_not_fit_are_refused(folder: Path, nodes: torch.Tensor, message: str) -> None:
    package = load(folder, strict=True)
    q, k, v = inputs(1, 416, torch.float32, batch=1)
    pools = tuple(each[0].reshape(26, SIZE, DIM) for each in (k, v))
    table = torch.arange(26).view(1, 2, 13).int()
    batch = PackedBatch(torch.tensor([0, 1]), torch.tensor([400]), torch.tensor([PATTERN_ALONE]), table, SIZE)
    with pytest.raises(PatchError, match=message):
        package.kernels.run_packed(0, batch, q[0].transpose(0, 1), *pools, 0.125, torch.empty(1, 4, DIM), nodes)


def test_a_block_that_a_routed_head_may_choose_must_be_held(folder: Path) -> None:
    package = load(folder, strict=True)
    q, k, v = inputs(1, 416, torch.float32, batch=1)
    pools = (each[0].reshape(26, SIZE, DIM) for each in (k, v))
    table = torch.arange(26).view(1, 2, 13).int()
    table[0, 0, 5] = -1
    operands = Operands(q, *pools, torch.tensor([400]), torch.tensor([0]), DIM**-0.5)
    with pytest.raises(PatchError, match="a slot for every block that the queries read"):
        package.kernels.run_paged(0, operands, table)


def test_parts_of_the_kv_heads_choose_by_their_own_router(folder: Path) -> None:
    package = load(folder, strict=True)
    q, k, v = inputs(200, 200, torch.float32)
    whole = package.attention(0, q, k, v)
    for kv_head in range(2):
        part = package.part(range(kv_head, kv_head + 1))
        own = slice(2 * kv_head, 2 * kv_head + 2)
        found = part.attention(0, q[:, own], k[:, kv_head : kv_head + 1], v[:, kv_head : kv_head + 1])
        assert torch.equal(found, whole[:, :, own])


def test_what_a_head_chooses_matters() -> None:
    """The topology, inputs and oracle of these tests would not pass without the choice."""
    unrouted = dataclasses.replace(TOPOLOGY, router=None)
    q, k, v = inputs(300, 300, torch.float32)
    for layer in (0, 1):
        with_choice, _ = reference.attention(TOPOLOGY, layer, q, k, v)
        without, _ = reference.attention(unrouted, layer, q, k, v)
        assert reference.relative_error(without, with_choice) > 0.01
