"""The segment tables that a package carries as constants for its GPU kernels.

In decoding, all query heads of a KV head share one pass over its keys, though they see different blocks; in a prefill
kernel whose tiles span several rows of blocks, the rows do. The blocks that some reader of a pass sees change from row
to row, so they are in a table, not in code.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.schedule.segments import Intervals, Ints, Plan, head_intervals, make_table, unions
from surgeon.runtime.errors import TargetError
from surgeon.runtime.package.schedule import UNBOUNDED
from surgeon.runtime.package.segment_table import SegmentTable

MAX_GROUP = 31
"""The most query heads per KV head for which a table can be made: each has one bit."""

MAX_SEGMENTS = 2**25
"""The most segments of the tables of one compile, counted before neighbours that the same readers see are merged."""


@dataclass(frozen=True)
class TableShape:
    """The kind of a schedule's table that a kernel reads: for one query, or for tiles of `rows` by `blocks` blocks.

    A tile has the queries of `heads` consecutive heads.
    """

    phase: str
    rows: int = 1
    blocks: int = 1
    heads: int = 1

    @property
    def name(self) -> str:
        """The table's name in the package, after the schedule's name."""
        if self.phase == "decode":
            return self.phase
        return f"{self.phase}_{self.rows}x{self.blocks}" + (f"x{self.heads}" if self.heads > 1 else "")

    def of(self, layer: LayerSchedule) -> SegmentTable:
        """Makes the table of a schedule."""
        if self.phase == "decode":
            return decode_table(layer)
        return prefill_table(layer, self.rows, self.blocks, self.heads)


def segment_tables(wanted: Mapping[str, tuple[LayerSchedule, TableShape]]) -> dict[str, SegmentTable]:
    """Makes the wanted tables, each under its wanted name.

    Raises:
        TargetError: they would have too many segments.
    """
    number = sum(_most_segments(layer) * shape.rows * shape.blocks * shape.heads for layer, shape in wanted.values())
    if number > MAX_SEGMENTS:
        raise TargetError(
            "layers",
            f"at most {MAX_SEGMENTS:,} segments in the tables of GPU kernels",
            f"up to {number:,}",
            "leave the GPU targets out, or lower the cuts of heads whose clusters are scattered",
        )
    return {name: shape.of(layer) for name, (layer, shape) in wanted.items()}


def decode_table(layer: LayerSchedule) -> SegmentTable:
    """Makes a layer's decoding table, in blocks: a pattern is a KV head, the readers are its query heads.

    Its size grows with the heads' pieces, that of `rows` with the row at which the last piece begins. Segments that all
    readers see are not listed apart: splits of the keys need all segments in order.
    """
    group = len(layer.heads) // layer.num_key_value_heads
    groups = [layer.heads[begin : begin + group] for begin in range(0, len(layer.heads), group)]
    found = {}
    for heads in dict.fromkeys(groups):
        readers = [head_intervals(head, rows=1, blocks=1, first_reader=index) for index, head in enumerate(heads)]
        found[heads] = [Plan(first_row, segments, shared=0) for first_row, segments in unions(readers, step=1)]
    return make_table((found[heads] for heads in groups), layer.num_rows)


def prefill_table(layer: LayerSchedule, rows: int, blocks: int, heads: int = 1) -> SegmentTable:
    """Makes a layer's prefill table for tiles of `rows` rows of blocks; a pattern is a group of `heads` heads.

    Bounds are in units of `blocks` key blocks, which divide `rows`; a tile's own position is that of its first row. A
    reader is a head, a row of the tile and a block of the unit, with the bit (head · rows + row) · blocks + block.
    Segments that every query sees whole come first, then the masked ones: those that only some see, and the tile's own,
    of which a query sees the keys up to its own.
    """
    found = {}
    groups = [layer.heads[begin : begin + heads] for begin in range(0, len(layer.heads), heads)]
    for group in dict.fromkeys(groups):
        readers = [
            head_intervals(head, rows, blocks, row, (index * rows + row) * blocks)
            for index, head in enumerate(group)
            for row in range(rows)
        ]
        readers.append(_own(rows, blocks, 1 << heads * rows * blocks))
        found[group] = [
            _plan(first_row, segments, heads * rows * blocks) for first_row, segments in unions(readers, rows // blocks)
        ]
    num_tiles = layer.num_rows if layer.num_rows == UNBOUNDED else -(-layer.num_rows // rows)
    return make_table((found[group] for group in groups), num_tiles)


def _most_segments(layer: LayerSchedule) -> int:
    """The number of runs that the pieces of a layer's distinct heads have."""
    return sum(piece.end_run - piece.first_run + 1 for head in set(layer.heads) for piece in head.pieces)


def _own(rows: int, blocks: int, bit: int) -> tuple[Intervals, ...]:
    """An extra reader with its `bit`, of the tile's own keys, so that these get segments of their own."""
    units = rows // blocks
    return (Intervals(UNBOUNDED, np.array([0, units]), np.array([1, 1]), np.array([bit, bit])),)


def _plan(first_row: int, segments: Ints, num_readers: int) -> Plan:
    everyone = (1 << num_readers) - 1
    shared = segments[:, 3] == everyone
    ordered = np.concatenate((segments[shared], segments[~shared]))
    ordered[:, 3] &= everyone
    ordered[:, 3] -= (ordered[:, 3] >> 31) << 32  # the same 32 bits as an int32
    return Plan(first_row, ordered, int(shared.sum()))
