"""Block schedules, the blocks of keys that each row of blocks reads, and their form in a package.

Source: schedule.safetensors, package formats version 1 and 2. For a schedule named n it holds the int32 matrices
`n.pieces` [pieces, 6] in the order of `Piece`, `n.runs` [runs, 2], `n.heads` [query heads, 3]: first piece, end piece,
first run, `n.last_readers` [KV heads, blocks], and `n.layers` [layers, 1] that have it; for layers with routed heads
also `n.routes` [query heads, 1]. A piece's run numbers count from its head's first run. `topology_sha256` [1, 8] is the
hash of the topology that all were made from.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from surgeon.runtime.errors import short_repr
from surgeon.runtime.package.manifest import Manifest, ModelShape
from surgeon.runtime.package.tensors import Matrices, Matrix, ascend

FILE = "schedule.safetensors"

NODE = 8
"""Tokens in a node: the mean of their quantised keys stands for them where routed heads choose."""

TILE = 16
"""Consecutive queries that choose together."""

MOST_SINGLES = 2 * (TILE - 1)
"""The most queries of a call that choose alone beside whole tiles: fewer than a tile of them at either end."""

UNBOUNDED = 2**31 - 1
"""The row after the last one of a piece that has no end."""

MAX_PIECES = 2**21
"""The most pieces that the distinct schedules of a package may have together, each counting its distinct heads."""

_MAX_RUNS = 2 * MAX_PIECES


class Run(NamedTuple):
    """Key blocks begin ≤ j < end, all of them fully visible."""

    begin: int
    end: int


class Piece(NamedTuple):
    """Rows first_row ≤ i < end_row that follow one rule.

    They read `runs[first_run:end_run]` of their head, ascending and disjoint, then every block of a last run up to the
    diagonal block i. The last run begins at `last_begin`, or at `i + last_begin` if `follows_row`.
    """

    first_row: int
    end_row: int
    first_run: int
    end_run: int
    last_begin: int
    follows_row: bool


@dataclass(frozen=True)
class HeadSchedule:
    """One head's pieces, ascending, without gaps from row 0 on, and the constant runs that they slice.

    In each row, a routed head also reads up to `route` of the other blocks before the row's own, chosen by content.
    """

    runs: tuple[Run, ...]
    pieces: tuple[Piece, ...]
    route: int = 0

    def row(self, row: int) -> tuple[Run, ...]:
        """The runs of one row, ascending; the last one ends with the diagonal block. None is of chosen blocks."""
        piece = self.pieces[bisect_right(self.pieces, row, key=lambda piece: piece.first_row) - 1]
        last = Run(piece.last_begin + (row if piece.follows_row else 0), row + 1)
        return (*self.runs[piece.first_run : piece.end_run], last)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # kept, since layers of many heads are looked up by all of these
        return hash((self.runs, self.pieces, self.route))

    def visible_blocks(self, num_rows: int) -> int:
        """The number of blocks that the first `num_rows` rows read together, chosen ones included."""
        blocks = 0
        before = [0, *accumulate(run.end - run.begin for run in self.runs)]
        for piece in self.pieces:
            end = min(piece.end_row, num_rows)
            if piece.first_row >= end:
                break
            runs = before[piece.end_run] - before[piece.first_run]
            blocks += (runs + 1 - piece.last_begin) * (end - piece.first_row)
            if not piece.follows_row:  # the last run also grows with its row: add first_row + … + (end − 1)
                blocks += (piece.first_row + end - 1) * (end - piece.first_row) // 2
            if self.route:
                rows = np.arange(piece.first_row, end, dtype=np.int64)
                hidden = piece.last_begin - runs + (rows if piece.follows_row else 0)
                blocks += int(np.broadcast_to(np.minimum(hidden, self.route), rows.shape).sum())
        return blocks

    @property
    def dense_rows(self) -> int:
        """The number of rows, from row 0 on, that read every block up to their own."""
        rows = 0
        for piece in self.pieces:
            if piece.first_run != piece.end_run or piece.last_begin != 0 or piece.follows_row:
                break
            rows = piece.end_row
        return rows


@dataclass(frozen=True, eq=False)
class PackagedSchedule:
    """A layer's schedule in a package, with one entry of `heads` per query head; equal heads are one object.

    `last_readers` `[KV heads, blocks]` are the last rows of blocks that read each block. A block n columns beyond the
    last one has its last reader n rows after that of the last column.
    """

    heads: tuple[HeadSchedule, ...]
    last_readers: Matrix

    def tensors(self, name: str, layers: Iterable[int]) -> dict[str, Matrix]:
        """The tensors that schedule.safetensors holds under `name` for this schedule, which these layers have."""
        places: dict[HeadSchedule, tuple[int, int, int]] = {}
        pieces: list[Piece] = []
        runs: list[Run] = []
        for head in self.heads:
            if head not in places:
                places[head] = (len(pieces), len(pieces) + len(head.pieces), len(runs))
                pieces += head.pieces
                runs += head.runs
        return {
            f"{name}.pieces": _matrix(pieces, 6),
            f"{name}.runs": _matrix(runs, 2),
            f"{name}.heads": _matrix((places[head] for head in self.heads), 3),
            f"{name}.last_readers": self.last_readers,
            f"{name}.layers": _matrix(((layer,) for layer in layers), 1),
            **({f"{name}.routes": _matrix(((head.route,) for head in self.heads), 1)} if self.is_routed else {}),
        }

    @property
    def is_routed(self) -> bool:
        """True if a head chooses blocks by content."""
        return any(head.route for head in self.heads)


def origin(topology_sha256: str) -> dict[str, Matrix]:
    """The tensor that names the topology, by its hash, that all schedules of a package were made from."""
    return {"topology_sha256": np.frombuffer(bytes.fromhex(topology_sha256), dtype="<i4").reshape(1, 8)}


def read_schedules(data: bytes | None, manifest: Manifest, where: str) -> dict[int, PackagedSchedule]:
    """Reads the schedule of every covered layer from schedule.safetensors; equal heads are one object.

    Raises:
        PackageError: a matrix that the manifest's kernels name is missing, has another form or points outside itself,
            a layer has no schedule, several or another's, or the schedules are those of another topology.
    """
    matrices = Matrices(data, where)
    made_from = matrices.read("topology_sha256", 8).astype("<i4").tobytes().hex()
    if made_from != manifest.topology_sha256:
        raise matrices.fault("topology_sha256", manifest.topology_sha256, made_from)
    names: dict[int, str] = {}
    for kernel in manifest.kernels:
        for layer in kernel.layers if kernel.schedule else ():
            if names.setdefault(layer, kernel.schedule) != kernel.schedule:
                raise matrices.fault(f"layer {layer}", "one schedule", f"{names[layer]} and {kernel.schedule}"[:100])
    if not names.keys() >= set(manifest.layers):
        missing = min(set(manifest.layers) - names.keys())
        raise matrices.fault(f"layer {missing}", "a kernel that names its schedule", "none")
    for name in dict.fromkeys(names.values()):
        layers, given = (
            matrices.read(f"{name}.layers", 1),
            [layer for layer, own in sorted(names.items()) if own == name],
        )
        if layers.flatten().tolist() != given:
            raise matrices.fault(
                f"{name}.layers", f"{short_repr(given)}, as the manifest has it", short_repr(layers.tolist())
            )
    shared: dict[tuple[bytes, bytes, int], HeadSchedule] = {}
    room = _Room(matrices)
    routed = {names[layer] for layer in manifest.routed}
    found = {
        name: _read(matrices, name, manifest.model, shared, room, name in routed)
        for name in dict.fromkeys(names.values())
    }
    for layer, name in names.items():
        if layer not in manifest.routed and found[name].is_routed:
            raise matrices.fault(f"{name}.routes", f"none for layer {layer}, as the manifest has it", "some")
    return {layer: found[name] for layer, name in sorted(names.items())}


def _matrix(rows: Iterable[tuple[int, ...]], columns: int) -> Matrix:
    return np.array(list(rows), dtype=np.int32).reshape(-1, columns)


class _Room:
    """The pieces and runs that may still be read, of all schedules together."""

    def __init__(self, matrices: Matrices) -> None:
        self._matrices = matrices
        self._pieces = self._runs = 0

    def take(self, pieces: int, runs: int) -> None:
        """Refuses more than the limit."""
        self._pieces += pieces
        self._runs += runs
        if self._pieces > MAX_PIECES or self._runs > _MAX_RUNS:
            raise self._matrices.fault(
                "",
                f"at most {MAX_PIECES:,} pieces and {_MAX_RUNS:,} runs",
                f"{self._pieces:,} and {self._runs:,} or more",
            )


def _read(
    matrices: Matrices,
    name: str,
    model: ModelShape,
    shared: dict[tuple[bytes, bytes, int], HeadSchedule],
    room: _Room,
    routed: bool,
) -> PackagedSchedule:
    """Reads one schedule; `shared` are the heads read before, by the bytes of their pieces and runs, and by route."""
    pieces, runs = matrices.read(f"{name}.pieces", 6), matrices.read(f"{name}.runs", 2)
    places, last_readers = matrices.read(f"{name}.heads", 3), matrices.read(f"{name}.last_readers")
    routes = matrices.read(f"{name}.routes", 1) if routed else np.zeros((len(places), 1), dtype=np.int32)
    for part, found, expected in (
        ("heads", places, model.num_attention_heads),
        ("routes", routes, model.num_attention_heads),
        ("last_readers", last_readers, model.num_key_value_heads),
    ):
        if len(found) != expected:
            raise matrices.fault(f"{name}.{part}", f"{expected} heads", str(len(found)))
    _check_bounds(matrices, name, pieces, runs)
    first, end, first_run = places.T.astype(np.int64)
    fits = ascend(0, first, end - 1, len(pieces) - 1) & ascend(0, first_run)
    matrices.require(f"{name}.heads", places, fits, f"some of {len(pieces)} pieces, and a first run")
    matrices.require(f"{name}.routes", routes, ascend(0, routes[:, 0].astype(np.int64)), "a number of blocks")
    if routed and not routes.any():
        raise matrices.fault(f"{name}.routes", "a routed head, as the manifest has it", "none")
    heads = {}
    wanted = [(*place, route) for place, (route,) in zip(places.tolist(), routes.tolist(), strict=True)]
    for place in dict.fromkeys(wanted):
        own, left = pieces[place[0] : place[1]], runs[place[2] :]
        num_runs = int(own[:, 3].max())
        room.take(len(own), num_runs)  # heads may name the same pieces, so the file's size is no limit
        if num_runs > len(left):
            raise matrices.fault(f"{name}.runs", f"{num_runs} from {place[2]} on", str(len(left)))
        if own[0, 0] != 0 or (own[1:, 0] != own[:-1, 1]).any():
            raise matrices.fault(
                f"{name}.pieces", "rows from 0 on without gaps", f"others from piece {place[0]} to before {place[1]}"
            )
        heads[place] = _head(own, left[:num_runs], place[3], shared)
    return PackagedSchedule(tuple(heads[place] for place in wanted), last_readers)


def _check_bounds(matrices: Matrices, name: str, pieces: Matrix, runs: Matrix) -> None:
    first_rows, end_rows, first_runs, end_runs, last_begins, follow = pieces.T.astype(np.int64)
    begins = last_begins + follow * first_rows
    fits = ascend(0, first_rows, end_rows - 1) & ascend(0, first_runs, end_runs)
    fits &= ascend(0, begins, first_rows) & ascend(0, follow, 1)
    matrices.require(f"{name}.pieces", pieces, fits, "rows and runs that begin before their end")
    begins, ends = runs.T.astype(np.int64)
    matrices.require(f"{name}.runs", runs, ascend(0, begins, ends - 1), "blocks from a first to an end")


def _head(
    pieces: Matrix, runs: Matrix, route: int, shared: dict[tuple[bytes, bytes, int], HeadSchedule]
) -> HeadSchedule:
    key = pieces.tobytes(), runs.tobytes(), route
    if key not in shared:
        shared[key] = HeadSchedule(
            tuple(map(Run._make, runs.tolist())),
            tuple(Piece._make((*numbers, bool(follows))) for *numbers, follows in pieces.tolist()),
            route,
        )
    return shared[key]
