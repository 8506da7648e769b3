import os
import random
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from surgeon.compiler.system.cache import Cache
from surgeon.runtime.errors import BuildError

DIGEST_BYTES = 32  # an entry's size beyond its data
KEYS = [Cache.key([name]) for name in "abcdef"]


def test_what_was_put_is_got(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "new" / "cache")
    key = Cache.key(["a", b"b"])
    assert cache.get(key) is None
    cache.put(key, b"data")
    assert cache.get(key) == b"data"
    cache.put(key, b"")
    assert cache.get(key) == b""


def test_the_boundaries_of_parts_count() -> None:
    assert len({Cache.key(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""])}) == 4
    assert Cache.key(["a"]) == Cache.key([b"a"])


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 40])
def test_a_damaged_entry_is_a_miss(tmp_path: Path, damage: bytes) -> None:
    cache = Cache(tmp_path)
    cache.put("key", b"data")
    (tmp_path / "key").write_bytes(damage)
    assert cache.get("key") is None


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_a_miss_and_is_not_waited_for(tmp_path: Path, make: Callable[[Path], object]) -> None:
    cache = Cache(tmp_path)
    make(tmp_path / "key")
    assert cache.get("key") is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    cache.put("key", b"data")
    assert cache.get("key") is None


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("key", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_nothing_stays_of_what_cannot_be_written(tmp_path: Path) -> None:
    cache, limits = Cache(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as on a full disk
    try:
        cache.put("key", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def filled(folder: Path, entries: int, limit: int) -> Cache:
    """Entries of 100 bytes, each used a second after the one before."""
    cache = Cache(folder, limit)
    for second, key in enumerate(KEYS[:entries], start=1):
        cache.put(key, bytes(100 - DIGEST_BYTES))
        os.utime(folder / key, (second, second))
    return cache


def kept(folder: Path) -> str:
    return "".join(name for name, key in zip("abcdef", KEYS, strict=True) if (folder / key).exists())


def test_what_was_not_used_for_longest_leaves_first(tmp_path: Path) -> None:
    cache = filled(tmp_path, 4, limit=400)
    assert kept(tmp_path) == "abcd"
    assert cache.get(KEYS[0]) is not None
    cache.put(KEYS[4], bytes(150 - DIGEST_BYTES))
    assert kept(tmp_path) == "ade"


def test_what_is_larger_than_the_cache_drives_nothing_out(tmp_path: Path) -> None:
    filled(tmp_path, 2, limit=400).put(KEYS[2], bytes(500))
    assert kept(tmp_path) == "ab"


def test_without_a_limit_everything_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for key in KEYS:
        cache.put(key, bytes(1000))
    assert kept(tmp_path) == "abcdef"


def test_what_is_not_the_caches_stays(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_bytes(bytes(10_000))
    os.utime(tmp_path / "thesis.tex", (0, 0))
    filled(tmp_path, 2, limit=200)
    assert kept(tmp_path) == "ab"
    assert (tmp_path / "thesis.tex").exists()


def test_what_a_killed_writer_left_leaves_like_an_entry(tmp_path: Path) -> None:
    left = tmp_path / f".{KEYS[5]}-abc_0123"
    left.write_bytes(bytes(300))
    os.utime(left, (0, 0))
    filled(tmp_path, 2, limit=400)
    assert not left.exists()
    assert kept(tmp_path) == "ab"


def test_an_entry_that_is_removed_while_it_is_read_is_whole_or_a_miss(tmp_path: Path) -> None:
    def use(seed: int) -> int:
        cache, choose, hits = Cache(tmp_path, limit=3 * 10_000), random.Random(seed), 0
        for _ in range(300):
            number = choose.randrange(len(KEYS))
            found = cache.get(KEYS[number])
            hits += found is not None
            assert found in (None, bytes([number]) * 9_000)
            cache.put(KEYS[number], bytes([number]) * 9_000)
        return hits

    with ThreadPoolExecutor(4) as pool:
        hits = list(pool.map(use, range(4)))
    assert all(0 < each < 300 for each in hits), "entries were found and entries were removed"
    assert len(kept(tmp_path)) <= 3
    assert {path.name for path in tmp_path.iterdir()} <= set(KEYS)


@pytest.mark.parametrize(
    ("size", "stays"), [("199", "b"), ("200", "ab"), ("1k", "ab"), ("1M", "ab"), ("", "ab"), ("0", "ab")]
)
def test_the_limit_of_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: str, stays: str) -> None:
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path))
    monkeypatch.setenv("SURGEON_CACHE_SIZE", size)
    cache = Cache.default()
    cache.put(KEYS[0], bytes(100 - DIGEST_BYTES))
    os.utime(tmp_path / "compiled" / KEYS[0], (0, 0))
    cache.put(KEYS[1], bytes(100 - DIGEST_BYTES))
    assert kept(tmp_path / "compiled") == stays


def test_the_default_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SURGEON_CACHE", str(tmp_path))
    monkeypatch.delenv("SURGEON_CACHE_SIZE", raising=False)
    folder = tmp_path / "compiled"
    folder.mkdir()
    for second, key in enumerate(KEYS[:3]):
        with (folder / key).open("wb") as file:
            file.truncate(400_000_000)  # sparse: takes no room on the disk
        os.utime(folder / key, (second, second))
    Cache.default().put(KEYS[3], b"")
    assert kept(folder) == "bcd"


@pytest.mark.parametrize("size", ["lots", "-1", "1.5G", "10 G", "1g", "G", "9" * 30])
def test_a_size_that_is_none(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("SURGEON_CACHE_SIZE", size)
    with pytest.raises(BuildError, match=r"SURGEON_CACHE_SIZE: expected a size such as 500M or 2G"):
        Cache.default()


def test_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for variable, value, place in (
        ("SURGEON_CACHE", None, ".cache/surgeon/compiled/key"),
        ("XDG_CACHE_HOME", tmp_path / "xdg", "xdg/surgeon/compiled/key"),
        ("SURGEON_CACHE", tmp_path / "own", "own/compiled/key"),
    ):
        if value is None:
            monkeypatch.delenv(variable, raising=False)
        else:
            monkeypatch.setenv(variable, str(value))
        Cache.default().put("key", b"data")
        assert (tmp_path / place).is_file()
