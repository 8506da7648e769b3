"""Segments of key blocks, row by row, each with the readers that see it.

A kernel that serves several readers in one pass over the keys walks such a list. In decoding the readers are the query
heads of a KV head; for a tile of queries they are the rows of blocks within it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from surgeon.runtime.package.schedule import UNBOUNDED, HeadSchedule
from surgeon.runtime.package.segment_table import SegmentTable

Ints = npt.NDArray[np.int64]


class Intervals(NamedTuple):
    """The key intervals of a reader in rows before `end_row`: their bounds, unordered, begin and end not distinguished.

    A bound is at `offsets` or, if `follows` is 1, that far from the row's own position. `readers` has one bit set;
    bounds with other bits belong to other readers, listed together.
    """

    end_row: int
    offsets: Ints
    follows: Ints
    readers: Ints


class Plan(NamedTuple):
    """From `first_row` on: segments `[segments, 4]` as in a `SegmentTable`, the first `shared` seen by every reader."""

    first_row: int
    segments: Ints
    shared: int


def head_intervals(
    head: HeadSchedule, rows: int, blocks: int, row: int = 0, first_reader: int = 0
) -> tuple[Intervals, ...]:
    """The intervals that row number `row` of a tile of `rows` rows reads, in units of `blocks` blocks, dividing `rows`.

    Tiles begin at multiples of `rows`. The reader with bit `first_reader + c` sees block c of each unit. The last run
    continues to the end of the tile, where causality ends it, and the last piece continues for ever.
    """
    columns = np.arange(blocks)[:, None]
    runs = np.array(head.runs, dtype=np.int64).reshape(-1)
    found: list[Intervals] = []
    for piece in head.pieces:
        end_row = UNBOUNDED if piece is head.pieces[-1] else -((row - piece.end_row) // rows)
        if end_row <= (found[-1].end_row if found else 0):
            continue  # the tile's other rows are in this piece, or there are none
        listed = runs[2 * piece.first_run : 2 * piece.end_run]
        last_begin = piece.last_begin + row if piece.follows_row else piece.last_begin
        bounds = np.concatenate((listed, (last_begin, rows)))
        follows = np.concatenate((np.zeros_like(listed), (int(piece.follows_row), 1)))
        found.append(
            Intervals(
                end_row,
                -((columns - bounds) // blocks).reshape(-1),  # the first unit whose block c is not before the bound
                np.tile(follows, blocks),
                np.repeat(1 << np.arange(first_reader, first_reader + blocks), len(bounds)),
            )
        )
    return tuple(found)


def unions(readers: Sequence[Sequence[Intervals]], step: int) -> Iterator[tuple[int, Ints]]:
    """Yields the rows at which more changes than the row's own position, and the segments from there on, ascending.

    Row r's own position is `step` · r. Neighbouring segments that the same readers see are merged.
    """
    numbers = [0] * len(readers)
    row = 0
    before: Ints | None = None
    while True:
        current = [reader[number] for reader, number in zip(readers, numbers, strict=True)]
        end = min(intervals.end_row for intervals in current)
        offsets, follows, bits = (np.concatenate([intervals[part] for intervals in current]) for part in (1, 2, 3))
        for first_row in _crossings(offsets, follows, step, row, end):
            segments = _union(offsets, follows, bits, step * first_row)
            if before is None or not np.array_equal(segments, before):
                yield first_row, segments
            before = segments
        if end == UNBOUNDED:
            return
        row = end
        numbers = [number + (intervals.end_row == end) for number, intervals in zip(numbers, current, strict=True)]


def make_table(patterns: Iterable[Sequence[Plan]], num_rows: int) -> SegmentTable:
    """Makes the table of several patterns for at most `num_rows` rows; equal plans are stored once."""
    patterns = list(patterns)
    rows = np.zeros((len(patterns), min(num_rows, 1 + max(plans[-1].first_row for plans in patterns))), dtype=np.int32)
    places: dict[tuple[bytes, int], int] = {}
    distinct: list[Plan] = []
    for pattern, plans in zip(rows, patterns, strict=True):
        for plan in plans:
            place = places.setdefault((plan.segments.tobytes(), plan.shared), len(places))
            if place == len(distinct):
                distinct.append(plan)
            pattern[plan.first_row :] = place
    ends = np.cumsum([0, *(len(plan.segments) for plan in distinct)])
    middles = ends[:-1] + [plan.shared for plan in distinct]
    return SegmentTable(
        rows,
        np.stack((ends[:-1], middles, ends[1:]), axis=1).astype(np.int32),
        np.concatenate([plan.segments for plan in distinct]).astype(np.int32),
    )


def _crossings(offsets: Ints, follows: Ints, step: int, row: int, end: int) -> list[int]:
    """The rows from `row` to before `end` at which the order of the bounds changes: where two meet, and the next."""
    if end - row == 1:
        return [row]
    fixed, moving = np.unique(offsets[follows == 0]), np.unique(offsets[follows == 1])
    gaps = np.subtract.outer(fixed, moving).reshape(-1)
    meetings = -(-gaps // step)
    after = meetings[gaps % step == 0] + 1
    changes = np.concatenate((meetings, after))
    return [row, *np.unique(changes[(changes > row) & (changes < end)]).tolist()]


def _union(offsets: Ints, follows: Ints, readers: Ints, own: int) -> Ints:
    """The segments of a row whose own position is `own`."""
    places = offsets + own * follows
    order = np.argsort(places, kind="stable")
    # Bounds that meet in this row count as one, which toggles the readers with an odd number of them.
    first_at = np.flatnonzero(np.diff(places[order], prepend=-1))
    toggles = np.bitwise_xor.reduceat(readers[order], first_at)
    bounds, toggles = order[first_at[toggles != 0]], toggles[toggles != 0]
    seen = np.bitwise_xor.accumulate(toggles)
    begins = np.flatnonzero(seen)  # the last bound ends the last segment
    begin, end = bounds[begins], bounds[begins + 1]
    return np.stack((offsets[begin], offsets[end], follows[begin] + 2 * follows[end], seen[begins]), axis=1)
