"""The reader of segment tables: written ones are read back, and ones that point outside themselves are refused."""

from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy

from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.schedule.segment_tables import TableShape
from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.segment_table import SegmentTable, read_table
from surgeon.runtime.package.tensors import Matrices, Matrix
from topologies import random_topology

TABLE = SegmentTable(
    rows=np.array([[1, 0, 0], [1, 1, 1]], dtype=np.int32),
    plans=np.array([[0, 1, 2], [2, 2, 3]], dtype=np.int32),
    segments=np.array([[0, 1, 0, 3], [0, 1, 3, 3], [0, 1, 2, 1]], dtype=np.int32),
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
        ("rows", lambda table: table + 1, r"rows\[0\]: expected numbers of 2 plans, got \[2, 1, 1\]"),
        ("rows", lambda table: table - 1, r"rows\[0\]: expected numbers of 2 plans, got \[0, -1, -1\]"),
        ("plans", lambda table: table + 1, r"plans\[1\]: expected places .* among 3 segments, got \[3, 3, 4\]"),
        ("plans", lambda table: table - 1, r"plans\[0\]: expected places .* among 3 segments, got \[-1, 0, 1\]"),
        ("plans", lambda table: table[:, ::-1], r"plans\[0\]: expected places in ascending order .*, got \[2, 1, 0\]"),
        ("plans", lambda table: table * 0, r"plans\[0\]: expected places .*, got \[0, 0, 0\]"),
        ("plans", lambda table: table[:, :1], r"plans: expected an int32 matrix \[any, 3\], got int32 \[2, 1\]"),
        ("plans", lambda table: table[:0], r"rows\[0\]: expected numbers of 0 plans"),
        ("plans", lambda table: table[::-1], r"plans\[0\]: expected all segments in order, .*, got \[2, 2, 3\]"),
        (
            "plans",
            lambda table: table + np.array((0, 1, 0), np.int32),
            r"plans\[0\]: expected all segments .*, got \[0, 2, 2\]",
        ),
        (
            "plans",
            lambda table: table - np.array(((0, 0, 1), (0, 0, 0)), np.int32),
            r"plans\[0\]: expected all segments in order",
        ),
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


OWN = [0, 1, 3, 1]


@pytest.mark.parametrize(
    ("segments", "shared", "wrong"),
    [
        ([[-1_000_000, 2**31 - 1, 0, 1]], 0, 0),
        ([[-1_000_000, 1, 2, 1]], 0, 0),
        ([[-1, 1, 3, 1]], 0, 0),  # before the first key, in row 0
        ([[0, 2, 2, 1]], 0, 0),  # after the row's own
        ([[0, 0, 2, 1]], 0, 0),  # not up to the row's own
        ([[0, 1, 1, 1]], 0, 0),  # empty from row 1 on
        ([[0, 1, 6, 1]], 0, 0),
        ([[0, 1, -1, 1]], 0, 0),
        ([[0, 1, 0, 1], OWN], 0, 1),  # after the own block in row 0, so out of order
        ([[0, 1, 3, 1], [0, 1, 3, 1]], 0, 1),
        ([[0, 1, 2, 1], OWN], 0, 1),
        ([[0, 1, 2, 3], OWN], 1, 0),  # shared, so before the row's own
    ],
)
def test_a_segment_out_of_bounds(segments: list[list[int]], shared: int, wrong: int) -> None:
    table = SegmentTable(
        rows=np.zeros((1, 1), dtype=np.int32),
        plans=np.array([[0, shared, len(segments)]], dtype=np.int32),
        segments=np.array(segments, dtype=np.int32),
    )
    with pytest.raises(PackageError, match=rf"t\.segments\[{wrong}\]: expected ascending units, the last ones up to"):
        read_table(written(table.tensors("t")), "t", patterns=1)


def test_a_last_plan_must_hold_only_for_rows_that_exist() -> None:
    table = SegmentTable(
        rows=np.array([[0, 1]], dtype=np.int32),
        plans=np.array([[0, 0, 1], [1, 1, 2]], dtype=np.int32),
        segments=np.array([OWN, [0, 2, 0, 1]], dtype=np.int32),
    )
    assert read_table(written(table.tensors("t")), "t", patterns=1, num_rows=2).max_segments == 1
    with pytest.raises(PackageError, match=r"t\.segments\[1\]: expected ascending units"):
        read_table(written(table.tensors("t")), "t", patterns=1)


@pytest.mark.parametrize("beyond", ["window", "dense", "error"])
def test_the_tables_of_the_compiler_are_within_bounds(beyond: str) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        topology = random_topology(
            rng, num_layers=1, num_heads=6, num_blocks=int(rng.integers(1, 40)), num_kv_heads=2, beyond=beyond
        )
        (layer,) = schedule_layers(topology)
        for shape in (
            TableShape("decode"),
            TableShape("prefill", 4, 2),
            TableShape("prefill", 2, 2),
            TableShape("prefill"),
        ):
            table, num_rows = shape.of(layer), -(-layer.num_rows // shape.rows)
            patterns = 2 if shape.phase == "decode" else 6
            found = read_table(written(table.tensors("t")), "t", patterns, shape.rows // shape.blocks, num_rows)
            np.testing.assert_array_equal(found.segments, table.segments)


@pytest.mark.parametrize("data", [None, b"no tensors"])
def test_no_tables(data: bytes | None) -> None:
    with pytest.raises(PackageError, match=r"tables\.safetensors: expected a safetensors file, got"):
        Matrices(data, "tables.safetensors")
