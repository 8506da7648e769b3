"""Tables of segments, the key blocks that several readers read together in each row, and their form in a package.

Source: tables.safetensors, package format version 1. Table t of schedule n is the matrices `n.t.rows`, `n.t.plans` and
`n.t.segments` there.
"""

from dataclasses import dataclass

import numpy as np

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


def read_table(matrices: Matrices, name: str, patterns: int) -> SegmentTable:
    """Reads the table called `name`, which must have this number of patterns.

    Raises:
        PackageError: a part is missing, has another form, or points outside the next one.
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
    return SegmentTable(rows, plans, segments)
