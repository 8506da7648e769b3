"""Tables of segments: which key blocks several readers read together, row by row, and how a package holds them.

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

    `rows` `[patterns, rows]` gives each row's plan, rows beyond the last one that of the last. `plans` `[plans, 3]` are
    its first segment, the first that only some readers see, and the end. `segments` `[segments, 4]` are begin, end,
    whether they follow the row (bit 0 for the begin, bit 1 for the end), and the readers that see it, one bit each;
    none is empty, those of a plan are disjoint, both parts ascend, and the last ends with the diagonal.
    """

    rows: Matrix
    plans: Matrix
    segments: Matrix

    @property
    def max_segments(self) -> int:
        """The most segments that a plan has."""
        return int((self.plans[:, 2] - self.plans[:, 0]).max())

    def tensors(self, name: str) -> dict[str, Matrix]:
        """What tables.safetensors holds of it, if it is called `name`."""
        return {f"{name}.rows": self.rows, f"{name}.plans": self.plans, f"{name}.segments": self.segments}


def read_table(matrices: Matrices, name: str, patterns: int) -> SegmentTable:
    """The table of a name, which has so many patterns.

    Raises:
        PackageError: a part is missing, of another form, or points outside of the next one.
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
