"""From a topology to block schedules: which blocks every head and row of blocks reads, exactly and compactly.

A head's schedule is a list of pieces. A piece is a range of rows that share a slice of constant runs and a last run
that ends on the row itself. Because every row of a cluster reads a prefix of one list of runs, the size of the
description follows the number of cluster fragments, not the square of the length.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from surgeon.compiler.topology.topology import DenseHead, Head, SparseHead, Topology

UNBOUNDED = 2**31 - 1
"""The row after the last one of a piece that has no end."""


class Run(NamedTuple):
    """Key blocks begin ≤ j < end, all of them fully visible."""

    begin: int
    end: int


class Piece(NamedTuple):
    """Rows first_row ≤ i < end_row that read alike.

    They read `runs[first_run:end_run]` of their head, ascending and disjoint, then every block from the last run's
    begin up to the diagonal block i. That begin is `last_begin`, or `i + last_begin` where `follows_row`.
    """

    first_row: int
    end_row: int
    first_run: int
    end_run: int
    last_begin: int
    follows_row: bool


@dataclass(frozen=True)
class HeadSchedule:
    """One head's pieces, ascending, without gaps from row 0 on, and the constant runs that they slice."""

    runs: tuple[Run, ...]
    pieces: tuple[Piece, ...]

    def row(self, row: int) -> tuple[Run, ...]:
        """The runs of one row, the last of which ends with the diagonal block."""
        piece = next(piece for piece in self.pieces if row < piece.end_row)
        last = Run(piece.last_begin + (row if piece.follows_row else 0), row + 1)
        return (*self.runs[piece.first_run : piece.end_run], last)

    def block_mask(self, num_blocks: int) -> npt.NDArray[np.bool_]:
        """The schedule expanded, bool `[num_blocks, num_blocks]`: what the kernel will read."""
        mask = np.zeros((num_blocks, num_blocks), dtype=np.bool_)
        for row in range(num_blocks):
            for run in self.row(row):
                mask[row, run.begin : run.end] = True
        return mask


@dataclass(frozen=True)
class LayerSchedule:
    """The schedules of one layer's query heads; consecutive groups of heads share a KV head.

    `num_rows` is the number of rows that may be asked for, `UNBOUNDED` unless the topology refuses what is beyond it.
    """

    heads: tuple[HeadSchedule, ...]
    num_key_value_heads: int
    block_size: int
    num_rows: int


def schedule_layers(topology: Topology) -> tuple[LayerSchedule, ...]:
    """The schedule of every layer, without heads where none is covered; equal heads and layers are one object."""
    clusters: dict[tuple[int, float], tuple[_Cluster, ...]] = {}
    schedules: dict[Head, HeadSchedule] = {}
    for head in {head for heads in topology.layers for head in heads}:
        if isinstance(head, DenseHead):
            schedules[head] = _dense_schedule()
            continue
        cut = (head.dendrogram, head.cut)
        if cut not in clusters:
            found = topology.dendrograms[head.dendrogram].clusters(head.cut)
            clusters[cut] = tuple(_Cluster(blocks, _intervals(blocks)) for blocks in found)
        schedules[head] = _sparse_schedule(head, clusters[cut], topology.num_blocks, topology.beyond)

    shared_heads: dict[HeadSchedule, HeadSchedule] = {}
    shared_layers: dict[LayerSchedule, LayerSchedule] = {}
    by_head = {head: shared_heads.setdefault(schedule, schedule) for head, schedule in schedules.items()}
    layers = []
    for heads in topology.layers:
        layer = LayerSchedule(
            heads=tuple(by_head[head] for head in heads),
            num_key_value_heads=topology.model.num_key_value_heads,
            block_size=topology.block_size,
            num_rows=topology.num_blocks if topology.beyond == "error" else UNBOUNDED,
        )
        layers.append(shared_layers.setdefault(layer, layer))
    return tuple(layers)


