"""Tables of segments, the key blocks that several readers read together in each row, and their form in a package.

Source: tables.safetensors, package format version 1. Table t of schedule n is the matrices `n.t.rows`, `n.t.plans` and
`n.t.segments` there.
"""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from surgeon.runtime.package.tensors import Matrices, Matrix, ascend

FILE = "tables.safetensors"


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """The segments of every row, as int32.

    `rows` `[patterns, rows]` gives each row's plan; rows beyond the last one have the plan of the last. `plans`
    `[plans, 3]` hold a plan's first segment, the first that only some readers see, and the end. `segments`
    `[segments, 4]` hold begin, end, whether these follow the row (bit 0 for the begin, bit 1 for the end), and the
    readers that see the segment, one bit each. No segment is empty; those of a plan are disjoint and ascend within
    its two parts, and the last ends with the diagonal.
    """

    rows: Matrix
    plans: Matrix
    segments: Matrix

    @property
    def max_segments(self) -> int:
        """The largest number of segments in a plan."""
        return int((self.plans[:, 2] - self.plans[:, 0]).max())

    def tensors(self, name: str) -> dict[str, Matrix]:
        """The tensors that tables.safetensors holds for this table under `name`."""
        return {f"{name}.rows": self.rows, f"{name}.plans": self.plans, f"{name}.segments": self.segments}


@dataclass(frozen=True)
class TableForm:
    """The form that a kernel expects of a table.

    `patterns` are those that it has, `readers` those of a pattern, `step` the units of a row; rows from `num_rows` on
    are never asked for.
    """

    patterns: int
    readers: int
    step: int
    num_rows: int

    @classmethod
    def of(cls, table: str, heads: int, kv_heads: int, num_blocks: int) -> "TableForm | None":
        """The form of the table of this name in its schedule, or None if no table is called so.

        `num_blocks` are those that may be asked for.
        """
        if table == "decode":
            return cls(kv_heads, heads // kv_heads, 1, num_blocks)
        sizes = _PREFILL.fullmatch(table)
        rows, blocks = map(int, sizes.groups()) if sizes else (0, 0)
        if not blocks or rows % blocks or rows * blocks > _MAX_READERS:
            return None
        return cls(heads, rows * blocks, rows // blocks, -(-num_blocks // rows))


_PREFILL = re.compile(r"prefill_([1-9]\d{0,3})x([1-9]\d{0,3})")
_MAX_READERS = 32
"""The bits of a segment's readers."""


def read_table(matrices: Matrices, name: str, form: TableForm) -> SegmentTable:
    """Reads the table called `name`, whose numbers lead a kernel only to keys that a row may read.

    Raises:
        PackageError: a part is missing, has another form, or points outside the next one; or in some row, a segment is
            empty, begins before the first key, ends after the diagonal, or is out of order.
    """
    rows = matrices.read(f"{name}.rows")
    plans, segments = matrices.read(f"{name}.plans", 3), matrices.read(f"{name}.segments", 4)
    if len(rows) != form.patterns:
        raise matrices.fault(f"{name}.rows", f"{form.patterns} heads", str(len(rows)))
    fits = np.all(ascend(0, rows, len(plans) - 1), axis=1)
    matrices.require(f"{name}.rows", rows, fits, f"numbers of {len(plans)} plans")
    first, middle, end = plans.T
    fits = ascend(0, first, middle, end, len(segments)) & np.less(first, end)
    fits &= np.append(first[1:], len(segments)) == end  # each begins where the one before ends
    matrices.require(f"{name}.plans", plans, fits, f"places in ascending order among {len(segments)} segments")
    table = SegmentTable(rows, plans, segments)
    _check_segments(matrices, f"{name}.segments", table, form)
    return table


def _check_segments(matrices: Matrices, where: str, table: SegmentTable, form: TableForm) -> None:
    """Checks the bounds of every segment in the first and the last row that has its plan: between, they move evenly."""
    begins, ends, follow, readers = table.segments.T.astype(np.int64)
    fits = ascend(0, follow, 3) & ascend(0, readers & 0xFFFFFFFF, (1 << form.readers) - 1)
    matrices.require(where, table.segments, fits, f"bounds that follow the row or not, and some of {form.readers} readers")
    first, middle, end = table.plans.T
    plan = np.repeat(np.arange(len(first)), end - first)
    place = np.arange(len(plan))
    leads = (place == first[plan]) | (place == middle[plan])  # of one of the plan's two parts
    closes = place == end[plan] - 1
    unmasked = place < middle[plan]
    for rows in _extreme_rows(table, form.num_rows):
        own = np.where(rows < 0, 0, rows)[plan] * form.step
        begin, stop = begins + own * (follow & 1), ends + own * (follow >> 1)
        before = np.where(leads, 0, np.append(0, stop[:-1]))
        limit = own + np.where(unmasked, 0, form.step)
        fits = ascend(before, begin, stop - 1, limit - 1) & (~closes | (stop == own + form.step))
        fits |= rows[plan] < 0  # no row has this plan
        expected = "blocks up to the row's own in ascending order, the last its own, unmasked ones before it"
        matrices.require(where, table.segments, fits, expected)


def _extreme_rows(table: SegmentTable, num_rows: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first and the last row of each plan, -1 if no row has it."""
    width = table.rows.shape[1]
    columns = np.broadcast_to(np.arange(width), table.rows.shape)
    lowest, highest = np.full(len(table.plans), width), np.full(len(table.plans), -1)
    np.minimum.at(lowest, table.rows, columns)
    np.maximum.at(highest, table.rows, columns)
    lowest[highest < 0] = -1
    highest[table.rows[:, -1]] = max(num_rows, width) - 1
    return lowest, highest
