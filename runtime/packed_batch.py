"""The sequences of a step of an engine, their queries one behind the other; checked once for all layers."""

from dataclasses import dataclass
from functools import cached_property

import torch

from surgeon.runtime.errors import PatchError

NO_DENSE_ROWS = 2**31 - 1
"""A `dense_from` that leaves every row to the topology."""

_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences with any number of queries each, none included, that read one block table; see `run_packed`.

    Sequence i has the queries `query_start[i]` to `query_start[i + 1]`, the last left out, of those of all sequences;
    `position[i]` is the index of the first one's own key in the sequence. `query_start` is `[B + 1]`, `position` and
    `dense_tail` `[B]`, all int32 or int64, kept as int64; `dense_tail` is that of `Operands`, for each sequence.
    `block_table` is as in `LayerKernels.run_paged`, and holds every block up to the last query's own. If it
    `has_holes`, each layer's kernel checks that what it reads is held.

    Raises:
        PatchError: a tensor has another shape or dtype, or a table without holes lacks a block.
    """

    query_start: torch.Tensor
    position: torch.Tensor
    dense_tail: torch.Tensor
    block_table: torch.Tensor
    block_size: int
    has_holes: bool = False

    def __post_init__(self) -> None:
        """Checks the tensors, and that the table is what it is said to be."""
        sequences = len(self.position)
        for name, entries in (("query_start", sequences + 1), ("position", sequences), ("dense_tail", sequences)):
            tensor = getattr(self, name)
            if tensor.shape != (entries,) or tensor.dtype not in _INTEGERS or tensor.device.type != "cpu":
                raise _misfit(name, f"integers [{entries}] on cpu", tensor)
            object.__setattr__(self, name, tensor.to(torch.int64).contiguous())
        if int(self.query_start[0]) != 0 or bool((self.query_start.diff() < 0).any()):
            raise PatchError(
                "batch: query_start",
                "numbers from 0 on, none lower than the one before",
                str(self.query_start.tolist())[:100],
                "pass the sums of the sequences' numbers of queries",
            )
        table = self.block_table
        if table.dim() != 3 or len(table) != sequences or table.dtype != torch.int32 or table.device.type != "cpu":
            raise _misfit("block_table", f"torch.int32 [{sequences}, KV heads, blocks] on cpu", table)
        object.__setattr__(self, "block_table", table.contiguous())
        if not self.has_holes:
            self._check_blocks()

    def _check_blocks(self) -> None:
        block = torch.arange(self.block_table.shape[2])
        queries = self.query_start.diff()
        end = torch.where(queries > 0, self.position + queries, 0)
        expected = (block * self.block_size < end[:, None])[:, None]
        missing = (expected & (self.block_table < 0)).nonzero()
        if len(missing):
            sequence, head, found = missing[0].tolist()
            raise PatchError(
                "batch: block_table",
                "a slot for every block that the queries read",
                f"none for block {found} of KV head {head} in sequence {sequence}",
                "read no rows before those that the cache was trimmed for",
            )

    @cached_property
    def tokens(self) -> int:
        """The queries of all sequences."""
        return int(self.query_start[-1])

    @cached_property
    def most_queries(self) -> int:
        """The most queries that a sequence has."""
        return int(self.query_start.diff().max()) if len(self.position) else 0

    @cached_property
    def slots(self) -> int:
        """The slots that a pool of blocks must have at least."""
        return int(self.block_table.max()) + 1 if self.block_table.numel() else 0


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """The same on a GPU, with pages for blocks: the host knows no number but the maximum, so a captured graph follows.

    Sequence i has the queries `query_start[i]` to `query_start[i + 1]`, the last left out, which are the last of its
    `lengths[i]` tokens. Token t lies in page `block_table[i, t // page_tokens]`; entries of pages that nobody reads may
    be anything. A row of blocks that ends after `dense_from[i]` tokens reads every key up to its own. `query_start` is
    `[B + 1]`, `lengths` and `dense_from` are `[B]`, `block_table` is `[B, pages]` with any stride between its rows, all
    int32 on q's device. `page_tokens` is a power of two. No sequence has more than `most_queries` queries.

    Raises:
        PatchError: a tensor has another shape, dtype or device, or a number is out of range.
    """

    query_start: torch.Tensor
    lengths: torch.Tensor
    dense_from: torch.Tensor
    block_table: torch.Tensor
    page_tokens: int
    most_queries: int

    def __post_init__(self) -> None:
        """Checks what can be checked without waiting for the device."""
        sequences, device = len(self.lengths), self.lengths.device
        shapes = {"query_start": (sequences + 1,), "lengths": (sequences,), "dense_from": (sequences,)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            wrong = tensor.shape != shape or tensor.dtype != torch.int32 or tensor.device != device
            if wrong or not tensor.is_contiguous():
                raise _misfit(name, f"torch.int32 {list(shape)}, contiguous, on {device}", tensor)
        table = self.block_table
        wrong = table.dim() != 2 or len(table) != sequences or table.dtype != torch.int32 or table.device != device
        if wrong or (table.shape[1] > 1 and table.stride(1) != 1):
            raise _misfit("block_table", f"torch.int32 [{sequences}, pages], stride 1 last, on {device}", table)
        if self.page_tokens < 1 or self.page_tokens & (self.page_tokens - 1):
            raise PatchError("batch: page_tokens", "a power of two", str(self.page_tokens), "use pages of another size")


def _misfit(name: str, expected: str, tensor: torch.Tensor) -> PatchError:
    got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    return PatchError(f"batch: {name}", expected, got, "pass the step's own tensors")
