"""The blocks that a topology's heads see, against the definition in loops; densities; the canonical hash."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import strategies
import topologies
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.topology.read import parse_topology
from surgeon.compiler.topology.topology import DenseHead, Head, SparseHead, Topology
from surgeon.compiler.topology.write import spelled
from surgeon.runtime.errors import TopologyError


def visible(topology: Topology, head: Head, i: int, j: int) -> bool:
    """The definition: j ≤ i and (j < sink or i − j < window or d(i,j) ≤ cut), and `beyond` for rows past the tree."""
    if j > i:
        return False
    if isinstance(head, DenseHead) or j < head.sink or i - j < head.window:
        return True
    if i >= topology.num_blocks:
        return topology.beyond == "dense"
    if not isinstance(head, SparseHead):
        return False
    return topologies.distance(topology.dendrograms[head.dendrogram], i, j) <= head.cut


@given(strategies.checked_topologies(max_blocks=7), st.sampled_from([-3, -1, 0, 1, 5]))
def test_block_mask_is_the_definition(topology: Topology, more: int) -> None:
    num_blocks = max(1, topology.num_blocks + more)
    if topology.beyond == "error":
        num_blocks = min(num_blocks, topology.num_blocks)
    for layer, heads in enumerate(topology.layers):
        mask = topology.block_mask(layer, num_blocks)
        assert mask.shape == (len(heads), num_blocks, num_blocks)
        assert mask.dtype == np.bool_
        for index, head in enumerate(heads):
            for i in range(num_blocks):
                for j in range(num_blocks):
                    assert mask[index, i, j] == visible(topology, head, i, j), (layer, index, i, j)


@given(strategies.checked_topologies(max_blocks=10))
def test_a_shorter_length_is_a_corner_of_a_longer_one_and_no_row_is_empty(topology: Topology) -> None:
    whole = topology.block_mask(0, topology.num_blocks)
    shorter = (topology.num_blocks + 1) // 2
    np.testing.assert_array_equal(topology.block_mask(0, shorter), whole[:, :shorter, :shorter])
    assert whole.any(axis=2).all()


@pytest.mark.parametrize("beyond", ["window", "dense", "error"])
def test_a_head_without_a_tree_is_one_whose_cut_leaves_single_blocks(beyond: str) -> None:
    shapes = [(0, 1), (1, 2), (2, 9), (8, 3)]
    treeless = topologies.build([[topologies.window_head(*shape) for shape in shapes]], num_blocks=4, beyond=beyond)
    heads = [topologies.head(0, 0.0, *shape) for shape in shapes]
    with_tree = topologies.build([heads], [SCATTERED], num_blocks=4, beyond=beyond)
    length = 4 if beyond == "error" else 9
    np.testing.assert_array_equal(treeless.block_mask(0, length), with_tree.block_mask(0, length))
    np.testing.assert_array_equal(treeless.density(0, length), with_tree.density(0, length))
    assert schedule_layers(treeless) == schedule_layers(with_tree)
    again = parse_topology(spelled(treeless))
    assert (again.layers, again.dendrograms, again.sha256) == (treeless.layers, (), treeless.sha256)


SCATTERED = {"linkage": [[0, 2, 0.5, 2], [1, 3, 0.5, 2], [4, 5, 2.0, 4]]}


@pytest.mark.parametrize(
    ("beyond", "row"),
    [("window", [1, 0, 0, 0, 1, 1]), ("dense", [1, 1, 1, 1, 1, 1])],
)
def test_beyond_decides_what_rows_past_the_tree_see(beyond: str, row: list[int]) -> None:
    topology = topologies.build([[topologies.head(0, 5.0, 1, 2)]], [SCATTERED], num_blocks=4, beyond=beyond)
    assert topology.block_mask(0, 6)[0].astype(int).tolist()[5] == row
    assert topology.block_mask(0, 6)[0, :4, :4].sum() == 10


def test_beyond_error_refuses_longer_lengths_only() -> None:
    topology = topologies.build([[topologies.head(0, 0.5)]], [SCATTERED], num_blocks=4, beyond="error")
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    assert topology.block_mask(0, 4)[0].astype(int).tolist() == expected
    with pytest.raises(TopologyError) as caught:
        topology.block_mask(0, 5)
    assert str(caught.value) == (
        "block_mask: expected at most 4 blocks, which the topology covers (beyond: error), got 5; "
        'shorten the sequence, or set "beyond" to "window" or "dense"'
    )


def test_a_collapsed_topology_is_dense() -> None:
    for topology in (topologies.dense_topology(num_blocks=9), topologies.one_cluster_topology(num_blocks=9)):
        np.testing.assert_array_equal(topology.block_mask(0, 14)[0], np.tri(14, dtype=bool))


def test_the_random_builder_covers_every_kind_of_head() -> None:
    topology = topologies.random_topology(
        np.random.default_rng(0),
        num_layers=2,
        num_heads=13,
        num_kv_heads=1,
        head_dim=64,
        block_size=32,
        num_blocks=48,
        beyond="dense",
    )
    heads = [head for layer in topology.layers for head in layer]
    sparse = [head for head in heads if isinstance(head, SparseHead)]
    orders = [tree.leaf_order() for tree in topology.dendrograms]
    assert len(sparse) < len(heads)
    assert {head.dendrogram for head in sparse} == set(range(len(topology.dendrograms)))
    assert {order == tuple(range(48)) for order in orders} == {True, False}
    assert {0.0, topologies.HUGE_CUT} < {head.cut for head in sparse}
    assert len({head.sink for head in sparse}) > 2
    assert len({head.window for head in sparse}) > 2


# The canonical hash


def digest(document: dict[str, Any]) -> str:
    return parse_topology(json.dumps(document)).sha256


def reversed_keys(value: object) -> object:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


def test_the_hash_does_not_follow_the_spelling() -> None:
    document = topologies.example()
    expected = digest(document)
    assert parse_topology(json.dumps(document, indent=3)).sha256 == expected
    assert parse_topology(json.dumps(reversed_keys(document))).sha256 == expected
    del document["beyond"], document["model"]["weights_sha256"]
    assert digest(document) == expected
    document["dendrograms"][0]["linkage"] = [[0.0, 1.0, 1, 2.0], [2.0, 3.0, 2, 3.0]]
    document["layers"][0]["heads"][0]["cut"] = 1
    document["layers"][0]["heads"][3]["cut"] = -0.0
    assert digest(document) == expected


def test_the_hash_does_not_follow_the_provenance() -> None:
    document = topologies.example()
    document["provenance"] = {"text": "another", "nested": [1, {"deep": None}]}
    assert digest(document) == digest(topologies.example())


def test_the_hash_is_equal_for_paths_and_the_equal_linkage() -> None:
    topology = parse_topology(json.dumps(topologies.example()))
    document = topologies.example()
    document["dendrograms"][1] = {"linkage": topology.dendrograms[1].linkage}
    assert digest(document) == topology.sha256


def _set(*place: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        target: Any = document
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = to

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("model", "model_type", to="mistral"),
        _set("model", "num_key_value_heads", to=4),
        _set("model", "head_dim", to=64),
        _set("model", "weights_sha256", to="0" * 64),
        _set("block_size", to=32),
        _set("beyond", to="dense"),
        _set("dendrograms", 0, "linkage", 1, 2, to=2.5),
        _set("dendrograms", 1, "paths", 2, to=[1, 1]),
        _set("layers", 0, "heads", 0, "dendrogram", to=1),
        _set("layers", 0, "heads", 0, "cut", to=1.5),
        _set("layers", 0, "heads", 0, "sink", to=2),
        _set("layers", 0, "heads", 0, "window", to=3),
        _set("layers", 0, "heads", 0, to={"dense": True}),
        lambda document: document["layers"].reverse(),
    ],
)
def test_the_hash_follows_every_change_that_matters(change: Callable[[dict[str, Any]], None]) -> None:
    document = topologies.example()
    change(document)
    assert digest(document) != digest(topologies.example())


@given(strategies.documents())
def test_the_canonical_text_is_read_as_the_same_topology(document: dict[str, Any]) -> None:
    topology = parse_topology(json.dumps(document))
    again = parse_topology(topology.canonical())
    assert again == topology
    assert again.sha256 == topology.sha256
