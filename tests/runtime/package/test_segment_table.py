"""The reader of segment tables: written ones are read back, and ones that point outside themselves are refused."""

from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.segment_table import SegmentTable, read_table
from surgeon.runtime.package.tensors import Matrices, Matrix

TABLE = SegmentTable(
    rows=np.array([[0, 1, 1], [1, 0, 0]], dtype=np.int32),
    plans=np.array([[0, 1, 2], [2, 2, 3]], dtype=np.int32),
    segments=np.array([[0, 1, 0, 3], [-1, 1, 3, 3], [0, 1, 2, 1]], dtype=np.int32),
)
PARTS = ("rows", "plans", "segments")


def written(tensors: dict[str, Matrix]) -> Matrices:
    return Matrices(safetensors.numpy.save(tensors), "tables.safetensors")


def test_what_was_written_is_read() -> None:
    found = read_table(written(TABLE.tensors("one") | TABLE.tensors("other")), "one", patterns=2)
    for part in PARTS:
        np.testing.assert_array_equal(getattr(found, part), getattr(TABLE, part))
    assert found.max_segments == 2


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("rows", lambda _table: None, r"rows: expected an int32 matrix \[any, some\], got none"),
        ("rows", lambda table: table.astype(np.int64), r"rows: expected an int32 matrix .*, got int64 \[2, 3\]"),
        ("rows", lambda table: table[:, :0], r"rows: expected an int32 matrix .*, got int32 \[2, 0\]"),
        ("rows", lambda table: table[:1], "rows: expected 2 heads, got 1"),
        ("rows", lambda table: table + 1, r"rows\[0\]: expected numbers of 2 plans, got \[1, 2, 2\]"),
        ("rows", lambda table: table - 1, r"rows\[0\]: expected numbers of 2 plans, got \[-1, 0, 0\]"),
        ("plans", lambda table: table + 1, r"plans\[1\]: expected places .* among 3 segments, got \[3, 3, 4\]"),
        ("plans", lambda table: table - 1, r"plans\[0\]: expected places .* among 3 segments, got \[-1, 0, 1\]"),
        ("plans", lambda table: table[:, ::-1], r"plans\[0\]: expected places in ascending order .*, got \[2, 1, 0\]"),
        ("plans", lambda table: table * 0, r"plans\[0\]: expected places .*, got \[0, 0, 0\]"),
        ("plans", lambda table: table[:, :1], r"plans: expected an int32 matrix \[any, 3\], got int32 \[2, 1\]"),
        ("plans", lambda table: table[:0], r"rows\[0\]: expected numbers of 0 plans"),
        ("segments", lambda table: table.flatten(), r"segments: expected an int32 matrix \[any, 4\], got int32 \[12\]"),
        ("segments", lambda table: table[:2], r"plans\[1\]: expected places .* among 2 segments, got \[2, 2, 3\]"),
    ],
)
def test_a_table_that_points_elsewhere(part: str, change: Callable[[Matrix], Matrix | None], message: str) -> None:
    tensors = TABLE.tensors("n.t")
    changed = change(tensors.pop(f"n.t.{part}"))
    if changed is not None:
        tensors[f"n.t.{part}"] = np.ascontiguousarray(changed)
    with pytest.raises(PackageError, match=rf"tables\.safetensors: n\.t\.{message}.*; compile the package again"):
        read_table(written(tensors), "n.t", patterns=2)


@pytest.mark.parametrize("data", [None, b"no tensors"])
def test_no_tables(data: bytes | None) -> None:
    with pytest.raises(PackageError, match=r"tables\.safetensors: expected a safetensors file, got"):
        Matrices(data, "tables.safetensors")
