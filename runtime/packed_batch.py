"""The sequences of a step of an engine, their queries one behind the other; checked once for all layers."""

from dataclasses import dataclass
from functools import cached_property

import torch

from surgeon.runtime.errors import PatchError

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


def _misfit(name: str, expected: str, tensor: torch.Tensor) -> PatchError:
    got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    return PatchError(f"batch: {name}", expected, got, "pass the step's own tensors")
