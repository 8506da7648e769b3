"""Liveness: the last row that reads each block, computed without expanding a schedule."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.runtime.package.schedule import UNBOUNDED


def last_readers(layer: LayerSchedule, num_blocks: int) -> npt.NDArray[np.int64]:
    """Liveness: the last row that can read each block of each KV head, `[num_key_value_heads, num_blocks]`.

    Once a sequence has passed that row, the block may leave the cache. `UNBOUNDED` if rows read it for ever, and in a
    layer that is not covered, where the model's own attention reads everything.
    """
    if not layer.heads:
        return np.full((layer.num_key_value_heads, num_blocks), UNBOUNDED, dtype=np.int64)
    group = len(layer.heads) // layer.num_key_value_heads
    last = np.zeros((layer.num_key_value_heads, num_blocks), dtype=np.int64)
    for index, head in enumerate(layer.heads):
        kv_head = last[index // group]
        for piece in head.pieces:
            end_row = min(piece.end_row, layer.num_rows)
            if piece.first_row >= end_row:
                continue
            final = UNBOUNDED if end_row == UNBOUNDED else end_row - 1
            for run in head.runs[piece.first_run : piece.end_run]:
                kv_head[run.begin : run.end] = np.maximum(kv_head[run.begin : run.end], final)
            blocks = np.arange(min(num_blocks, end_row))
            if piece.follows_row:  # row i reads block j from i + last_begin on, so j's last reader is j − last_begin
                readers = np.minimum(blocks - piece.last_begin, final)
                readers[readers < np.maximum(piece.first_row, blocks)] = 0
            else:
                readers = np.where(blocks >= piece.last_begin, final, 0)
            kv_head[: len(blocks)] = np.maximum(kv_head[: len(blocks)], readers)
    return last


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
