from pathlib import Path

import pytest

from surgeon.compiler.cache import Cache


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


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    cache.put("key", b"data")
    assert cache.get("key") is None


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("key", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


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
