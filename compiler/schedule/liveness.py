"""Liveness: the last row that reads each block, computed without expanding a schedule."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.runtime.package.schedule import UNBOUNDED, HeadSchedule

Ints = npt.NDArray[np.int64]


def last_readers(layer: LayerSchedule, num_blocks: int) -> npt.NDArray[np.int64]:
    """Liveness: the last row that can read each block of each KV head, `[num_key_value_heads, num_blocks]`.

    Once a sequence has passed that row, the block may leave the cache. `UNBOUNDED` if rows read it for ever, and in a
    layer that is not covered, where the model's own attention reads everything.
    """
    if not layer.heads:
        return np.full((layer.num_key_value_heads, num_blocks), UNBOUNDED, dtype=np.int64)
    group = len(layer.heads) // layer.num_key_value_heads
    found = {head: _head_readers(head, num_blocks, layer.num_rows) for head in dict.fromkeys(layer.heads)}
    groups = [layer.heads[begin : begin + group] for begin in range(0, len(layer.heads), group)]
    return np.stack([np.maximum.reduce([found[head] for head in dict.fromkeys(heads)]) for heads in groups])


def _head_readers(head: HeadSchedule, num_blocks: int, num_rows: int) -> Ints:
    """The last readers of one head's blocks, `[num_blocks]`, in time that grows with its pieces and blocks."""
    if head.route:  # any later row may choose any block
        return np.full(num_blocks, UNBOUNDED if num_rows == UNBOUNDED else num_rows - 1, dtype=np.int64)
    readers = np.zeros(num_blocks, dtype=np.int64)
    last = np.zeros(len(head.runs), dtype=np.int64)  # the last row that reads each run
    # From the last row up, blocks from `seen` on have a reader: a last run ends on its own row, so they are contiguous.
    seen = num_blocks
    for piece in reversed(head.pieces):
        end_row = min(piece.end_row, num_rows)
        if piece.first_row >= end_row:
            continue
        final = UNBOUNDED if end_row == UNBOUNDED else end_row - 1
        unread = last[piece.first_run : piece.end_run]
        np.copyto(unread, final, where=unread == 0)
        seen = min(seen, end_row)
        begin = piece.last_begin + (piece.first_row if piece.follows_row else 0)
        new = np.arange(begin, seen)
        # Where the run follows its row, row i is the last to read block i + last_begin.
        readers[begin:seen] = np.minimum(new - piece.last_begin, final) if piece.follows_row else final
        seen = min(seen, begin)
    for run, final in sorted(zip(head.runs, last.tolist(), strict=True), key=lambda pair: pair[1]):
        readers[run.begin : run.end] = np.maximum(readers[run.begin : run.end], final)
    return readers


def liveness_table(layer: LayerSchedule) -> npt.NDArray[np.int64]:
    """The last readers of the blocks up to where they become regular, or of all, `[num_key_value_heads, blocks]`.

    The reader of a block n columns past the last is n rows after the last column's: only windows reach that block.
    """
    # From its last piece's first row on, a head reads blocks at the same distance from every row.
    settled = max(head.pieces[-1].first_row for head in layer.heads) + 1
    return last_readers(layer, settled if layer.num_rows == UNBOUNDED else layer.num_rows)


def liveness_tables(layers: Iterable[LayerSchedule]) -> dict[LayerSchedule, npt.NDArray[np.int64]]:
    """The liveness table of each distinct layer that is covered."""
    return {layer: liveness_table(layer) for layer in dict.fromkeys(layers) if layer.heads}
