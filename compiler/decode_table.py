"""What each row of each KV head reads at decode time: the union of its query heads' blocks, with a bit for each head.

All query heads of a KV head share one pass over its keys, though they see different blocks. The union changes from row
to row, so it is a table that a package carries as constants, not code.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from surgeon.compiler.schedule import HeadSchedule, LayerSchedule

MAX_GROUP = 31
"""The most query heads a KV head for which a table can be made: a bit each."""


class Bound(NamedTuple):
    """A number of blocks, or that many after the row's own."""

    follows_row: bool
    offset: int

    def at(self, row: int) -> int:
        """The block that the bound is in a row."""
        return self.offset + row if self.follows_row else self.offset


class Segment(NamedTuple):
    """Blocks begin ≤ j < end that the heads in `heads` see, head h of the group by bit h; never empty."""

    begin: Bound
    end: Bound
    heads: int


@dataclass(frozen=True, eq=False)
class DecodeTable:
    """A layer's table.

    `rows` `[KV heads, rows]` gives each row's plan, rows beyond the last one that of the last. `plans` `[plans, 2]` are
    first and end segment. `segments` `[segments, 4]` are begin, end, whether they follow the row (bit 0 for the begin,
    bit 1 for the end), and the heads; those of a plan ascend and are disjoint, and the last ends with the diagonal.
    All int32.
    """

    rows: npt.NDArray[np.int32]
    plans: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]

    @property
    def max_segments(self) -> int:
        """The most segments that a plan has."""
        return int((self.plans[:, 1] - self.plans[:, 0]).max())


@functools.lru_cache(maxsize=1024)  # sources and packages are made from the same tables
def decode_table(layer: LayerSchedule) -> DecodeTable:
    """Makes a layer's table; its size follows the pieces of its heads, that of `rows` where the last one begins."""
    group = len(layer.heads) // layer.num_key_value_heads
    groups = [layer.heads[begin : begin + group] for begin in range(0, len(layer.heads), group)]
    found = {heads: list(_ranges(heads)) for heads in dict.fromkeys(groups)}
    num_rows = min(layer.num_rows, 1 + max(ranges[-1][0] for ranges in found.values()))
    rows = np.zeros((len(groups), num_rows), dtype=np.int32)
    places: dict[tuple[Segment, ...], int] = {}
    for index, heads in enumerate(groups):
        for first_row, segments in found[heads]:
            rows[index, first_row:] = places.setdefault(segments, len(places))
    ends = np.cumsum([0, *map(len, places)])
    flat = [
        (
            segment.begin.offset,
            segment.end.offset,
            segment.begin.follows_row + 2 * segment.end.follows_row,
            segment.heads,
        )
        for segments in places
        for segment in segments
    ]
    return DecodeTable(
        rows, np.stack((ends[:-1], ends[1:]), axis=1).astype(np.int32), np.array(flat, dtype=np.int32).reshape(-1, 4)
    )


def _ranges(heads: Sequence[HeadSchedule]) -> Iterator[tuple[int, tuple[Segment, ...]]]:
    """The first rows of the ranges in which nothing but the row itself changes, and what such a range reads."""
    pieces = [iter(head.pieces) for head in heads]
    current = [next(piece) for piece in pieces]
    last = min(head.pieces[-1].end_row for head in heads)  # a row that the topology refuses has no piece
    row = 0
    before: tuple[Segment, ...] | None = None
    while True:
        end = min(piece.end_row for piece in current)
        bounds = [
            list(_bounds(head, piece.first_run, piece.end_run, Bound(piece.follows_row, piece.last_begin)))
            for head, piece in zip(heads, current, strict=True)
        ]
        for first_row in _crossings(bounds, row, end):
            segments = tuple(_union(bounds, first_row))
            if segments != before:
                yield first_row, segments
            before = segments
        row = end
        if end == last:
            return
        current = [next(rest) if piece.end_row == end else piece for piece, rest in zip(current, pieces, strict=True)]


def _bounds(head: HeadSchedule, first_run: int, end_run: int, last_begin: Bound) -> Iterator[Bound]:
    """Begins and ends of a head's runs in turn."""
    for run in head.runs[first_run:end_run]:
        yield Bound(False, run.begin)
        yield Bound(False, run.end)
    yield last_begin
    yield Bound(True, 1)


def _crossings(bounds: Iterable[Iterable[Bound]], row: int, end: int) -> list[int]:
    """Where, from `row` to before `end`, the order of the bounds changes: rows in which two meet, and those after."""
    distinct = {bound for of_head in bounds for bound in of_head}
    fixed = [bound.offset for bound in distinct if not bound.follows_row]
    moving = [bound.offset for bound in distinct if bound.follows_row]
    meetings = {at - offset for at in fixed for offset in moving}
    return sorted({row} | {first for meeting in meetings for first in (meeting, meeting + 1) if row < first < end})


def _union(bounds: Iterable[Iterable[Bound]], row: int) -> Iterator[Segment]:
    """The segments of a row, merged where neighbours are seen by the same heads."""
    toggles: dict[int, tuple[Bound, int]] = {}  # by block; bounds that meet in this row count as one
    for head, of_head in enumerate(bounds):
        for bound in of_head:
            first, bits = toggles.get(bound.at(row), (bound, 0))
            toggles[bound.at(row)] = first, bits ^ (1 << head)
    begin, seen = Bound(False, 0), 0
    for _, (bound, bits) in sorted(toggles.items()):
        if bits and seen:
            yield Segment(begin, bound, seen)
        if bits:
            begin, seen = bound, seen ^ bits
