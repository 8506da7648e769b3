"""Prefill in bf16 on a matrix unit against the fp64 oracle: one kernel, on a plain C++ unit and on the real one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import reference
from surgeon.compiler import Topology
from surgeon.runtime import Package
from surgeon.runtime.operands import Operands
from tile_units import UNITS, load_on_tiles
from topologies import build, dense_topology, random_topology, window_head, window_topology

TOLERANCE = 2.5e-3
"""The largest relative error in these cases: 1.7e-3 are the rounding of outputs to bf16, the rest that of weights."""

SHAPES = {
    "gqa1 D32 blocks of 16": (2, 2, 32, 16),
    "gqa2 D64 blocks of 64": (4, 2, 64, 64),
    "gqa3 D80 blocks of 32": (6, 2, 80, 32),
    "gqa4 D96 blocks of 48": (4, 1, 96, 48),
    "gqa7 D128 blocks of 128": (7, 1, 128, 128),
    "gqa8 D256 blocks of 64": (8, 1, 256, 64),
}
"""Query heads, KV heads, head size, block size."""

CALLS = {
    "whole": (200, 200, [0], [0]),
    "padded": (130, 130, [0, 0], [0, 67]),
    "a chunk across blocks, padded": (45, 333, [288, 288], [9, 100]),
    "a cache longer than what is filled": (33, 300, [130, 205], [0, 8]),
    "all padding but one": (20, 150, [30, 0], [49, 0]),
}
"""Queries, keys, and each sequence's position and first key."""

Load = Callable[[str, Topology], Package]


@pytest.fixture(scope="module")
def on_tiles(tmp_path_factory: pytest.TempPathFactory) -> Load:
    root = tmp_path_factory.mktemp("packages")
    return lambda unit, topology: load_on_tiles(unit, topology, root / unit / topology.sha256)


