import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from surgeon.compiler.system import atomic_files

FILES = {"one": b"1", "two": b"2", "below/three": b"3"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def abandoned(out: Path) -> Path:
    """The remains of a writer that was killed."""
    folder = out.with_name(f".{out.name}.abc_0123.partial")
    atomic_files.write(folder, FILES)
    return folder


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    abandoned(tmp_path / "out")
    atomic_files.write(tmp_path / "out", FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_writers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, write = tmp_path / "out", atomic_files._write_durably

    def write_with_another_in_between(path: Path, data: bytes) -> None:
        if data == FILES["two"] and not out.exists():
            atomic_files.write(out, {"two": b"other"})
            assert contents(out) == {"two": b"other"}
        write(path, data)

    monkeypatch.setattr(atomic_files, "_write_durably", write_with_another_in_between)
    atomic_files.write(out, FILES)
    assert contents(out) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_was_taken_for_abandoned_before_it_was_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock: Callable[[int, int], None] = fcntl.flock
    taken = []

    def lock_too_late(descriptor: int, mode: int) -> None:
        if not taken:
            taken.extend(tmp_path.glob(".out.*.partial"))
            shutil.rmtree(taken[0])
        lock(descriptor, mode)

    monkeypatch.setattr("surgeon.compiler.system.atomic_files.fcntl.flock", lock_too_late)
    atomic_files.write(tmp_path / "out", FILES)
    assert len(taken) == 1
    assert contents(tmp_path / "out") == FILES


def test_where_there_are_no_locks_nothing_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    left = abandoned(tmp_path / "out")
    monkeypatch.setattr("surgeon.compiler.system.atomic_files.fcntl.flock", no_locks)
    atomic_files.write(tmp_path / "out", FILES)
    assert contents(tmp_path / "out") == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"out", left.name}


def test_what_is_only_named_alike_stays(tmp_path: Path) -> None:
    mine = [".out.mine.partial", ".out2.abc_0123.partial", ".out.abc_0123.partial.d", "out.abc_0123.partial"]
    for name in mine:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.file0123.partial").write_bytes(b"")
    (tmp_path / ".out.link0123.partial").symlink_to(tmp_path / mine[0])
    atomic_files.write(tmp_path / "out", FILES)
    assert {path.name for path in tmp_path.iterdir()} == {
        "out",
        *mine,
        ".out.file0123.partial",
        ".out.link0123.partial",
    }
