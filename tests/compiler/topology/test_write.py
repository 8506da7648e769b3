"""The text of topology.json: read back as the same topology, with one line per head and per merge."""

import json

from hypothesis import given

import strategies
import topologies
from surgeon.compiler.topology.read import parse_topology
from surgeon.compiler.topology.topology import Topology
from surgeon.compiler.topology.write import spelled


@given(strategies.checked_topologies())
def test_what_is_spelled_is_read_as_the_same_topology(topology: Topology) -> None:
    assert parse_topology(spelled(topology)) == topology


def test_a_line_for_each_head_and_each_merge() -> None:
    lines = spelled(parse_topology(json.dumps(topologies.example()))).splitlines()
    assert [line.strip(" ,") for line in lines if '"dense"' in line] == ['{"dense": true}'] * 2
    assert "    [0, 1, 1.0, 2]," in lines
