"""What each tile of queries reads: the union of its rows' blocks, in units of tiles of keys, masked by block."""

import numpy as np

from surgeon.compiler.schedule.schedule import UNBOUNDED, LayerSchedule
from surgeon.compiler.schedule.segments import Ints, Plan, SegmentTable, Stretch, head_stretches, make_table, unions


def prefill_table(layer: LayerSchedule, rows: int, blocks: int) -> SegmentTable:
    """Makes a layer's table for tiles of `rows` rows of blocks; a pattern is a head.

    Bounds are in units of `blocks` key blocks, which divide `rows`; a tile's own place is its first row's. A reader is
    a row of the tile and a block of the unit, with the bit row · blocks + block. Segments that every query sees whole
    come first, then the masked ones: those that only some see, and the tile's own, of which a query sees the keys up
    to itself.
    """
    found = {}
    for head in dict.fromkeys(layer.heads):
        readers = [head_stretches(head, rows, blocks, row, row * blocks) for row in range(rows)]
        readers.append(_own(rows, blocks))
        found[head] = [
            _plan(first_row, segments, rows * blocks) for first_row, segments in unions(readers, rows // blocks)
        ]
    num_tiles = layer.num_rows if layer.num_rows == UNBOUNDED else -(-layer.num_rows // rows)
    return make_table((found[head] for head in layer.heads), num_tiles)


def _own(rows: int, blocks: int) -> tuple[Stretch, ...]:
    """A reader more, of the tile's own keys, so that they are segments of their own."""
    units = rows // blocks
    bit = 1 << rows * blocks
    return (Stretch(UNBOUNDED, np.array([0, units]), np.array([1, 1]), np.array([bit, bit])),)


def _plan(first_row: int, segments: Ints, num_readers: int) -> Plan:
    everyone = (1 << num_readers) - 1
    shared = segments[:, 3] == everyone
    ordered = np.concatenate((segments[shared], segments[~shared]))
    ordered[:, 3] &= everyone
    ordered[:, 3] -= (ordered[:, 3] >> 31) << 32  # the same 32 bits as an int32
    return Plan(first_row, ordered, int(shared.sum()))
