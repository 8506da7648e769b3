"""The block schedules of a package, read from schedule.safetensors: which blocks of keys each row of blocks reads.

Source: `_schedule_tables` of the compiler's package.py; package format version 1.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.reader import PackageFiles

FILE = "schedule.safetensors"


@dataclass(frozen=True)
class HeadSchedule:
    """One head's pieces, ascending by their first row, and the constant runs of blocks `[begin, end)` they slice.

    A piece is (first_row, end_row, first_run, end_run, last_begin, follows_row): its rows read that slice of the runs,
    then every block from `last_begin`, plus the row where `follows_row`, to their own.
    """

    runs: tuple[tuple[int, int], ...]
    pieces: tuple[tuple[int, ...], ...]

    def row(self, row: int) -> tuple[tuple[int, int], ...]:
        """The runs of blocks `[begin, end)` that a row reads, ascending; the last ends with the row's own block."""
        piece = self.pieces[bisect_right(self.pieces, row, key=lambda piece: piece[0]) - 1]
        _, _, first_run, end_run, last_begin, follows_row = piece
        return (*self.runs[first_run:end_run], (last_begin + (row if follows_row else 0), row + 1))

    @property
    def dense_rows(self) -> int:
        """How many rows, from 0 on, read every block up to their own."""
        rows = 0
        for _, end_row, first_run, end_run, last_begin, follows_row in self.pieces:
            if first_run != end_run or last_begin != 0 or follows_row:
                break
            rows = end_row
        return rows


def read_schedules(files: PackageFiles) -> dict[int, tuple[HeadSchedule, ...]]:
    """Every layer's schedule, one entry a query head; equal heads of a layer are one object.

    Raises:
        PackageError: the tables are not what the manifest's kernels name, or point outside of themselves.
    """
    try:
        tables = safetensors.numpy.load(files.files[FILE])
        layers: dict[int, tuple[HeadSchedule, ...]] = {}
        for kernel in files.manifest.kernels:
            if kernel.schedule and not layers.keys() >= set(kernel.layers):
                heads = _heads(*(tables[f"{kernel.schedule}.{part}"] for part in ("pieces", "runs", "heads")))
                if len(heads) != files.manifest.model.num_attention_heads:
                    raise ValueError(f"{kernel.schedule} has {len(heads)} heads")
                layers |= dict.fromkeys(kernel.layers, heads)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise PackageError(
            f"{files.folder}/{FILE}",
            "pieces, runs and heads of every kernel",
            str(error)[:100],
            "compile the package again",
        ) from None
    return layers


def _heads(
    pieces: npt.NDArray[np.int32], runs: npt.NDArray[np.int32], heads: npt.NDArray[np.int32]
) -> tuple[HeadSchedule, ...]:
    for table, columns in ((pieces, 6), (runs, 2), (heads, 3)):
        if table.dtype != np.int32 or table.ndim != 2 or table.shape[1] != columns:
            raise ValueError(f"{table.dtype} {list(table.shape)} where int32 [any, {columns}] belongs")
    found: dict[tuple[int, ...], HeadSchedule] = {}
    for first, end, first_run in dict.fromkeys(map(tuple, heads.tolist())):
        own = tuple(map(tuple, pieces[first:end].tolist()))
        slices = [piece[2:4] for piece in own]
        last_run = first_run + max((end_run for _, end_run in slices), default=0)
        if not 0 <= first < end <= len(pieces) or own[0][0] != 0 or not 0 <= first_run <= last_run <= len(runs):
            raise ValueError("a head without pieces or runs of its own")
        if any(not 0 <= begin <= end_run for begin, end_run in slices):
            raise ValueError("a piece with runs from behind their end, or from before the first")
        found[first, end, first_run] = HeadSchedule(tuple(map(tuple, runs[first_run:last_run].tolist())), own)
    return tuple(found[tuple(head)] for head in heads.tolist())