def mixed(heads: int, kv_heads: int, head_dim: int, block_size: int) -> Topology:
    rng = np.random.default_rng(heads + head_dim)
    return random_topology(
        rng,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=max(4, 512 // block_size),
    )


def plain() -> Topology:
    return mixed(6, 2, 64, 64)


def inputs(topology: Topology, batch: int, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k, v; q is a transposed view, as Transformers hands it over."""
    generator = torch.Generator().manual_seed(queries)
    model = topology.model
    q = torch.randn(batch, queries, model.num_attention_heads, model.head_dim, generator=generator).bfloat16()
    k, v = torch.randn(2, batch, model.num_key_value_heads, keys, model.head_dim, generator=generator).bfloat16()
    return q.transpose(1, 2), k, v


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit", UNITS)
def test_every_shape_and_place(on_tiles: Load, unit: str, shape: str, call: str) -> None:
    topology = mixed(*SHAPES[shape])
    package = on_tiles(unit, topology)
    queries, keys, position, cache_leftpad = CALLS[call]
    q, k, v = inputs(topology, len(position), queries, keys)
    for sequence, begin in enumerate(position):  # neither padding nor what lies behind may ever be read
        for tensor in (k, v):
            tensor[sequence, :, : cache_leftpad[sequence]] = torch.nan
            tensor[sequence, :, begin + queries :] = torch.nan
    places = torch.tensor(position), torch.tensor(cache_leftpad)
    found, lse = package.attention_with_lse(0, q, k, v, None, *places)
    clean_k, clean_v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    expected, expected_lse = reference.attention(topology, 0, q, clean_k, clean_v, position, cache_leftpad)
    assert reference.relative_error(found, expected) < TOLERANCE
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    without_lse = package.attention(0, q, k, v, None, *places)
    assert reference.relative_error(without_lse, expected) < TOLERANCE


@pytest.mark.parametrize("rows", [(1, 0), (70, 0), (70, 30), (1_000, 0)])
@pytest.mark.parametrize("call", ["padded", "a chunk across blocks, padded", "a cache longer than what is filled"])
@pytest.mark.parametrize("unit", UNITS)
def test_dense_rows(on_tiles: Load, unit: str, call: str, rows: tuple[int, int]) -> None:
    topology, (dense_rows, tokens_ahead) = plain(), rows
    queries, keys, position, leftpad = CALLS[call]
    q, k, v = inputs(topology, 2, queries, keys)
    places = torch.tensor(position), torch.tensor(leftpad)
    found = on_tiles(unit, topology).attention(
        0, q, k, v, None, *places, dense_rows=dense_rows, tokens_ahead=tokens_ahead
    )
    expected, _ = reference.attention(
        topology, 0, q, k, v, position, leftpad, dense_rows=dense_rows, tokens_ahead=tokens_ahead
    )
    assert reference.relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("unit", UNITS)
def test_routed_heads(on_tiles: Load, unit: str) -> None:
    """Blocks are half a group of packed keys, so that neighbours which are not chosen are hidden."""
    heads = [window_head(1, 1, route=2), window_head(0, 2, route=1), window_head(1, 2), window_head(0, 1, route=3)]
    topology = build([heads], num_kv_heads=2, head_dim=64, block_size=16)
    package = on_tiles(unit, topology)
    for queries, keys in ((200, 200), (75, 190)):
        q, k, v = inputs(topology, 2, queries, keys)
        position, leftpad = [keys - queries, max(0, keys - queries - 3)], [0, 21]
        numbers = {"position": torch.tensor(position), "cache_leftpad": torch.tensor(leftpad)}
        expected, _ = reference.attention(topology, 0, q, k, v, position, leftpad)
        found = package.attention(0, q, k, v, **numbers)
        assert reference.relative_error(found, expected) < reference.TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("unit", UNITS)
def test_strides_change_no_bit(on_tiles: Load, unit: str) -> None:
    topology = plain()
    package = on_tiles(unit, topology)
    q, k, v = inputs(topology, 2, 150, 150)
    expected = package.attention(0, q, k, v)
    for heads, head_dim in ((2, 64), (3, 65), (8, 64), (16, 64)):  # rows 256, 390, 1,024 and 2,048 bytes apart
        spread = torch.full((2, 2, 150, heads, head_dim), torch.nan, dtype=torch.bfloat16)
        spread[0, :, :, :2, :64], spread[1, :, :, :2, :64] = k.transpose(1, 2), v.transpose(1, 2)
        k_view, v_view = (tensor[:, :, :2, :64].transpose(1, 2) for tensor in spread)
        assert k_view.stride(2) == heads * head_dim
        assert torch.equal(package.attention(0, q.contiguous(), k_view, v_view), expected)
    same = [tensor[:1].expand(2, -1, -1, -1) for tensor in (k, v)]  # stride 0
    assert torch.equal(package.attention(0, q, *same)[0], expected[0])
    constant = k[:, :, :1].expand(-1, -1, 150, -1)
    assert torch.equal(package.attention(0, q, constant, v), package.attention(0, q, constant.contiguous(), v))


@pytest.mark.parametrize("shape", ["gqa1 D32 blocks of 16", "gqa4 D96 blocks of 48", "gqa3 D80 blocks of 32"])
@pytest.mark.parametrize("unit", UNITS)
def test_pages_change_no_bit(on_tiles: Load, unit: str, shape: str) -> None:
    heads, kv_heads, head_dim, block_size = SHAPES[shape]
    topology = window_topology([1, 2] * (heads // 2), num_kv_heads=kv_heads, head_dim=head_dim, block_size=block_size)
    package = on_tiles(unit, topology)
    size, model = topology.block_size, topology.model
    queries, keys, cache_leftpad = 40, 300, 11
    q, k, v = inputs(topology, 1, queries, keys)
    blocks = -(-(keys - cache_leftpad) // size)
    first_row = (keys - queries - cache_leftpad) // size
    seen = topology.block_mask(0, blocks)[:, first_row:].reshape(model.num_key_value_heads, -1, blocks).any(axis=1)
    block_table = torch.full((1, model.num_key_value_heads, blocks), -1, dtype=torch.int32)
    slots = torch.full((2, block_table.numel(), size, model.head_dim), torch.nan, dtype=torch.bfloat16)
    free = torch.randperm(block_table.numel(), generator=torch.Generator().manual_seed(1)).tolist()
    for head, block in np.argwhere(seen).tolist():
        slot = block_table[0, head, block] = free.pop()
        begin, end = cache_leftpad + block * size, min(cache_leftpad + (block + 1) * size, keys)
        slots[0, slot, : end - begin], slots[1, slot, : end - begin] = k[0, head, begin:end], v[0, head, begin:end]
    position, first = torch.tensor([keys - queries]), torch.tensor([cache_leftpad])
    found = package.kernels.run_paged(0, Operands(q, slots[0], slots[1], position, first, 0.125), block_table)
    assert len(free) > 1  # most blocks are not held
    assert torch.equal(found, package.attention(0, q, k, v, 0.125, position, first))


@pytest.mark.parametrize("unit", UNITS)
def test_rotary(on_tiles: Load, unit: str) -> None:
    topology = plain()
    package = on_tiles(unit, topology)
    q, k, v = inputs(topology, 1, 100, 100)
    angles = torch.arange(100)[:, None] * 0.3 ** torch.arange(32)
    cos, sin = (table(angles).repeat(1, 2)[None].bfloat16() for table in (torch.cos, torch.sin))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        turned = torch.cat((-x[..., 32:], x[..., :32]), dim=-1)
        return (x * cos.float() + turned * sin.float()).bfloat16()

    found = package.kernels.run_rotary(0, Operands(q, k, v, None, None, 0.125), cos, sin)
    expected, _ = reference.attention(topology, 0, rotated(q), rotated(k), v)
    assert reference.relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("factor", [-30.0, 1e-3, 30.0])
def test_scores_far_above_the_first_ones(on_tiles: Load, unit: str, factor: float) -> None:
    topology = dense_topology(num_heads=2, head_dim=64, num_blocks=8)
    package = on_tiles(unit, topology)
    q, k, v = inputs(topology, 1, 300, 300)
    growing = k * torch.arange(300)[:, None] / 300
    found, lse = package.attention_with_lse(0, q, growing, v, scale=0.125 * factor)
    expected, expected_lse = reference.attention(topology, 0, q, growing, v, scale=0.125 * factor)
    assert reference.relative_error(found, expected) < TOLERANCE
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
def test_a_nan_comes_out_as_a_nan(on_tiles: Load, unit: str) -> None:
    topology = dense_topology(num_heads=2, head_dim=64, num_blocks=8)
    package = on_tiles(unit, topology)
    q, k, v = inputs(topology, 1, 100, 100)
    k[0, 0, 40, 3] = torch.nan
    out = package.attention(0, q, k, v)
    affected = torch.arange(100) >= 40
    assert torch.equal(out[0, :, 0].isnan().all(dim=-1), affected)
    assert torch.equal(out[0, :, 0].isnan().any(dim=-1), affected)


@pytest.mark.parametrize("unit", UNITS)
def test_results_depend_neither_on_threads_nor_on_chunks(on_tiles: Load, unit: str) -> None:
    topology = plain()
    package = on_tiles(unit, topology)
    q, k, v = inputs(topology, 1, 256, 256)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(package.attention(0, q, k, v))
        parts = [
            package.attention(0, q[:, :, i : i + 64], k[:, :, : i + 64], v[:, :, : i + 64]) for i in (0, 64, 128, 192)
        ]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], torch.cat(parts, dim=1))


def test_torch_and_the_kernel_share_a_matrix_unit(on_tiles: Load) -> None:
    topology = plain()
    package = on_tiles("x86_64_amx", topology)
    q, k, v = inputs(topology, 1, 256, 256)
    a, b = torch.randn(2, 700, 700, generator=torch.Generator().manual_seed(0)).bfloat16()
    product, attention = a @ b, package.attention(0, q, k, v)
    for _ in range(3):
        assert torch.equal(a @ b, product)
        assert torch.equal(package.attention(0, q, k, v), attention)
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(a @ b, product)
