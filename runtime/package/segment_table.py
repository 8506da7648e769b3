"""Tables of segments, the key blocks that several readers read together in each row, and their form in a package.

Source: tables.safetensors, package format version 1. Table t of schedule n is the matrices `n.t.rows`, `n.t.plans` and
`n.t.segments` there.
"""

from dataclasses import dataclass

import numpy as np

from surgeon.runtime.package.schedule import UNBOUNDED
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


def read_table(matrices: Matrices, name: str, patterns: int, step: int = 1, num_rows: int = UNBOUNDED) -> SegmentTable:
    """Reads the table called `name`, which must have this number of patterns.

    Row r's own keys are the `step` units from `step` · r on; `num_rows` is the number of rows that may be requested.

    Raises:
        PackageError: a part is missing, has another form, or points outside the next one; or a segment is empty, begins
            before the first key, ends after the row's own, or is out of order.
    """
    rows = matrices.read(f"{name}.rows")
    plans, segments = matrices.read(f"{name}.plans", 3), matrices.read(f"{name}.segments", 4)
    if len(rows) != patterns:
        raise matrices.fault(f"{name}.rows", f"{patterns} heads", str(len(rows)))
    fits = np.all(ascend(0, rows, len(plans) - 1), axis=1)
    matrices.require(f"{name}.rows", rows, fits, f"numbers of {len(plans)} plans")
    first, middle, end = plans.T
    fits = ascend(0, first, middle, end, len(segments)) & np.less(first, end)
    matrices.require(f"{name}.plans", plans, fits, f"places in ascending order among {len(segments)} segments")
    begins = np.append(first, len(segments))  # of the plans, and of what would follow them
    fits = (begins[1:] == end) & np.less(middle, end)
    fits[0] &= first[0] == 0
    matrices.require(f"{name}.plans", plans, fits, "all segments in order, with some after the shared ones")
    table = SegmentTable(rows, plans, segments)
    _check_segments(matrices, name, table, step, num_rows)
    return table


def _check_segments(matrices: Matrices, name: str, table: SegmentTable, step: int, num_rows: int) -> None:
    """Refuses segments that no schedule has; bounds are linear in the row, so a plan's first and last rows suffice."""
    rows, (first, middle, end) = table.rows, table.plans.T
    columns = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
    lowest, highest = np.full(len(first), UNBOUNDED), np.full(len(first), -1)
    np.minimum.at(lowest, rows, columns)
    np.maximum.at(highest, rows, columns)
    highest[rows[:, -1]] = max(num_rows, rows.shape[1]) - 1  # rows beyond the last one follow its plan
    begins, ends, follows, _ = table.segments.T.astype(np.int64)
    numbers, plan = np.arange(len(begins)), np.repeat(np.arange(len(first)), end - first)
    is_first = (numbers == first[plan]) | (numbers == middle[plan])
    for row in (lowest, highest):
        own = step * row[plan]
        begin, stop = begins + own * (follows & 1), ends + own * (follows >> 1)
        most = np.where(numbers < middle[plan], own, own + step)
        fits = ascend(np.where(is_first, 0, np.roll(stop, 1)), begin, stop - 1, most - 1) & ascend(0, follows, 3)
        fits &= (numbers != end[plan] - 1) | (stop == most)
        fits |= lowest[plan] > highest[plan]  # no row follows this plan
        matrices.require(f"{name}.segments", table.segments, fits, "ascending units, the last ones up to the row's own")
