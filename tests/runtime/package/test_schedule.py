"""A package's schedules: written ones are read back, and ones that point outside themselves are refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import packages
from surgeon.compiler.schedule.liveness import liveness_table
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.manifest import KernelEntry
from surgeon.runtime.package.reader import PackageFiles, read_package
from surgeon.runtime.package.schedule import FILE, UNBOUNDED, HeadSchedule, Piece, Run
from surgeon.runtime.package.tensors import Matrix
from topologies import DENSE, balanced_tree, build, head, random_topology, window_topology

# One head per layer repeats, and the layers differ.
TOPOLOGY = window_topology([1, 3, 1], num_layers=2, num_blocks=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> PackageFiles:
    return read_package(packages.write(tmp_path_factory.mktemp("package") / "kernels", TOPOLOGY))


def with_file(files: PackageFiles, data: bytes) -> PackageFiles:
    return dataclasses.replace(files, files=dict(files.files) | {FILE: data})


def with_kernels(files: PackageFiles, change: Callable[[KernelEntry], KernelEntry]) -> PackageFiles:
    kernels = tuple(map(change, files.manifest.kernels))
    return dataclasses.replace(files, manifest=dataclasses.replace(files.manifest, kernels=kernels))


@pytest.mark.parametrize("beyond", ["window", "dense", "error"])
def test_what_was_written_is_read(tmp_path: Path, beyond: str) -> None:
    topology = random_topology(
        np.random.default_rng(3),
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        block_size=16,
        num_blocks=30,
        beyond=beyond,
    )
    packaged = read_package(packages.write(tmp_path / "kernels", topology, ["cpu", "cuda:90"])).schedules
    for layer, made in enumerate(schedule_layers(topology)):
        assert packaged[layer].heads == made.heads
        np.testing.assert_array_equal(packaged[layer].last_readers, liveness_table(made))


def test_equal_heads_are_one_object_in_all_layers(tmp_path: Path) -> None:
    heads = [DENSE, *(head(0, 0.0, 1, window) for window in (2, 2, 3))]
    topology = build([heads, heads[::-1]], [{"linkage": balanced_tree(8)}], num_kv_heads=2, num_blocks=8)
    packaged = read_package(packages.write(tmp_path / "kernels", topology)).schedules
    first, second = packaged[0].heads, packaged[1].heads
    assert first[1] is first[2]
    assert first[1] is not first[3]
    assert [id(head) for head in second] == [id(head) for head in first[::-1]]


def test_it_is_read_once(files: PackageFiles) -> None:
    assert files.schedules is files.schedules


def test_rows_that_see_every_block() -> None:
    runs = (Run(0, 1),)
    start = [Piece(0, 2, 0, 0, 0, False), Piece(2, 5, 0, 0, 0, False)]
    assert HeadSchedule(runs, (*start, Piece(5, UNBOUNDED, 0, 1, -1, True))).dense_rows == 5
    assert HeadSchedule(runs, (*start, Piece(5, UNBOUNDED, 0, 0, -1, True))).dense_rows == 5
    assert HeadSchedule(runs, (Piece(0, UNBOUNDED, 0, 0, 0, True),)).dense_rows == 0


def test_counted_blocks_are_those_of_the_rows() -> None:
    topology = random_topology(np.random.default_rng(5), num_layers=2, num_heads=14, num_kv_heads=7, num_blocks=40)
    for layer in schedule_layers(topology):
        for made in layer.heads:
            for rows in (1, 17, 40, 55):
                expanded = sum(run.end - run.begin for row in range(rows) for run in made.row(row))
                assert made.visible_blocks(rows) == expanded


def test_heads_that_name_the_same_pieces_do_not_get_around_the_limit(
    files: PackageFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each head is another place in the file, with as many pieces; the file grows by a row of `heads`."""
    tensors = safetensors.numpy.load(files.files[FILE])
    name = files.manifest.kernels[0].schedule
    pieces = np.array([[0, 5, 0, 1, 0, 0], [5, UNBOUNDED, 0, 1, -1, 1]], dtype=np.int32)
    tensors[f"{name}.pieces"], tensors[f"{name}.runs"] = pieces, np.array([[0, 1]] * 3, dtype=np.int32)
    tensors[f"{name}.heads"] = np.array([[0, 2, 0], [0, 2, 1], [0, 2, 2]], dtype=np.int32)
    changed = with_file(files, safetensors.numpy.save(tensors))
    others = 0
    for limit in range(20):
        monkeypatch.setattr("surgeon.runtime.package.schedule.MAX_PIECES", limit)
        changed = dataclasses.replace(changed)
        try:
            _ = changed.schedules
        except PackageError as error:
            assert "expected at most" in str(error)  # noqa: PT017
            others = limit + 1
    assert 6 <= others < 20


@pytest.mark.parametrize("data", [b"", b"no tensors", b"\xff" * 64])
def test_a_file_without_tensors(files: PackageFiles, data: bytes) -> None:
    with pytest.raises(PackageError, match=rf"{FILE}: expected a safetensors file"):
        _ = with_file(files, data).schedules