def last_readers(layer: LayerSchedule, num_blocks: int) -> npt.NDArray[np.int64]:
    """Liveness: the last row that can read each block of each KV head, `[num_key_value_heads, num_blocks]`.

    Once a sequence has passed that row, the block may leave the cache. `UNBOUNDED` where some row will always read it,
    and in a layer that is not covered, where the model's own attention does.
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
    """The last readers of as many blocks as there are rules for, `[num_key_value_heads, blocks]`.

    A block behind the last column has its reader as many rows behind that column's: only windows reach it.
    """
    # From its last piece's first row on, a head reads blocks that are as far from every row.
    settled = max(head.pieces[-1].first_row for head in layer.heads) + 1
    return last_readers(layer, settled if layer.num_rows == UNBOUNDED else layer.num_rows)


def liveness_tables(layers: Iterable[LayerSchedule]) -> dict[LayerSchedule, npt.NDArray[np.int64]]:
    """The liveness table of each distinct layer that is covered."""
    return {layer: liveness_table(layer) for layer in dict.fromkeys(layers) if layer.heads}


def rows_longest_first(layer: LayerSchedule, num_rows: int) -> npt.NDArray[np.int64]:
    """Rows 0..num_rows-1 by falling number of visible blocks over all heads, later rows first among equals."""
    work = np.zeros(num_rows, dtype=np.int64)
    for head in layer.heads:
        lengths = np.cumsum([0, *(run.end - run.begin for run in head.runs)])
        for piece in head.pieces:
            rows = np.arange(piece.first_row, min(piece.end_row, num_rows))
            begin = piece.last_begin + (rows if piece.follows_row else 0)
            work[rows] += lengths[piece.end_run] - lengths[piece.first_run] + rows + 1 - begin
    return np.lexsort((-np.arange(num_rows), -work))


def _dense_schedule() -> HeadSchedule:
    return HeadSchedule((), (Piece(0, UNBOUNDED, 0, 0, 0, False),))


class _Cluster(NamedTuple):
    blocks: tuple[int, ...]
    runs: tuple[Run, ...]


def _sparse_schedule(head: SparseHead, clusters: tuple[_Cluster, ...], num_blocks: int, beyond: str) -> HeadSchedule:
    table = _RunTable()
    rows: list[_RowPlan] = [_RowPlan(0, 0, 0, False)] * num_blocks
    for cluster in clusters:
        runs = _merge_runs((Run(0, head.sink), *cluster.runs))
        plan = _row_planner(runs, head.window, cluster.blocks[-1], table)
        for row in cluster.blocks:
            rows[row] = plan(row)
    pieces = [Piece(begin, end, *plan) for begin, end, plan in _equal_ranges(rows)]
    pieces += _pieces_beyond(head, num_blocks, beyond, table)
    return HeadSchedule(tuple(table.runs), tuple(_merge_pieces(pieces)))


class _RowPlan(NamedTuple):
    first_run: int
    end_run: int
    last_begin: int
    follows_row: bool


class _RunTable:
    """Constant runs of one head, each distinct list stored once."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._begins: dict[tuple[Run, ...], int] = {(): 0}

    def add(self, runs: Iterable[Run]) -> int:
        key = tuple(runs)
        if key not in self._begins:
            self._begins[key] = len(self.runs)
            self.runs += key
        return self._begins[key]


def _row_planner(runs: list[Run], window: int, last_row: int, table: _RunTable) -> Callable[[int], _RowPlan]:
    """How each row up to last_row splits `runs`, its sink and cluster, around its window."""
    ends = [run.end for run in runs]
    # What some window covers in every row needs no constant; leaving it out lets clusters share their runs.
    first_run = table.add(run for run in runs if run.end < last_row - window + 1)

    def plan(row: int) -> _RowPlan:
        window_begin = row - window + 1
        if window_begin <= 0:
            return _RowPlan(0, 0, 0, False)
        before = bisect_left(ends, window_begin)
        touching = before < len(runs) and runs[before].begin < window_begin
        last_begin, follows_row = (runs[before].begin, False) if touching else (1 - window, True)
        slice_begin = first_run if before else 0
        return _RowPlan(slice_begin, slice_begin + before, last_begin, follows_row)

    return plan


def _pieces_beyond(head: SparseHead, num_blocks: int, beyond: str, table: _RunTable) -> Iterator[Piece]:
    if beyond == "error":
        return
    if beyond == "dense":
        yield Piece(num_blocks, UNBOUNDED, 0, 0, 0, False)
        return
    sink = _merge_runs([Run(0, head.sink)])
    apart = max(num_blocks, head.sink + head.window)  # the first row whose window does not touch the sink
    for begin, end in ((num_blocks, apart), (apart, UNBOUNDED)):
        if begin < end:
            yield Piece(begin, end, *_row_planner(sink, head.window, end, table)(begin))


def _intervals(blocks: tuple[int, ...]) -> tuple[Run, ...]:
    """The runs of ascending blocks."""
    breaks = [index for index in range(1, len(blocks)) if blocks[index] != blocks[index - 1] + 1]
    ends = [*breaks, len(blocks)]
    return tuple(Run(blocks[begin], blocks[end - 1] + 1) for begin, end in zip([0, *breaks], ends, strict=True))


def _merge_runs(runs: Iterable[Run]) -> list[Run]:
    """Joins runs that overlap or touch, given in the order of their begins; empty ones vanish."""
    merged: list[Run] = []
    for run in runs:
        if merged and run.begin <= merged[-1].end:
            if run.end > merged[-1].end:
                merged[-1] = Run(merged[-1].begin, run.end)
        elif run.begin < run.end:
            merged.append(run)
    return merged


def _equal_ranges(rows: list[_RowPlan]) -> Iterator[tuple[int, int, _RowPlan]]:
    begin = 0
    for row in range(1, len(rows) + 1):
        if row == len(rows) or rows[row] != rows[begin]:
            yield begin, row, rows[begin]
            begin = row


def _merge_pieces(pieces: Iterable[Piece]) -> Iterator[Piece]:
    pending: Piece | None = None
    for piece in pieces:
        if pending is not None and pending[2:] == piece[2:]:
            pending = pending._replace(end_row=piece.end_row)
            continue
        if pending is not None:
            yield pending
        pending = piece
    if pending is not None:
        yield pending
