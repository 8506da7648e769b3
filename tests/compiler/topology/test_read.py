"""The reader of topology files: every fault with its message, and no fault without one."""

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import strategies
import topologies
from surgeon.compiler.topology import read
from surgeon.compiler.topology.read import parse_topology, read_topology
from surgeon.compiler.topology.topology import DenseHead, SparseHead, Topology
from surgeon.runtime.errors import TopologyError
from surgeon.runtime.package.manifest import ModelShape
from topology_faults import FAULTS, Fault


def error_of(text: str) -> str:
    with pytest.raises(TopologyError) as caught:
        parse_topology(text)
    return str(caught.value)


def test_every_field_arrives() -> None:
    document = topologies.example() | {"provenance": {"text": "a book"}, "beyond": "dense"}
    document["model"]["weights_sha256"] = "0f" * 32
    topology = parse_topology(json.dumps(document))
    assert topology.model == ModelShape("llama", 2, 4, 2, 32, "0f" * 32)
    assert (topology.block_size, topology.num_blocks, topology.beyond) == (64, 3, "dense")
    assert topology.provenance == {"text": "a book"}
    assert topology.dendrograms[0].linkage == ((0, 1, 1.0, 2), (2, 3, 2.0, 3))
    assert topology.dendrograms[1].linkage == ((0, 2, 1.0, 2), (3, 1, 2.0, 3))
    heads = (SparseHead(0, 1.0, 1, 2), DenseHead(), SparseHead(1, 2.0, 0, 1), SparseHead(0, 0.0, 0, 1))
    assert topology.layers == (heads, heads[::-1])


def test_a_layer_may_be_left_uncovered() -> None:
    document = topologies.example()
    document["layers"][0] = None
    topology = parse_topology(json.dumps(document))
    assert topology.layers[0] == ()
    assert topology.covered == (1,)
    assert json.loads(topology.canonical())["layers"][0] is None


def test_what_may_be_left_out() -> None:
    document = topologies.example()
    del document["beyond"], document["provenance"], document["model"]["weights_sha256"]
    topology = parse_topology(json.dumps(document))
    assert topology.beyond == "window"
    assert topology.provenance == {}
    assert topology.model.weights_sha256 is None


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_told_with_place_expected_got_and_remedy(fault: Fault) -> None:
    assert error_of(json.dumps(fault.document())) == fault.text


def test_every_error_is_one_printable_line() -> None:
    for fault in FAULTS:
        text = error_of(json.dumps(fault.document()))
        assert text.isprintable()
        assert len(text) < 400


# The text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "topology: line 1 column 1: expected JSON, got Expecting value; correct the syntax"),
        ('{"format":\n }', "topology: line 2 column 2: expected JSON, got Expecting value; correct the syntax"),
        ("{} {}", "topology: line 1 column 4: expected JSON, got Extra data; correct the syntax"),
        (
            "\ufeff{}",
            "topology: line 1 column 1: expected JSON, got Unexpected UTF-8 BOM (decode using utf-8-sig); "
            "correct the syntax",
        ),
        ("[1, 2]", "topology: expected an object, got [1, 2]; write it in braces"),
        ("null", "topology: expected an object, got None; write it in braces"),
        (
            '{"format": "surgeon.topology", "format": "surgeon.topology"}',
            "topology: expected every key once, got 'format' twice; remove one of them",
        ),
        ('{"provenance": {"a": 1, "a": 1}}', "topology: expected every key once, got 'a' twice; remove one of them"),
        (
            "[" * 100_000,
            "topology: expected JSON of a few levels, got nesting too deep to read; correct the file",
        ),
        (
            "1" * 5000,
            "topology: expected numbers of a few digits, got one of thousands; correct the file",
        ),
    ],
    ids=[
        "empty",
        "cut off",
        "two values",
        "byte order mark",
        "list",
        "null",
        "twice",
        "twice inside",
        "deep",
        "digits",
    ],
)
def test_text_that_is_no_topology(text: str, message: str) -> None:
    assert error_of(text) == message


@pytest.mark.parametrize("depth", [1, 50, 500, 900, 950, 980, 5000])
def test_a_deep_value_in_a_wrong_place_is_an_error(depth: int) -> None:
    document = topologies.example() | {"format": "PLACE"}
    error_of(json.dumps(document).replace('"PLACE"', "[" * depth + "]" * depth))


