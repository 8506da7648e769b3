"""Topology ─▶ block schedules: the blocks that every head and row of blocks reads, exactly and compactly.

A head's schedule is a list of pieces. A piece is a range of rows that share a slice of constant runs and a last run
that ends on the row itself. Because every row of a cluster reads a prefix of one list of runs, the size of the
description grows with the number of cluster fragments, not with the square of the length.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from surgeon.compiler.topology.topology import DenseHead, Head, SparseHead, Topology, WindowHead
from surgeon.runtime.package.schedule import UNBOUNDED, HeadSchedule, Piece, Run


@dataclass(frozen=True)
class LayerSchedule:
    """The schedules of one layer's query heads; consecutive groups of heads share a KV head.

    `num_rows` is the number of rows that may be requested, `UNBOUNDED` unless the topology refuses rows beyond its own.
    """

    heads: tuple[HeadSchedule, ...]
    num_key_value_heads: int
    block_size: int
    num_rows: int


def schedule_layers(topology: Topology) -> tuple[LayerSchedule, ...]:
    """Schedules every layer, without heads if it is not covered; equal heads and equal layers are one object."""
    alone = tuple(_Cluster((block,), (Run(block, block + 1),)) for block in range(topology.num_blocks))
    clusters: dict[tuple[int, float], tuple[_Cluster, ...]] = {}
    schedules: dict[Head, HeadSchedule] = {}
    for head in {head for heads in topology.layers for head in heads}:
        if isinstance(head, DenseHead):
            schedules[head] = _dense_schedule()
            continue
        if isinstance(head, WindowHead):
            schedules[head] = _sparse_schedule(head, alone, topology.num_blocks, topology.beyond)
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


def _dense_schedule() -> HeadSchedule:
    return HeadSchedule((), (Piece(0, UNBOUNDED, 0, 0, 0, False),))


class _Cluster(NamedTuple):
    blocks: tuple[int, ...]
    runs: tuple[Run, ...]


def _sparse_schedule(
    head: WindowHead | SparseHead, clusters: tuple[_Cluster, ...], num_blocks: int, beyond: str
) -> HeadSchedule:
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


def _row_planner(runs: list[Run], window: int, last_row: int, table: _RunTable) -> Callable[[int], _RowPlan]:
    """Plans how each row up to last_row splits `runs`, its sink and cluster, around its window."""
    ends = [run.end for run in runs]
    # Blocks that a window covers in every row need no constant run; omitting them lets clusters share their runs.
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


def _pieces_beyond(head: WindowHead | SparseHead, num_blocks: int, beyond: str, table: _RunTable) -> Iterator[Piece]:
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
    """Groups ascending blocks into runs."""
    breaks = [index for index in range(1, len(blocks)) if blocks[index] != blocks[index - 1] + 1]
    ends = [*breaks, len(blocks)]
    return tuple(Run(blocks[begin], blocks[end - 1] + 1) for begin, end in zip([0, *breaks], ends, strict=True))


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
