"""Topology ─▶ block schedules: the blocks that every head and row of blocks reads, exactly and compactly.

A head's schedule is a list of pieces. A piece is a range of rows that share a slice of constant runs and a last run
that ends on the row itself. Because every row of a cluster reads a prefix of one list of runs, the size of the
description grows with the number of cluster fragments, not with the square of the length.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from surgeon.compiler.schedule.fragments import HIDDEN, CutBlocks, by_cut
from surgeon.compiler.schedule.limits import check_size
from surgeon.compiler.topology.router import LayerRouter
from surgeon.compiler.topology.topology import DenseHead, Head, SparseHead, Topology, WindowHead
from surgeon.runtime.package.schedule import UNBOUNDED, HeadSchedule, Piece, Run


@dataclass(frozen=True)
class LayerSchedule:
    """The schedules of one layer's query heads; consecutive groups of heads share a KV head.

    `num_rows` is the number of rows that may be requested, `UNBOUNDED` unless the topology refuses rows beyond its own.
    `router` is None where no head is routed.
    """

    heads: tuple[HeadSchedule, ...]
    num_key_value_heads: int
    block_size: int
    num_rows: int
    router: LayerRouter | None = None


def schedule_layers(topology: Topology) -> tuple[LayerSchedule, ...]:
    """Schedules every layer, without heads if it is not covered; equal heads and equal layers are one object.

    Raises:
        TopologyError: the schedules would have too many pieces.
    """
    check_size(topology)
    heads = {head for heads in topology.layers for head in heads}
    schedules: dict[Head, HeadSchedule] = {DenseHead(): _dense_schedule()}
    for cut, sharers in by_cut(topology, heads):
        for head in sharers:
            schedules[head] = _sparse_schedule(head, cut, topology.beyond)

    shared_heads: dict[HeadSchedule, HeadSchedule] = {}
    shared_layers: dict[LayerSchedule, LayerSchedule] = {}
    by_head = {head: shared_heads.setdefault(schedule, schedule) for head, schedule in schedules.items()}
    layers = []
    for index, layer_heads in enumerate(topology.layers):
        layer = LayerSchedule(
            heads=tuple(by_head[head] for head in layer_heads),
            num_key_value_heads=topology.model.num_key_value_heads,
            block_size=topology.block_size,
            num_rows=topology.num_blocks if topology.beyond == "error" else UNBOUNDED,
            router=None if topology.router is None else topology.router.layers[index],
        )
        layers.append(shared_layers.setdefault(layer, layer))
    return tuple(layers)


def _dense_schedule() -> HeadSchedule:
    return HeadSchedule((), (Piece(0, UNBOUNDED, 0, 0, 0, False),))


def _sparse_schedule(head: WindowHead | SparseHead, cut: CutBlocks, beyond: str) -> HeadSchedule:
    num_blocks = len(cut.labels)
    begins, labels = (found.tolist() for found in cut.fragments(head.window))
    fragments = list(zip(begins, [*begins[1:], num_blocks], labels, strict=True))
    clusters: dict[int, list[Run]] = {}
    for begin, end, label in fragments:
        clusters.setdefault(label, []).append(Run(begin, end))
    if HIDDEN in clusters:
        clusters[HIDDEN] = _first_hidden(head, cut)
    table = _RunTable()
    planners: dict[int, _RowPlanner] = {}
    for label, runs in sorted(clusters.items(), key=lambda item: item[1][0].begin):
        own = () if label == HIDDEN else runs
        planners[label] = _RowPlanner((Run(0, head.sink), *own), head.window, runs[-1].end - 1, table)
    pieces: list[Piece] = []
    for begin, end, label in fragments:
        for first_row, end_row, plan in planners[label].plans(begin, end):
            pieces.append(Piece(first_row, end_row, *plan))
    pieces += _pieces_beyond(head, num_blocks, beyond, table)
    return HeadSchedule(tuple(table.runs), tuple(_merge_pieces(pieces)), head.route)


def _first_hidden(head: WindowHead | SparseHead, cut: CutBlocks) -> list[Run]:
    """A run from the first to the last of the hidden clusters, of those that see the sink apart from their window.

    Its begin gives the sink its place among the runs, which are stored in the order of the clusters that need them.
    """
    hidden = cut.hidden(head.window)
    apart = hidden & (cut.last >= head.sink + head.window)
    chosen = apart if apart.any() else hidden
    return [Run(int(cut.first[chosen].min()), int(cut.last[chosen].max()) + 1)]


class _RowPlan(NamedTuple):
    first_run: int
    end_run: int
    last_begin: int
    follows_row: bool


class _RunTable:
    """The constant runs of one head, each distinct list stored once."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._begins: dict[tuple[Run, ...], int] = {(): 0}

    def add(self, runs: Iterable[Run]) -> int:
        key = tuple(runs)
        if key not in self._begins:
            self._begins[key] = len(self.runs)
            self.runs += key
        return self._begins[key]


class _RowPlanner:
    """Plans how each row up to last_row splits `runs`, its sink and cluster, around its window."""

    def __init__(self, runs: Iterable[Run], window: int, last_row: int, table: _RunTable) -> None:
        self._runs = _merge_runs(runs)
        self._window = window
        self._ends = [run.end for run in self._runs]
        self._bounds = sorted({0, *(bound for run in self._runs for bound in run)})
        # Blocks that a window covers in every row need no constant run; omitting them lets clusters share their runs.
        self._first_run = table.add(run for run in self._runs if run.end < last_row - window + 1)

    def plans(self, begin: int, end: int) -> Iterator[tuple[int, int, _RowPlan]]:
        """Yields ranges of the rows from `begin` to before `end`, a new one where the window passes a bound."""
        passed = self._bounds[
            bisect_right(self._bounds, begin - self._window) : bisect_left(self._bounds, end - self._window)
        ]
        rows = [begin, *(bound + self._window for bound in passed)]
        for first_row, end_row in zip(rows, [*rows[1:], end], strict=True):
            yield first_row, end_row, self.plan(first_row)

    def plan(self, row: int) -> _RowPlan:
        """The plan of one row."""
        window_begin = row - self._window + 1
        if window_begin <= 0:
            return _RowPlan(0, 0, 0, False)
        before = bisect_left(self._ends, window_begin)
        touching = before < len(self._runs) and self._runs[before].begin < window_begin
        last_begin, follows_row = (self._runs[before].begin, False) if touching else (1 - self._window, True)
        slice_begin = self._first_run if before else 0
        return _RowPlan(slice_begin, slice_begin + before, last_begin, follows_row)


def _pieces_beyond(head: WindowHead | SparseHead, num_blocks: int, beyond: str, table: _RunTable) -> Iterator[Piece]:
    if beyond == "error":
        return
    if beyond == "dense":
        yield Piece(num_blocks, UNBOUNDED, 0, 0, 0, False)
        return
    apart = max(num_blocks, head.sink + head.window)  # the first row whose window does not touch the sink
    for begin, end in ((num_blocks, apart), (apart, UNBOUNDED)):
        if begin < end:
            planner = _RowPlanner((Run(0, head.sink),), head.window, end, table)
            yield Piece(begin, end, *planner.plan(begin))


def _merge_runs(runs: Iterable[Run]) -> list[Run]:
    """Joins runs that overlap or touch, given in order of where they begin, and drops empty ones."""
    merged: list[Run] = []
    for run in runs:
        if merged and run.begin <= merged[-1].end:
            if run.end > merged[-1].end:
                merged[-1] = Run(merged[-1].begin, run.end)
        elif run.begin < run.end:
            merged.append(run)
    return merged


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
