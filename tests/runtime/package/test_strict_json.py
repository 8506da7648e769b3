"""The strict reader of JSON: its refusals, with their places and remedies."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from surgeon.runtime.errors import PilotError, TargetError
from surgeon.runtime.package.strict_json import Fault, parse_json, parse_root, read_document, read_plain

BY_HAND = Fault(TargetError)
BY_PROGRAM = Fault(PilotError, "make it again")


@dataclass(frozen=True)
class Inner:
    number: int


@dataclass(frozen=True)
class Outer:
    name: str
    ratio: float
    flag: bool
    inner: Inner
    rows: tuple[tuple[int, ...], ...]
    rest: Inner | None


WHOLE = {
    "name": "a",
    "ratio": 0.5,
    "flag": True,
    "inner": {"number": 1},
    "rows": [[1, 2], []],
    "rest": None,
}


def test_every_kind_of_value_is_read() -> None:
    assert read_plain(Outer, WHOLE, "root", BY_HAND) == Outer("a", 0.5, True, Inner(1), ((1, 2), ()), None)
    filled = read_plain(Outer, WHOLE | {"rest": {"number": 2}}, "root", BY_HAND)
    assert filled == Outer("a", 0.5, True, Inner(1), ((1, 2), ()), Inner(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "root: expected the keys name, ratio, flag, inner, rows, rest, got"),
        ({"name": 1}, "root: name: expected a value of type str, got 1; correct it"),
        ({"ratio": 1}, "root: ratio: expected a value of type float, got 1"),
        ({"flag": 1}, "root: flag: expected a value of type bool, got 1"),
        ({"inner": {"number": True}}, "root: inner: number: expected a value of type int, got True"),
        ({"inner": None}, "root: inner: expected an object, got None"),
        ({"inner": {}}, "root: inner: expected the keys number"),
        ({"rows": [[1], 2]}, r"root: rows\[1\]: expected a list, got 2"),
        ({"rest": 0}, "root: rest: expected an object, got 0"),
    ],
)
def test_another_value_is_refused_with_its_place(change: dict[str, object], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        read_plain(Outer, WHOLE | change, "root", BY_HAND)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_not_finite_is_refused_with_its_place(text: str) -> None:
    parsed = parse_json(json.dumps(WHOLE).replace("0.5", text), "root", BY_HAND)
    with pytest.raises(TargetError, match="root: ratio: expected a finite number"):
        read_plain(Outer, parsed, "root", BY_HAND)


def test_a_key_twice() -> None:
    with pytest.raises(TargetError, match=r"root: expected every key once, got 'a' twice; remove one of them"):
        parse_json('{"b": {"a": 1, "a": 1}}', "root", BY_HAND)


def test_the_remedy_of_a_programs_file_is_that_of_every_place() -> None:
    for text in ("{", "[" * 100_000, "1" * 5000, '{"a": 1, "a": 1}'):
        with pytest.raises(PilotError, match=r"; make it again$"):
            parse_json(text, "root", BY_PROGRAM)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"root: expected an object, got \[\]"),
        ("{}", "root: format: expected 'f', got None"),
        ('{"format": "f", "version": 2}', "root: version: expected 1, got 2"),
        (
            '{"format": "f", "version": 2, "surgeon": "0.9"}',
            "expected 1, got 2, as surgeon '0.9' writes it; correct it",
        ),
        ('{"format": "f", "version": 2, "tools": [{"name": "surgeon", "version": "1.0"}]}', "got 2, as surgeon '1.0' "),
        ('{"format": "f", "version": 2, "tools": [[], 1]}', "expected 1, got 2; correct it"),
        ('{"format": "f", "version": 2, "tools": [{"name": "surgeon"}]}', "expected 1, got 2; correct it"),
        ('{"format": "f", "version": true}', "root: version: expected 1, got True"),
        ('{"format": "f", "version": 1.0}', "root: version: expected 1, got 1.0"),
    ],
)
def test_another_root(text: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        parse_root(text, "f", (1,), "root", BY_HAND)


@pytest.mark.parametrize("version", [1, 2])
def test_a_root_tells_its_version_and_the_other_keys(version: int) -> None:
    found = parse_root(json.dumps({"format": "f", "version": version, "a": [2]}), "f", (1, 2), "root", BY_HAND)
    assert found == (version, {"a": [2]})


def test_a_version_that_none_of_several_is() -> None:
    with pytest.raises(TargetError, match="root: version: expected 1 or 2, got 3"):
        parse_root('{"format": "f", "version": 3}', "f", (1, 2), "root", BY_HAND)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"[1, 2",
            r"file\.json: root: line 1 column 6: expected JSON, got Expecting ',' delimiter; correct the",
        ),
        (b"[\xff]", r"file\.json: expected UTF-8 text, got a stray byte at 1; save it as UTF-8"),
        (b"[1, 2, 3]", r"file\.json: expected at most 8 bytes, got a larger file; drop some"),
        (None, r"file\.json: expected a readable file, got No such file or directory; check the path"),
    ],
)
def test_a_file_that_is_no_document(tmp_path: Path, data: bytes | None, message: str) -> None:
    file = tmp_path / "file.json"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(TargetError, match=message):
        read_document(file, 8, lambda text: parse_json(text, "root", BY_HAND), BY_HAND, "drop some")


def test_a_file_of_just_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text("[1, 2,3]")
    assert read_document(file, 8, lambda text: parse_json(text, "root", BY_HAND), BY_HAND) == [1, 2, 3]