def test_a_layer_without_a_schedule(files: PackageFiles) -> None:
    nameless = with_kernels(files, lambda kernel: dataclasses.replace(kernel, schedule=""))
    with pytest.raises(PackageError, match=r"layer 0: expected a kernel that names its schedule, got none"):
        _ = nameless.schedules


def test_a_layer_with_two_schedules(files: PackageFiles) -> None:
    renamed = with_kernels(
        files, lambda kernel: dataclasses.replace(kernel, schedule="other") if kernel.dtype == "bf16" else kernel
    )
    with pytest.raises(PackageError, match=r"layer 0: expected one schedule, got attention_000 and other"):
        _ = renamed.schedules


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("pieces", lambda _table: None, r"pieces: expected an int32 matrix \[any, 6\], got none"),
        ("runs", lambda table: table.flatten(), r"runs: expected an int32 matrix \[any, 2\], got int32 \[\d\]"),
        ("pieces", lambda table: table[:, :5], r"pieces: expected an int32 matrix \[any, 6\], got int32 \[\d, 5\]"),
        ("heads", lambda table: table.astype(np.float32), r"heads: expected an int32 matrix \[any, 3\], got float32"),
        ("heads", lambda table: table[0], r"heads: expected an int32 matrix \[any, 3\], got int32 \[3\]"),
        ("heads", lambda table: table[:1], "heads: expected 3 heads, got 1"),
        ("heads", lambda table: np.add(table, [[0, 100, 0]]), r"heads\[0\]: expected some of \d+ pieces"),
        ("heads", lambda table: np.subtract(table, [[1, 0, 0]]), r"heads\[0\]: expected some of \d+ pieces"),
        ("heads", lambda table: table * [[1, 0, 1]], r"heads\[0\]: expected some of \d+ pieces"),
        ("heads", lambda table: table * [[0, 0, 0]] - [[0, 2**31, 0]], r"heads\[0\]: expected some of \d+ pieces"),
        ("heads", lambda table: np.subtract(table, [[0, 0, 1]]), r"heads\[0\]: expected some of \d+ pieces"),
        ("heads", lambda table: np.add(table, [[0, 0, 100]]), r"runs: expected \d from 100 on, got 0"),
        ("heads", lambda table: np.add(table, [[1, 0, 0]]), r"pieces: expected rows from 0 on without gaps"),
        ("pieces", lambda table: np.add(table, [[0, 0, 0, 9, 0, 0]]), r"runs: expected \d+ from 0 on, got \d"),
        ("pieces", lambda table: np.add(table, [[0, 0, 9, 9, 0, 0]]), r"runs: expected \d+ from 0 on, got \d"),
        ("pieces", lambda table: np.subtract(table, [[0, 0, 1, 0, 0, 0]]), r"pieces\[0\]: expected rows and runs that"),
        ("pieces", lambda table: np.add(table, [[0, 0, 9, 0, 0, 0]]), r"pieces\[0\]: expected rows and runs that"),
        ("pieces", lambda table: table * [[1, 0, 1, 1, 1, 1]], r"pieces\[0\]: expected rows and runs that begin"),
        ("pieces", lambda table: np.subtract(table, [[0, 0, 0, 0, 9, 0]]), r"pieces\[0\]: expected rows and runs that"),
        ("pieces", lambda table: np.add(table, [[0, 0, 0, 0, 9, 0]]), r"pieces\[0\]: expected rows and runs that"),
        ("pieces", lambda table: np.add(table, [[0, 0, 0, 0, 0, 2]]), r"pieces\[0\]: expected rows and runs that"),
        ("runs", lambda table: np.subtract(table, [[1, 0]]), r"runs\[0\]: expected blocks from a first to an end"),
        ("runs", lambda table: np.add(table, [[9, 0]]), r"runs\[0\]: expected blocks from a first to an end"),
        ("last_readers", lambda _table: None, r"last_readers: expected an int32 matrix \[any, some\], got none"),
        ("last_readers", lambda table: table[:, :0], r"last_readers: expected an int32 matrix .*, got int32 \[1, 0\]"),
        ("last_readers", lambda table: np.vstack((table, table)), "last_readers: expected 1 heads, got 2"),
    ],
)
def test_a_matrix_that_points_elsewhere(
    files: PackageFiles, part: str, change: Callable[[Matrix], Matrix | None], message: str
) -> None:
    tensors = safetensors.numpy.load(files.files[FILE])
    changed = change(tensors.pop(f"attention_000.{part}"))
    if changed is not None:
        tensors[f"attention_000.{part}"] = np.ascontiguousarray(
            changed, None if changed.dtype == np.float32 else np.int32
        )
    with pytest.raises(PackageError, match=rf"{FILE}: attention_000\.{message}.*; compile the package again"):
        _ = with_file(files, safetensors.numpy.save(tensors)).schedules
