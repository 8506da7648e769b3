"""Paged attention: bit for bit the result over whole keys and values, as long as every block that is read is held."""

from pathlib import Path

import numpy as np
import pytest
import torch

from surgeon.compiler import Topology, compile_package
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PatchError, TopologyError
from surgeon.runtime.operands import Operands
from topologies import random_topology

LENGTH = 420


def topology(block_size: int, head_dim: int = 64) -> Topology:
    return random_topology(
        np.random.default_rng(block_size),
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=6,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("packages")
    return {size: compile_package(topology(size), root / str(size)) for size in (16, 64)}


def live_blocks(made: Topology, layer: int, first_row: int, num_blocks: int) -> np.ndarray:
    """The blocks of each KV head that some row from `first_row` on reads, by the definition."""
    mask = made.block_mask(layer, num_blocks)
    rows = mask[:, first_row:].reshape(made.model.num_key_value_heads, -1, num_blocks)
    return np.asarray(rows.any(axis=1))


def paged(
    made: Topology, layer: int, k: torch.Tensor, v: torch.Tensor, position: list[int], cache_leftpad: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pools of blocks in random order, NaN where nothing is held, and a block table.

    The table has -1 for blocks that no query from `position` on reads.
    """
    size, (batch, kv_heads, length, head_dim) = made.block_size, k.shape
    generator = torch.Generator().manual_seed(3)
    max_blocks = -(-length // size)
    free = torch.randperm(batch * kv_heads * max_blocks, generator=generator).tolist()
    slots_k, slots_v = torch.full((2, len(free), size, head_dim), torch.nan, dtype=k.dtype)
    block_table = torch.full((batch, kv_heads, max_blocks), -1, dtype=torch.int32)
    for sequence, first in enumerate(cache_leftpad):
        blocks = -(-(length - first) // size)
        live = live_blocks(made, layer, max(0, position[sequence] - first) // size, blocks)
        for head, block in np.argwhere(live).tolist():
            slot = block_table[sequence, head, block] = free.pop() if block % 3 else free.pop(0)
            begin, end = first + block * size, min(first + (block + 1) * size, length)
            slots_k[slot, : end - begin] = k[sequence, head, begin:end]
            slots_v[slot, : end - begin] = v[sequence, head, begin:end]
    return slots_k, slots_v, block_table


def inputs(q_length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(q_length)
    q = torch.randn(2, q_length, 6, 64, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, 2, LENGTH, 64, generator=generator).to(dtype)
    return q, k, v


@pytest.mark.parametrize("variant", ["x86_64_amx", "x86_64_v4", "x86_64_v3", "portable"])
@pytest.mark.parametrize("block_size", [16, 64])
def test_pages_change_no_bit(folders: dict[int, Path], block_size: int, variant: str) -> None:
    if variant not in load(folders[block_size]).cpu_variants:
        pytest.skip(f"this processor does not run {variant}")
    package, made = load(folders[block_size], strict=True, cpu_variant=variant), topology(block_size)
    dropped = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for q_length in (1, 5, 70, 300):
            q, k, v = inputs(q_length, dtype)
            position, cache_leftpad = [LENGTH - q_length] * 2, [0, 75]
            places = torch.tensor(position), torch.tensor(cache_leftpad)
            for layer in (0, 1):
                slots_k, slots_v, block_table = paged(made, layer, k, v, position, cache_leftpad)
                dropped += int((block_table < 0).sum())
                found = torch.ops.surgeon.attention_paged(
                    q, slots_k, slots_v, block_table, *places, 0.125, 0, 0, package.id, layer
                )
                assert torch.equal(found, package.attention(layer, q, k, v, 0.125, *places))
    assert dropped > 100


@pytest.fixture(scope="module")
def package(folders: dict[int, Path]) -> Package:
    return load(folders[64], strict=True)


def test_opcheck(package: Package) -> None:
    q, k, v = inputs(5, torch.float32)
    slots = paged(topology(64), 0, k, v, [LENGTH - 5] * 2, [0, 0])
    op = torch.ops.surgeon.attention_paged.default
    for cache_leftpad in (None, torch.tensor([0, 0])):
        torch.library.opcheck(
            op, (q, *slots, torch.tensor([LENGTH - 5] * 2), cache_leftpad, 0.125, 0, 0, package.id, 0)
        )


@pytest.mark.parametrize("slot", [-1, 10_000])
def test_a_block_that_is_read_must_be_there(package: Package, slot: int) -> None:
    q, k, v = inputs(1, torch.float32)
    slots_k, slots_v, block_table = paged(topology(64), 0, k, v, [LENGTH - 1] * 2, [0, 0])
    block_table[1, 0, (LENGTH - 1) // 64] = slot
    with pytest.raises(PatchError, match="expected a slot for every block that the queries read, got a block that"):
        package.kernels.run_paged(
            0, Operands(q, slots_k, slots_v, torch.tensor([LENGTH - 1] * 2), None, 0.125), block_table
        )


def test_a_position_behind_the_pages(package: Package) -> None:
    q, k, v = inputs(1, torch.float32)
    *slots, block_table = paged(topology(64), 0, k, v, [LENGTH - 1] * 2, [0, 0])
    assert block_table.shape[2] * 64 == 448
    with pytest.raises(TopologyError, match="position"):
        package.kernels.run_paged(0, Operands(q, *slots, torch.tensor([448, 0]), None, 0.125), block_table)


def test_what_does_not_fit(package: Package) -> None:
    q, k, v = inputs(1, torch.float32)
    slots_k, slots_v, block_table = paged(topology(64), 0, k, v, [LENGTH - 1] * 2, [0, 0])
    place = torch.tensor([LENGTH - 1] * 2)
    for (*tensors, table, position), message in (
        ((q[:, :2], slots_k, slots_v, block_table, place), r"attention: q: expected \[batch, 6, length, 64\]"),
        ((q, k, slots_v, block_table, place), r"attention: k: expected \[slots, 64, 64\]"),
        ((q, slots_k, slots_v[1:], block_table, place), r"attention: v: expected \[slots, 64, 64\], k and v alike"),
        ((q, slots_k, slots_v.half(), block_table, place), "attention: v: expected torch.float32 on cpu, as q"),
        ((q, slots_k, slots_v, block_table[:, :1], place), r"attention: block_table: expected \[2, 2, blocks\]"),
        ((q, slots_k, slots_v, block_table.long(), place), "attention: block_table: expected torch.int32 on cpu"),
        ((q, slots_k, slots_v, block_table, place[:1]), "attention: position: expected an int or an integer tensor"),
    ):
        with pytest.raises(PatchError, match=message):
            package.kernels.run_paged(0, Operands(*tensors, position, None, 0.125), table)


def test_a_gradient_is_refused(package: Package) -> None:
    q, k, v = inputs(1, torch.float32)
    slots = paged(topology(64), 0, k, v, [LENGTH - 1] * 2, [0, 0])
    place = torch.tensor([LENGTH - 1] * 2)
    out = torch.ops.surgeon.attention_paged(q.requires_grad_(), *slots, place, None, 0.125, 0, 0, package.id, 0)
    with pytest.raises(PatchError, match="expected a forward pass only, got a call of backward"):
        out.sum().backward()
