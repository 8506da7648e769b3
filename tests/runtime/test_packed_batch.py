"""The checks of a step's batch, made once for all layers."""

from typing import Any

import pytest
import torch

from surgeon.runtime.errors import PatchError
from surgeon.runtime.packed_batch import PackedBatch


def batch(**changes: Any) -> PackedBatch:
    """Two sequences of 70 and 10 tokens, with 2 and 3 queries, in blocks of 32 tokens of 2 KV heads."""
    table = torch.arange(12).view(2, 2, 3).to(torch.int32)
    table[1, :, 1:] = -1
    fields: dict[str, Any] = {
        "query_start": torch.tensor([0, 2, 5], dtype=torch.int32),
        "position": torch.tensor([68, 7]),
        "dense_tail": torch.tensor([0, 0]),
        "block_table": table,
        "block_size": 32,
    }
    return PackedBatch(**fields | changes)


def test_what_it_tells() -> None:
    made = batch()
    assert (made.tokens, made.most_queries, made.slots) == (5, 3, 10)
    assert made.query_start.dtype == torch.int64


def test_no_sequences() -> None:
    made = batch(
        query_start=torch.zeros(1).long(),
        position=torch.zeros(0).long(),
        dense_tail=torch.zeros(0).long(),
        block_table=torch.zeros(0, 2, 0).int(),
    )
    assert (made.tokens, made.most_queries, made.slots) == (0, 0, 0)


def test_a_sequence_without_queries_needs_no_blocks() -> None:
    table = batch().block_table.clone()
    table[1] = -1
    assert batch(query_start=torch.tensor([0, 2, 2]), block_table=table).tokens == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"query_start": torch.tensor([0, 2])},
            r"batch: query_start: expected integers \[3\] on cpu, got torch.int64 \[2",
        ),
        ({"query_start": torch.tensor([0.0, 2, 5])}, r"batch: query_start: expected integers \[3\] on cpu"),
        ({"query_start": torch.tensor([1, 2, 5])}, "batch: query_start: expected numbers from 0 on"),
        ({"query_start": torch.tensor([0, 5, 2])}, "none lower than the one before, got .0, 5, 2."),
        ({"position": torch.tensor([[68, 7]])}, r"batch: query_start: expected integers \[2\] on cpu"),
        ({"position": torch.tensor([68.0, 7])}, r"batch: position: expected integers \[2\] on cpu"),
        ({"dense_tail": torch.tensor([0])}, r"batch: dense_tail: expected integers \[2\] on cpu"),
        (
            {"block_table": torch.zeros(2, 2, 3).long()},
            r"batch: block_table: expected torch.int32 \[2, KV heads, blocks\]",
        ),
        (
            {"block_table": torch.zeros(1, 2, 3).int()},
            r"batch: block_table: expected torch.int32 \[2, KV heads, blocks\]",
        ),
        ({"block_table": torch.zeros(2, 3).int()}, r"batch: block_table: expected torch.int32 \[2, KV heads, blocks\]"),
        (
            {"position": torch.tensor([68, 30])},
            "a slot for every block that the queries read, got none for block 1 of KV head 0 in sequence 1",
        ),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchError, match=message):
        batch(**changes)


def test_holes_are_the_kernels_matter() -> None:
    assert batch(position=torch.tensor([68, 30]), has_holes=True).has_holes
