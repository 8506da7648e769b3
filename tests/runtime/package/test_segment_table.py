"""The reader of segment tables: written ones are read back, and ones that point outside themselves are refused."""

from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from surgeon.runtime.errors import PackageError
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.schedule.segment_tables import TableShape
from surgeon.runtime.package.schedule import UNBOUNDED
from surgeon.runtime.package.segment_table import SegmentTable, TableForm, read_table
from surgeon.runtime.package.tensors import Matrices, Matrix
from topologies import random_topology

TABLE = SegmentTable(
    rows=np.array([[0, 1, 1], [0, 0, 0]], dtype=np.int32),
    plans=np.array([[0, 0, 1], [1, 2, 3]], dtype=np.int32),
    segments=np.array([[0, 1, 2, 1], [0, 1, 0, 3], [0, 1, 3, 3]], dtype=np.int32),
)
FORM = TableForm(patterns=2, readers=2, step=1, num_rows=UNBOUNDED)
PARTS = ("rows", "plans", "segments")


def written(tensors: dict[str, Matrix]) -> Matrices:
    return Matrices(safetensors.numpy.save(tensors), "tables.safetensors")


def test_what_was_written_is_read() -> None:
    found = read_table(written(TABLE.tensors("one") | TABLE.tensors("other")), "one", FORM)
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
        ("plans", lambda table: table + 1, r"plans\[1\]: expected places .* among 3 segments, got \[2, 3, 4\]"),
        ("plans", lambda table: table - 1, r"plans\[0\]: expected places .* among 3 segments, got \[-1, -1, 0\]"),
        ("plans", lambda table: table[:, ::-1], r"plans\[0\]: expected places in ascending order .*, got \[1, 0, 0\]"),
        ("plans", lambda table: table * 0, r"plans\[0\]: expected places .*, got \[0, 0, 0\]"),
        ("plans", lambda table: table[:, :1], r"plans: expected an int32 matrix \[any, 3\], got int32 \[2, 1\]"),
        ("plans", lambda table: table[:0], r"rows\[0\]: expected numbers of 0 plans"),
        ("plans", lambda table: table[::-1], r"plans\[0\]: expected places .*, got \[1, 2, 3\]"),
        ("segments", lambda table: table.flatten(), r"segments: expected an int32 matrix \[any, 4\], got int32 \[12\]"),
        ("segments", lambda table: table[:2], r"plans\[1\]: expected places .* among 2 segments, got \[1, 2, 3\]"),
    ],
)
def test_a_table_that_points_elsewhere(part: str, change: Callable[[Matrix], Matrix | None], message: str) -> None:
    tensors = TABLE.tensors("n.t")
    changed = change(tensors.pop(f"n.t.{part}"))
    if changed is not None:
        tensors[f"n.t.{part}"] = np.ascontiguousarray(changed)
    with pytest.raises(PackageError, match=rf"tables\.safetensors: n\.t\.{message}.*; compile the package again"):
        read_table(written(tensors), "n.t", FORM)


@pytest.mark.parametrize("data", [None, b"no tensors"])
def test_no_tables(data: bytes | None) -> None:
    with pytest.raises(PackageError, match=r"tables\.safetensors: expected a safetensors file, got"):
        Matrices(data, "tables.safetensors")


BOUNDS = {
    "before the first key": ((2, 0), -10, r"\[-10, 1, 3, 3\]"),
    "before the first key where the plan begins": ((2, 0), -2, r"\[-2, 1, 3, 3\]"),
    "beyond the diagonal": ((0, 1), 2**31 - 1, r"\[0, 2147483647, 2, 1\]"),
    "beyond the diagonal where the plan begins": ((1, 1), 3, r"\[0, 3, 0, 3\]"),
    "not up to the diagonal": ((0, 1), 0, r"\[0, 0, 2, 1\]"),
    "empty": ((1, 1), 0, r"\[0, 0, 0, 3\]"),
    "unmasked on the diagonal": ((1, 1), 2, r"\[0, 2, 0, 3\]"),
    "a begin that leaves the end behind": ((1, 2), 1, r"\[0, 1, 1, 3\]"),
    "an end that stays behind": ((0, 2), 0, r"\[0, 1, 0, 1\]"),
    "an unknown way to follow": ((2, 2), 4, r"\[0, 1, 4, 3\]"),
    "a reader that is not there": ((0, 3), 4, r"\[0, 1, 2, 4\]"),
    "all 32 readers": ((0, 3), -1, r"\[0, 1, 2, -1\]"),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_segment_out_of_bounds(name: str) -> None:
    place, number, shown = BOUNDS[name]
    segments = TABLE.segments.copy()
    segments[place] = number
    tensors = TABLE.tensors("n.t") | {"n.t.segments": segments}
    with pytest.raises(PackageError, match=rf"segments\[\d\]: expected b.*{shown}; compile the package again"):
        read_table(written(tensors), "n.t", FORM)


def test_segments_out_of_order() -> None:
    plans = np.array([[0, 0, 1], [1, 1, 3]], dtype=np.int32)
    segments = TABLE.segments[[0, 2, 1]]
    with pytest.raises(PackageError, match=r"segments\[2\]: expected blocks up to the row's own in ascending order"):
        read_table(written(SegmentTable(TABLE.rows, plans, segments).tensors("n")), "n", FORM)


def test_rows_that_are_never_asked_for_may_be_out_of_bounds() -> None:
    segments = TABLE.segments.copy()
    segments[0] = [-1, 1, 3, 1]  # right from row 1 on
    rows = np.array([[1, 0], [1, 0]], dtype=np.int32)
    segments[1:] = [[0, 1, 0, 3], [0, 1, 3, 3]]
    plans = np.array([[0, 0, 1], [1, 1, 2], [2, 2, 3]], dtype=np.int32)
    few = TableForm(patterns=2, readers=2, step=1, num_rows=2)
    read_table(written(SegmentTable(rows, plans, segments).tensors("n")), "n", few)
    segments[0] = [0, 2, 0, 1]  # right in row 1 alone
    read_table(written(SegmentTable(rows, plans, segments).tensors("n")), "n", few)
    with pytest.raises(PackageError, match="blocks up to the row's own"):
        read_table(written(SegmentTable(rows, plans, segments).tensors("n")), "n", FORM)


SHAPES = [TableShape("decode"), *(TableShape("prefill", *sizes) for sizes in ((2, 1), (2, 2), (4, 1), (4, 2), (8, 4)))]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("beyond", ["window", "dense", "error"])
def test_every_table_of_the_compiler_is_within_its_bounds(shape: TableShape, beyond: str) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        kv_heads, num_blocks = int(rng.choice([1, 2, 4])), int(rng.integers(1, 14))
        size: dict[str, int] = {"num_layers": 1, "num_heads": 4, "num_blocks": num_blocks, "num_kv_heads": kv_heads}
        (layer,) = schedule_layers(random_topology(rng, beyond=beyond, **size))
        form = TableForm.of(shape.name, 4, kv_heads, num_blocks if beyond == "error" else UNBOUNDED)
        assert form is not None
        read_table(written(shape.of(layer).tensors("n")), "n", form)


@pytest.mark.parametrize("name", ["", "prefill", "prefill_0x1", "prefill_2x0", "prefill_3x2", "prefill_16x4", "decode_2x1"])
def test_no_kernel_reads_a_table_of_such_a_name(name: str) -> None:
    assert TableForm.of(name, heads=4, kv_heads=2, num_blocks=8) is None
