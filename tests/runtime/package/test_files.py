"""Reading files that somebody else wrote: pipes are not waited for, links are followed only where a user named them."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from surgeon.runtime.package.files import NotAFileError, read_any, read_regular


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    return file


@pytest.mark.parametrize("read", [read_regular, read_any])
@pytest.mark.parametrize(("limit", "found"), [(0, b"0"), (9, b"0123456789"), (10, b"0123456789")])
def test_no_more_is_read_than_tells_that_a_file_is_too_large(
    file: Path, read: Callable[[Path, int], bytes], limit: int, found: bytes
) -> None:
    assert read(file, limit) == found


def test_a_limit_takes_no_memory(file: Path) -> None:
    assert read_regular(file, 2**62) == b"0123456789"


def test_a_file_below_an_open_folder(file: Path) -> None:
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        assert read_regular(file.name, 100, folder) == b"0123456789"
    finally:
        os.close(folder)


def test_what_is_no_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (
        ("link", "a symbolic link"),
        ("folder", "a folder"),
        ("pipe", "a pipe"),
        ("/dev/null", "a device"),
    ):
        with pytest.raises(NotAFileError) as caught:
            read_regular(tmp_path / name, 100)
        assert caught.value.strerror == kind
    for name in ("folder", "pipe"):
        with pytest.raises(NotAFileError):
            read_any(tmp_path / name, 100)
    assert read_any(tmp_path / "link", 100) == b"0123456789"
    assert read_any("/dev/null", 100) == b""


def test_a_pipe_that_the_shell_made_is_waited_for() -> None:
    reader, writer = os.pipe()
    later = threading.Timer(0.05, lambda: (os.write(writer, b"late"), os.close(writer)))
    later.start()
    try:
        assert read_any(f"/dev/fd/{reader}", 100) == b"late"
    finally:
        later.join()
        os.close(reader)


def test_nothing_stays_open(file: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        read_any(file, 100)
        read_regular(file, 100)
        with pytest.raises(NotAFileError):
            read_any(tmp_path / "folder", 100)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
