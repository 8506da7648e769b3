"""Many sequences in one call, their queries one behind the other: the results of calls of their own."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reference import TOLERANCE, attention, relative_error
from surgeon.compiler import Topology, compile_package
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PatchError, TopologyError
from surgeon.runtime.operands import PATTERN_ALONE, Operands
from surgeon.runtime.packed_batch import PackedBatch
from topologies import random_topology

SIZE, HEADS, KV_HEADS, D = 64, 6, 2, 64
QUERIES, STARTS = (1, 70, 0, 1, 5, 130, 300, 2), (200, 0, 0, 419, 63, 290, 0, 64)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""The distance of results, up to about 1, that are sums in another order."""
TAILS = (PATTERN_ALONE, 100, PATTERN_ALONE, 64, -50, PATTERN_ALONE, -128, 1)


@pytest.fixture(scope="module")
def made() -> Topology:
    return random_topology(
        np.random.default_rng(7),
        num_layers=2,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=D,
        block_size=SIZE,
        num_blocks=6,
    )


@pytest.fixture(scope="module")
def folder(made: Topology, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_package(made, tmp_path_factory.mktemp("packed") / "package")


@pytest.fixture(scope="module")
def package(folder: Path) -> Package:
    return load(folder, strict=True)


def batch_of(queries: tuple[int, ...] = QUERIES, tails: tuple[int, ...] = TAILS, **changes: Any) -> PackedBatch:
    """A batch of these sequences, whose blocks lie in the pool in random order."""
    ends = [start + count for start, count in zip(STARTS, queries, strict=False)]
    blocks = -(-max(ends) // SIZE)
    slots = torch.randperm(len(queries) * KV_HEADS * blocks, generator=torch.Generator().manual_seed(3))
    table = slots.view(len(queries), KV_HEADS, blocks).to(torch.int32)
    for sequence, end in enumerate(ends):
        table[sequence, :, -(-end // SIZE) :] = -1
    starts = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)  # as vLLM's
    fields: dict[str, Any] = {
        "query_start": starts,
        "position": torch.tensor(STARTS[: len(queries)]),
        "dense_tail": torch.tensor(tails),
        "block_table": table,
    }
    return PackedBatch(**fields | changes, block_size=SIZE)


def inputs(batch: PackedBatch, dtype: torch.dtype, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries that are part of a larger tensor, as vLLM's, and pools whose free slots are NaN."""
    generator = torch.Generator().manual_seed(5)
    heads = torch.randn(batch.tokens + padding, HEADS + 2, D, generator=generator).to(dtype)
    k, v = torch.full((2, batch.block_table.numel(), SIZE, D), torch.nan, dtype=dtype)
    used = batch.block_table[batch.block_table >= 0].long()
    k[used], v[used] = torch.randn(2, len(used), SIZE, D, generator=generator).to(dtype)
    return heads[:, 1:-1], k, v


def rows_and_ahead(tail: int) -> tuple[int, int]:
    """The `dense_rows` and `tokens_ahead` of a dense tail."""
    return (0, 0) if tail == PATTERN_ALONE else (max(1, tail), max(1, tail) - tail)


def alone(
    package: Package, layer: int, batch: PackedBatch, sequences: range, tensors: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """The result of `run_paged` for neighbours with equally many queries and one tail."""
    q, k, v = tensors
    first, end = (int(batch.query_start[index]) for index in (sequences.start, sequences.stop))
    some = slice(sequences.start, sequences.stop)
    asking = rows_and_ahead(int(batch.dense_tail[sequences.start]))
    queries = q[first:end].unflatten(0, (len(sequences), -1)).transpose(1, 2)
    operands = Operands(queries, k, v, batch.position[some], None, 0.125, *asking)
    return package.kernels.run_paged(layer, operands, batch.block_table[some]).flatten(0, 1)


@pytest.mark.parametrize("variant", ["x86_64_amx", "x86_64_v4", "x86_64_v3", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mixed_batch_is_its_sequences(folder: Path, variant: str, dtype: torch.dtype) -> None:
    if variant not in load(folder).cpu_variants:
        pytest.skip(f"this processor does not run {variant}")
    package, batch = load(folder, strict=True, cpu_variant=variant), batch_of()
    tensors = inputs(batch, dtype)
    for layer in (0, 1):
        out = torch.full((batch.tokens, HEADS, D), torch.nan, dtype=dtype)
        package.kernels.run_packed(layer, batch, *tensors, 0.125, out)
        for sequence, count in enumerate(QUERIES):
            if count:
                first = int(batch.query_start[sequence])
                expected = alone(package, layer, batch, range(sequence, sequence + 1), tensors)
                # Where decoding splits the keys depends on threads and on what else is decoded.
                torch.testing.assert_close(out[first : first + count], expected, atol=ROUNDING[dtype], rtol=0)


def test_neighbours_that_are_decoded_share_a_call(package: Package) -> None:
    batch = batch_of((1,) * 8, (PATTERN_ALONE,) * 8)
    tensors = inputs(batch, torch.float32)
    out = torch.empty(8, HEADS, D)
    package.kernels.run_packed(0, batch, *tensors, 0.125, out)
    assert torch.equal(out, alone(package, 0, batch, range(8), tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_batch_against_the_definition(package: Package, made: Topology, dtype: torch.dtype) -> None:
    batch = batch_of()
    q, k, v = inputs(batch, dtype)
    out = torch.empty(batch.tokens, HEADS, D, dtype=dtype)
    package.kernels.run_packed(1, batch, q, k, v, 0.125, out)
    for sequence, count in enumerate(QUERIES):
        if count:
            first, end = int(batch.query_start[sequence]), STARTS[sequence] + count
            table = batch.block_table[sequence, :, : -(-end // SIZE)].long()
            keys, values = (pool[table].flatten(1, 2)[None, :, :end] for pool in (k, v))
            queries = q[first : first + count].transpose(0, 1)[None]
            asking = rows_and_ahead(TAILS[sequence])
            expected, _ = attention(made, 1, queries, keys, values, [STARTS[sequence]], None, 0.125, *asking)
            assert relative_error(out[first : first + count], expected[0]) < TOLERANCE[dtype]


def test_rows_behind_the_batch_are_left_alone(package: Package) -> None:
    batch = batch_of()
    q, k, v = inputs(batch, torch.float32, padding=9)
    q[batch.tokens :] = torch.nan
    room = torch.full((batch.tokens + 9, HEADS, D), 7.0)
    package.kernels.run_packed(0, batch, q, k, v, 0.125, room)
    assert bool((room[batch.tokens :] == 7).all())
    assert not bool(room.isnan().any())


def test_no_sequences_and_none_with_queries(package: Package) -> None:
    for batch in (batch_of((0, 0), (0, 0)), batch_of()):
        _, k, v = inputs(batch, torch.float32)
    nothing = PackedBatch(torch.zeros(1).long(), *torch.zeros(2, 0).long(), torch.zeros(0, 2, 0).int(), SIZE)
    for batch in (batch_of((0, 0), (0, 0)), nothing):
        room = torch.full((3, HEADS, D), 7.0)
        package.kernels.run_packed(0, batch, torch.zeros(3, HEADS, D), k, v, 0.125, room)
        assert bool((room == 7).all())


def test_a_dtype_without_kernels_runs_in_a_wider_one(made: Topology, tmp_path: Path) -> None:
    package, batch = load(compile_package(made, tmp_path / "package", dtypes=("fp32",))), batch_of()
    tensors = inputs(batch, torch.bfloat16, padding=2)
    out, wide = torch.full((2, batch.tokens + 2, HEADS, D), 7.0)
    package.kernels.run_packed(0, batch, *(tensor.float() for tensor in tensors), 0.125, wide)
    package.kernels.run_packed(0, batch, *tensors, 0.125, narrow := out.bfloat16())
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda q: q[:-1], r"attention: q: expected \[509 or more, 6, 64\], got \[508, 6, 64\]"),
        ("q", lambda q: q[:, :2], r"attention: q: expected \[509 or more, 6, 64\]"),
        ("k", lambda k: k[:60], r"attention: k: expected \[\d+ or more, 64, 64\], k and v alike, got \[60, 64, 64\]"),
        ("v", lambda v: v[1:], "attention: v: expected .*, k and v alike"),
        ("v", lambda v: v.half(), "attention: v: expected torch.float32 on cpu, as q"),
        ("out", lambda out: out[:-1], r"attention: out: expected \[509, 6, 64\], contiguous"),
        (
            "out",
            lambda out: out.transpose(0, 1).contiguous().transpose(0, 1),
            "attention: out: expected .*, contiguous",
        ),
        ("out", lambda out: out.half(), "attention: out: expected torch.float32 on cpu, as q"),
    ],
)
def test_a_tensor_that_does_not_fit(
    package: Package, name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    batch = batch_of()
    q, k, v = inputs(batch, torch.float32)
    tensors = {"q": q, "k": k, "v": v, "out": torch.empty(batch.tokens, HEADS, D)}
    tensors[name] = change(tensors[name])
    with pytest.raises(PatchError, match=message):
        package.kernels.run_packed(0, batch, scale=0.125, **tensors)


def test_a_table_of_other_heads(package: Package) -> None:
    batch = batch_of(block_table=batch_of().block_table[:, :1])
    with pytest.raises(PatchError, match=r"block_table: expected \[sequences, 2, blocks\], blocks of 64 tokens"):
        package.kernels.run_packed(0, batch, *inputs(batch_of(), torch.float32), 0.125, torch.empty(509, HEADS, D))


def test_a_layer_that_the_package_does_not_cover(package: Package) -> None:
    batch = batch_of()
    with pytest.raises(PatchError, match="attention: layer"):
        package.kernels.run_packed(2, batch, *inputs(batch, torch.float32), 0.125, torch.empty(509, HEADS, D))


def test_a_position_behind_the_table(package: Package) -> None:
    batch = batch_of(position=torch.tensor([*STARTS[:3], 448, *STARTS[4:]]))
    with pytest.raises(TopologyError, match="position"):
        package.kernels.run_packed(0, batch, *inputs(batch, torch.float32), 0.125, torch.empty(509, HEADS, D))


def test_holes_that_nobody_reads(package: Package, made: Topology) -> None:
    batch = batch_of(
        (1,), (PATTERN_ALONE,), position=torch.tensor([419]), block_table=torch.arange(14).view(1, 2, 7).int()
    )
    tensors, whole, some = inputs(batch, torch.float32), *torch.empty(2, 1, HEADS, D)
    package.kernels.run_packed(0, batch, *tensors, 0.125, whole)
    read = torch.from_numpy(made.block_mask(0, 7)[:, 6].reshape(KV_HEADS, -1, 7).any(axis=1))
    assert int((~read).sum()) > 0
    holed = batch_of(
        (1,),
        (PATTERN_ALONE,),
        position=torch.tensor([419]),
        block_table=batch.block_table.masked_fill(~read, -1),
        has_holes=True,
    )
    package.kernels.run_packed(0, holed, *tensors, 0.125, some)
    assert torch.equal(some, whole)


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        (-1, "expected a slot for every block that the queries read"),
        (14, r"attention: k: expected \[15 or more, 64, 64\]"),
    ],
)
def test_a_block_that_is_read_must_be_there(package: Package, slot: int, message: str) -> None:
    table = torch.arange(14).view(1, 2, 7).int()
    table[0, 1, 6] = slot  # the query's own
    where = {"position": torch.tensor([419]), "block_table": table}
    tensors = torch.zeros(1, HEADS, D), *torch.zeros(2, 14, SIZE, D)
    with pytest.raises(PatchError, match=message):
        package.kernels.run_packed(
            0, batch_of((1,), (PATTERN_ALONE,), **where, has_holes=True), *tensors, 0.125, torch.empty(1, HEADS, D)
        )
