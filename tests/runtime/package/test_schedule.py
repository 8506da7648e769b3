"""The reader of a package's schedules: what it takes and what it refuses."""

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

import packages
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.reader import PackageFiles, read_package
from surgeon.runtime.package.schedule import FILE, read_schedules
from topologies import window_topology

Table = npt.NDArray[np.int32]
TOPOLOGY = window_topology([1, 3], num_layers=2, num_blocks=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> PackageFiles:
    return read_package(packages.write(tmp_path_factory.mktemp("package") / "kernels", TOPOLOGY))


def with_file(files: PackageFiles, data: bytes) -> PackageFiles:
    return dataclasses.replace(files, files=dict(files.files) | {FILE: data})


def test_the_rows_are_those_of_the_schedule(files: PackageFiles) -> None:
    packaged = read_schedules(files)
    for layer, made in enumerate(schedule_layers(TOPOLOGY)):
        for head, expected in zip(packaged[layer], made.heads, strict=True):
            assert head.pieces == expected.pieces
            assert [head.row(row) for row in range(20)] == [expected.row(row) for row in range(20)]


@pytest.mark.parametrize("data", [b"", b"no tensors", b"\xff" * 64])
def test_a_file_without_tensors(files: PackageFiles, data: bytes) -> None:
    with pytest.raises(PackageError, match=rf"{FILE}: expected pieces, runs and heads of every kernel"):
        read_schedules(with_file(files, data))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("pieces", lambda _table: None, "attention_000.pieces"),
        ("runs", lambda table: table.flatten(), r"int32 \[\d\] where int32 \[any, 2\] belongs"),
        ("pieces", lambda table: table[:, :5], r"where int32 \[any, 6\] belongs"),
        ("heads", lambda table: table.astype(np.float32), "float32 .* belongs"),
        ("heads", lambda table: table[0], r"where int32 \[any, 3\] belongs"),
        ("heads", lambda table: table[:1], "attention_000 has 1 heads"),
        ("heads", lambda table: np.add(table, [[0, 100, 0]]), "a head without pieces or runs of its own"),
        ("heads", lambda table: np.subtract(table, [[1, 0, 0]]), "a head without pieces or runs of its own"),
        ("heads", lambda table: table * [[1, 0, 1]], "a head without pieces or runs of its own"),
        ("heads", lambda table: np.add(table, [[0, 0, 100]]), "a head without pieces or runs of its own"),
        ("pieces", lambda table: np.add(table, [[0, 0, 0, 9, 0, 0]]), "a head without pieces or runs of its own"),
        ("pieces", lambda table: np.add(table, [[0, 0, 9, 9, 0, 0]]), "a head without pieces or runs of its own"),
        ("pieces", lambda table: np.subtract(table, [[0, 0, 1, 0, 0, 0]]), "or from before the first"),
        ("pieces", lambda table: np.add(table, [[0, 0, 9, 0, 0, 0]]), "a piece with runs from behind their end"),
    ],
)
def test_a_table_that_points_elsewhere(
    files: PackageFiles, part: str, change: Callable[[Table], Table | None], message: str
) -> None:
    tensors = safetensors.numpy.load(files.files[FILE])
    changed = change(tensors.pop(f"attention_000.{part}"))
    if changed is not None:
        tensors[f"attention_000.{part}"] = np.ascontiguousarray(
            changed, None if changed.dtype == np.float32 else np.int32
        )
    with pytest.raises(PackageError, match=message):
        read_schedules(with_file(files, safetensors.numpy.save(tensors)))
