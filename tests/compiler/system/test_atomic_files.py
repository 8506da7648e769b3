import fcntl
import os
import shutil
import stat
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


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "_exchange", lambda _one, _other: False)


@pytest.mark.usefixtures("no_exchange")
def test_without_exchange_the_old_folder_is_removed(tmp_path: Path) -> None:
    for files in ({"one": b"old"}, FILES, FILES):
        atomic_files.write(tmp_path / "out", files)
        assert contents(tmp_path / "out") == files
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("renames", [1, 2])
def test_an_interruption_without_exchange_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    atomic_files.write(tmp_path / "out", {"one": b"old"})
    rename, seen = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        seen.append(self)
        if len(seen) == renames + 1:  # the first attempt is refused, since the name is taken
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_files.write(tmp_path / "out", FILES)
    assert contents(tmp_path / "out") == {"one": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("no_exchange")
def test_a_writer_that_takes_the_name_between_the_renames_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", Path.rename
    atomic_files.write(out, {"one": b"old"})
    others = []

    def with_another_in_between(self: Path, target: Path) -> Path:
        if self.suffix == ".partial" and not out.exists() and not others:
            others.append(out)
            out.mkdir()
            (out / "other").write_bytes(b"")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", with_another_in_between)
    atomic_files.write(out, FILES)
    assert others
    assert contents(out) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [True, False], ids=["the new folder is there", "no folder is there"])
def test_an_old_folder_that_a_killed_writer_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    out, aside = tmp_path / "out", tmp_path / ".out.abc_0123.old"
    atomic_files.write(aside, {"one": b"old"})
    if there:
        atomic_files.write(out, FILES)
        assert not aside.exists()
        return

    def fails(_path: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_files, "_write_durably", fails)
    with pytest.raises(OSError, match="No space left"):
        atomic_files.write(out, FILES)
    assert contents(out) == {"one": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_folders_and_files_follow_the_umask_alike(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        atomic_files.write(tmp_path / "out", FILES)
        atomic_files.write_file(tmp_path / "file", "text")
    finally:
        os.umask(before)
    folders = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out", tmp_path / "out" / "below")}
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert folders == {0o777 & ~mask}
    assert {stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "file", *files]} == {0o666 & ~mask}
