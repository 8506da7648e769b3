"""Hypothesis strategies for trees and topologies, which shrink in every part."""

import json
from typing import Any

from hypothesis import strategies as st

import topologies
from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.compiler.topology.read import parse_topology
from surgeon.compiler.topology.topology import Topology


@st.composite
def linkages(draw: st.DrawFn, min_blocks: int = 1, max_blocks: int = 20) -> list[list[float]]:
    """Linkage rows with ties, with contiguous or scattered clusters, in any order that puts children first."""
    num_blocks = draw(st.integers(min_blocks, max_blocks))
    contiguous = draw(st.booleans())
    nodes = [(block, 1, 0.0) for block in range(num_blocks)]
    rows: list[list[float]] = []
    while len(nodes) > 1:
        first = draw(st.integers(0, len(nodes) - 2))
        second = first + 1 if contiguous else draw(st.integers(first + 1, len(nodes) - 1))
        (left, left_count, left_height), (right, right_count, right_height) = nodes[first], nodes[second]
        height = max(left_height, right_height) + draw(st.sampled_from([0.0, 1.0, 0.3]))
        rows.append([left, right, height, left_count + right_count])
        nodes[first] = (num_blocks + len(rows) - 1, left_count + right_count, height)
        del nodes[second]
    return rows


@st.composite
def paths(draw: st.DrawFn, num_blocks: int | None = None) -> tuple[list[list[int]], int]:
    """Digit paths, some possibly equal, and their arity."""
    arity = draw(st.integers(2, 5))
    depth = draw(st.integers(0, 4))
    digits = st.lists(st.integers(0, arity - 1), min_size=depth, max_size=depth)
    size = draw(st.integers(1, 20)) if num_blocks is None else num_blocks
    return draw(st.lists(digits, min_size=size, max_size=size)), arity


@st.composite
def dendrograms(draw: st.DrawFn, max_blocks: int = 20) -> Dendrogram:
    """Trees from linkages and from paths."""
    if draw(st.booleans()):
        digits, arity = draw(paths())
        return Dendrogram.from_paths(digits, arity, "paths")
    rows = draw(linkages(max_blocks=max_blocks))
    return Dendrogram.from_linkage(rows, len(rows) + 1, "linkage")


@st.composite
def documents(draw: st.DrawFn, max_blocks: int = 16, routed: bool = True) -> dict[str, Any]:
    """Objects of valid topology files: every kind of head, tree and `beyond`, with all layers covered or only some.

    With `routed`, about half of them may have routed heads.
    """
    trees: list[dict[str, Any]] = [{"linkage": draw(linkages(max_blocks=max_blocks))}]
    num_blocks = len(trees[0]["linkage"]) + 1
    for _ in range(draw(st.integers(0, 2))):
        if draw(st.booleans()):
            digits, arity = draw(paths(num_blocks))
            trees.append({"paths": digits, "arity": arity})
        else:
            trees.append({"linkage": draw(linkages(num_blocks, num_blocks))})
    near_length = st.integers(0, num_blocks + 4)
    routes = st.integers(0, 3) | near_length if routed and draw(st.booleans()) else st.just(0)
    sparse_heads = st.builds(
        topologies.head,
        st.integers(0, len(trees) - 1),
        st.sampled_from([0.0, 0.3, 1.0, 2.0, topologies.HUGE_CUT]),
        st.integers(0, 2) | near_length,
        st.integers(1, 3) | near_length.map(lambda length: length + 1),
        routes,
    )
    group, num_kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    num_heads = group * num_kv_heads
    window_heads = st.builds(topologies.window_head, near_length, near_length.map(lambda length: length + 1), routes)
    heads = st.lists(sparse_heads | window_heads | st.just(topologies.DENSE), min_size=num_heads, max_size=num_heads)
    return topologies.document(
        draw(st.lists(heads | st.just([]), min_size=1, max_size=3).filter(any)),
        trees,
        num_kv_heads=num_kv_heads,
        num_blocks=num_blocks,
        beyond=draw(st.sampled_from(["window", "dense", "error"])),
    )


def checked_topologies(max_blocks: int = 16) -> st.SearchStrategy[Topology]:
    """The topologies of `documents`."""
    return documents(max_blocks).map(lambda document: parse_topology(json.dumps(document)))


@st.composite
def topologies_and_lengths(draw: st.DrawFn, max_blocks: int = 16) -> tuple[Topology, int]:
    """A topology and a length in blocks: below, at or beyond its own, and beyond where its sinks and windows meet."""
    topology = draw(checked_topologies(max_blocks))
    most = topology.num_blocks if topology.beyond == "error" else 3 * topology.num_blocks + 15
    return topology, draw(st.integers(1, most) | st.just(topology.num_blocks) | st.just(most))
