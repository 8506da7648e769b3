"""The free part of a topology file can always be written again and shown."""

import json
from typing import Any

import pytest

import topologies
from surgeon.compiler.topology.provenance import MAX_LEVELS
from surgeon.compiler.topology.read import parse_topology
from surgeon.compiler.topology.write import spelled
from surgeon.runtime.errors import TopologyError


def nested(levels: int, in_lists: bool) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if in_lists else {"a": value}
    return value


def read(provenance: str) -> Any:
    text = json.dumps(topologies.example() | {"provenance": None})
    return parse_topology(text.replace('"provenance": null', f'"provenance": {provenance}'))


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"text": "a book, \U0001f600 é", "figures": [1.5, -1e308, 2**80, None, True, {"": []}]},
        {"a": nested(MAX_LEVELS - 1, in_lists=True)},
        nested(MAX_LEVELS, in_lists=False),
    ],
    ids=["empty", "of every type", "deep lists", "deep objects"],
)
def test_it_is_read_and_written_again(provenance: dict[str, Any]) -> None:
    topology = read(json.dumps(provenance))
    assert topology.provenance == provenance
    assert parse_topology(spelled(topology)) == topology


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ('{"kl": NaN}', "provenance.'kl': expected a finite number, got nan; write it as text, or leave it out"),
        ('{"kl": [0, {"a": 1e999}]}', "provenance.'kl'[1].'a': expected a finite number, got inf; "),
        ('{"kl": -Infinity}', "provenance.'kl': expected a finite number, got -inf; "),
        ('{"a": "x\\ud800"}', r"provenance.'a': expected whole letters, got 'x\ud800'; remove the half of a surrogate"),
        ('{"\\udc00": 1}', r"a key of provenance: expected whole letters, got '\udc00'; "),
        (
            json.dumps({"a": nested(MAX_LEVELS, in_lists=True)}),
            "provenance: expected at most 64 levels, got more; make",
        ),
        (json.dumps(nested(900, in_lists=False)), "provenance: expected at most 64 levels, got more; make it flatter"),
    ],
    ids=["NaN", "beyond all doubles", "infinity", "half a pair", "half a pair in a key", "deep lists", "deep objects"],
)
def test_what_could_not_be_written_again_is_refused(provenance: str, message: str) -> None:
    with pytest.raises(TopologyError) as caught:
        read(provenance)
    assert str(caught.value).startswith(message)
    assert str(caught.value).isprintable()