# The file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "topology.json"


def file_error(file: Path | str) -> str:
    with pytest.raises(TopologyError) as caught:
        read_topology(file)
    return str(caught.value)


def test_a_file_is_read(file: Path) -> None:
    file.write_text(json.dumps(topologies.example()))
    assert read_topology(file) == read_topology(str(file)) == parse_topology(file.read_text())


def test_an_error_names_the_file_and_the_place_in_it(file: Path) -> None:
    document = topologies.example()
    document["layers"][0]["heads"][0]["window"] = 0
    file.write_text(json.dumps(document))
    place = "layers[0].heads[0].window"
    assert file_error(file) == f"{file}: {place}: expected a number in 1..16384, got 0; correct it"


def test_a_missing_file(file: Path) -> None:
    assert file_error(file) == f"{file}: expected a readable file, got No such file or directory; check the path"


def test_a_folder(tmp_path: Path) -> None:
    assert file_error(tmp_path) == f"{tmp_path}: expected a readable file, got a folder; check the path"


def test_a_path_with_a_null_character() -> None:
    assert file_error("a\0b").endswith("expected a readable file, got embedded null byte; check the path")


def test_a_file_that_is_not_utf8(file: Path) -> None:
    file.write_bytes(b'{"format": "\xff"}')
    assert file_error(file) == f"{file}: expected UTF-8 text, got a stray byte at 12; save it as UTF-8"


def test_a_file_that_is_too_large_is_not_parsed(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(read.MAX_FILE_BYTES + 1)
    limit = f"expected at most {read.MAX_FILE_BYTES} bytes, got a larger file"
    assert file_error(file) == f"{file}: {limit}; share dendrograms between heads"


def test_a_pipe_that_may_never_have_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert file_error(tmp_path / "pipe") == f"{tmp_path}/pipe: expected a readable file, got a pipe; check the path"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no endless device")
def test_a_file_without_an_end_is_too_large() -> None:
    assert file_error("/dev/zero").startswith(f"/dev/zero: expected at most {read.MAX_FILE_BYTES} bytes")


# Fuzzing

odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([10**400, -(10**400), 2**63, 1e308, math.nan, math.inf, -math.inf, -0.0, 0.5]),
    st.text(max_size=3),
    st.sampled_from(["window", "llama", "\ud800", "a" * 200]),
    st.lists(st.integers(0, 5), max_size=5),
    st.dictionaries(
        st.sampled_from(["dense", "paths", "arity", "linkage", "heads", "x"]), st.integers(0, 3), max_size=3
    ),
)


def _places(value: object) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    return [(value, key) for key, _ in items] + [place for _, inner in items for place in _places(inner)]


def check_outcome(text: str) -> None:
    """Checks that the text is read as a usable topology or refused with a TopologyError; nothing else is raised."""
    try:
        topology: Topology | None = parse_topology(text)
    except TopologyError:
        topology = None
    if topology is not None:
        topology.block_mask(0, min(topology.num_blocks, 8))


@given(strategies.documents(max_blocks=6), st.data())
def test_a_mutated_document_is_a_topology_or_a_topology_error(document: dict[str, Any], data: st.DataObject) -> None:
    document = copy.deepcopy(document)  # the parts of a drawn document may be shared
    for _ in range(data.draw(st.integers(1, 4))):
        places = _places(document)
        if not places:
            break
        container, key = data.draw(st.sampled_from(places))
        match data.draw(st.sampled_from(["delete", "replace", "insert", "copy"])):
            case "delete":
                del container[key]
            case "replace":
                container[key] = data.draw(odd_values)
            case "copy":
                other, other_key = data.draw(st.sampled_from(places))
                container[key] = copy.deepcopy(other[other_key]) if other is not container else None
            case "insert" if isinstance(container, list):
                container.insert(key, data.draw(odd_values))
            case "insert":
                container[data.draw(st.text(max_size=5))] = data.draw(odd_values)
    check_outcome(json.dumps(document))


@given(st.data())
def test_a_damaged_text_is_a_topology_or_a_topology_error(data: st.DataObject) -> None:
    text = json.dumps(topologies.example())
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(len(text), begin + 9)))
    check_outcome(text[:begin] + data.draw(st.text(max_size=4)) + text[end:])
