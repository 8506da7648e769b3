"""Folders that are filled once, completely or not at all."""

from pathlib import Path

import pytest

from inputs.cache import cached


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("whole")

    folder = tmp_path / "below" / "name"
    assert cached(folder, make) == cached(folder, make) == folder
    assert len(made) == 1
    assert (folder / "file").read_text() == "whole"
    assert [entry.name for entry in folder.parent.iterdir()] == ["name"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached(tmp_path / "name", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_made_meanwhile_is_taken(tmp_path: Path) -> None:
    def overtaken(folder: Path) -> None:
        (folder / "file").write_text("second")
        (tmp_path / "name").mkdir()
        (tmp_path / "name" / "file").write_text("first")

    assert (cached(tmp_path / "name", overtaken) / "file").read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["name"]
