"""Topologies for tests, made as JSON documents and read by parse_topology, so that each one is checked."""

import json
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import numpy as np

from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.compiler.topology.read import parse_topology
from surgeon.compiler.topology.topology import Topology

DENSE = {"dense": True}
HUGE_CUT = 1e9
NUM_BLOCKS = 8


class Shape(TypedDict, total=False):
    """The settings that all heads of a topology share; `document` gives the default of each."""

    num_kv_heads: int
    head_dim: int
    block_size: int
    num_blocks: int
    beyond: str


def head(dendrogram: int = 0, cut: float = 0.0, sink: int = 0, window: int = 1, route: int = 0) -> dict[str, Any]:
    """A sparse head; by default it sees only its own block."""
    return {"dendrogram": dendrogram, "cut": cut, **window_head(sink, window, route)}


def window_head(sink: int = 0, window: int = 1, route: int = 0) -> dict[str, Any]:
    """A head without a tree."""
    return {"sink": sink, "window": window, **({"route": route} if route else {})}


def router(layers: Sequence[Sequence[dict[str, Any]]], num_kv_heads: int, head_dim: int) -> dict[str, Any]:
    """A router for random normal keys, whose numbers differ by layer, KV head and channel."""
    rng = np.random.default_rng(0)
    shape = (num_kv_heads, head_dim)
    return {
        "node": 8,
        "tile": 16,
        "layers": [
            {"centre": rng.normal(0, 0.3, shape).tolist(), "scale": rng.uniform(1.5, 3.5, shape).tolist()}
            if any(head.get("route") for head in heads)
            else None
            for heads in layers
        ],
    }


def tree(num_blocks: int, rng: np.random.Generator, contiguous: bool) -> list[list[float]]:
    """Linkage rows of a random binary tree with ties; merges neighbours or, if not contiguous, any two nodes."""
    nodes = [(block, 1) for block in range(num_blocks)]
    rows: list[list[float]] = []
    height = 0.0
    while len(nodes) > 1:
        height += float(rng.choice([0.0, 0.25, 1.0]))
        if contiguous:
            left = int(rng.integers(len(nodes) - 1))
            right = left + 1
        else:
            left, right = sorted(rng.choice(len(nodes), size=2, replace=False).tolist())
        count = nodes[left][1] + nodes[right][1]
        rows.append([nodes[left][0], nodes[right][0], height, count])
        nodes[left] = (num_blocks + len(rows) - 1, count)
        del nodes[right]
    return rows


def balanced_tree(num_blocks: int) -> list[list[float]]:
    """Linkage rows of the tree over equal contiguous halves; node heights count the levels from the blocks."""
    nodes = [(block, 1) for block in range(num_blocks)]
    rows: list[list[float]] = []
    height = 0
    while len(nodes) > 1:
        height += 1
        above = []
        for (left, left_count), (right, right_count) in zip(nodes[::2], nodes[1::2], strict=False):
            rows.append([left, right, height, left_count + right_count])
            above.append((num_blocks + len(rows) - 1, left_count + right_count))
        nodes = above + nodes[2 * len(above) :]
    return rows


def distance(tree: Dendrogram, first: int, second: int) -> float:
    """The height of two blocks' lowest common ancestor, found by walking up from both; 0 for a block and itself."""
    above = {child: tree.num_blocks + row for row, merge in enumerate(tree.linkage) for child in merge[:2]}
    path = [first]
    while path[-1] in above:
        path.append(above[path[-1]])
    node = second
    while node not in path:
        node = above[node]
    return tree.linkage[node - tree.num_blocks][2] if node >= tree.num_blocks else 0.0


def paths(num_blocks: int, arity: int, depth: int, rng: np.random.Generator) -> list[list[int]]:
    """Random digits, one row a block; clusters are not contiguous and some paths may be equal."""
    digits: list[list[int]] = rng.integers(arity, size=(num_blocks, depth)).tolist()
    return digits


def document(
    layers: Sequence[Sequence[dict[str, Any]]],
    dendrograms: Sequence[dict[str, Any]] = (),
    *,
    num_kv_heads: int = 1,
    head_dim: int = 32,
    block_size: int = 64,
    num_blocks: int = NUM_BLOCKS,
    beyond: str = "window",
) -> dict[str, Any]:
    """The object of a topology.json whose `layers` are lists of heads, empty for layers that are not covered."""
    routed = any(head.get("route") for heads in layers for head in heads)
    return {
        "format": "surgeon.topology",
        "version": 2 if routed else 1,
        "model": {
            "model_type": "llama",
            "num_hidden_layers": len(layers),
            "num_attention_heads": max(map(len, layers)),
            "num_key_value_heads": num_kv_heads,
            "head_dim": head_dim,
            "weights_sha256": None,
        },
        "block_size": block_size,
        "num_blocks": num_blocks,
        "dendrograms": [dict(tree) for tree in dendrograms],
        "layers": [{"heads": [dict(head) for head in heads]} if heads else None for heads in layers],
        "beyond": beyond,
        "provenance": {},
        **({"router": router(layers, num_kv_heads, head_dim)} if routed else {}),
    }


def build(
    layers: Sequence[Sequence[dict[str, Any]]], dendrograms: Sequence[dict[str, Any]] = (), **shape: Unpack[Shape]
) -> Topology:
    """The checked topology of `document`, which takes the same arguments."""
    return parse_topology(json.dumps(document(layers, dendrograms, **shape)))


def example() -> dict[str, Any]:
    """A small valid document with both kinds of heads and both kinds of trees."""
    heads = [head(0, 1.0, 1, 2), DENSE, head(1, 2.0), head()]
    trees: list[dict[str, Any]] = [
        {"linkage": [[0, 1, 1.0, 2], [2, 3, 2.0, 3]]},
        {"paths": [[0, 1], [1, 0], [0, 0]], "arity": 2},
    ]
    return document([heads, heads[::-1]], trees, num_kv_heads=2, num_blocks=3)


def routed_example() -> dict[str, Any]:
    """A small valid document of version 2: both kinds of routed heads, and a layer without any."""
    trees = [{"linkage": [[0, 1, 1.0, 2], [2, 3, 2.0, 3]]}]
    layers = [[window_head(1, 1, route=2), head(0, 1.0, route=1)], [window_head(1, 1), DENSE]]
    return document(layers, trees, num_kv_heads=2, num_blocks=3, head_dim=3)


def random_topology(
    rng: np.random.Generator,
    *,
    num_layers: int,
    num_heads: int,
    num_blocks: int,
    **shape: Unpack[Shape],
) -> Topology:
    """Mixes all kinds of heads: dense, singletons, one cluster, windows, and cuts of binary and p-ary trees.

    The trees are contiguous and scattered, and there are several sinks and windows. No kind is repeated before every
    kind has appeared.
    """
    trees: list[dict[str, Any]] = [
        {"linkage": tree(num_blocks, rng, contiguous=True)},
        {"linkage": tree(num_blocks, rng, contiguous=False)},
        {"paths": paths(num_blocks, 2, 4, rng), "arity": 2},
        {"paths": sorted(paths(num_blocks, 3, 3, rng)), "arity": 3},
        {"paths": paths(num_blocks, 5, 2, rng), "arity": 5},
    ]
    kinds = [-1, *range(len(trees)), -2, *range(len(trees)), -3]
    heads: list[dict[str, Any]] = []
    order: list[int] = []
    while len(heads) < num_layers * num_heads:
        order = order or rng.permutation(kinds).tolist()
        kind = order.pop()
        sink, window = int(rng.integers(4)), int(rng.choice([1, 1, 1, 2, 3, 6]))
        if kind == -1:
            heads.append(DENSE)
        elif kind == -2:
            heads.append(head(int(rng.integers(len(trees))), 0.0, sink, window))
        elif kind == -3:
            heads.append(head(int(rng.integers(len(trees))), HUGE_CUT, sink, window))
        else:
            heads.append(head(kind, _random_cut(trees[kind], rng), sink, window))
    layers = [heads[begin : begin + num_heads] for begin in range(0, len(heads), num_heads)]
    return build(layers, trees, num_blocks=num_blocks, **shape)


def _random_cut(tree: dict[str, Any], rng: np.random.Generator) -> float:
    """One of the tree's heights or 0, with low ones more likely, since high cuts see nearly everything."""
    if "paths" in tree:
        return float(min(rng.integers(len(tree["paths"][0]) + 1, size=2)))
    return float(min(rng.choice([0.0, *(row[2] for row in tree["linkage"])], size=2)))


def window_topology(windows: Sequence[int], *, sink: int = 1, num_layers: int = 1, **shape: Unpack[Shape]) -> Topology:
    """Heads with sink and window but no clusters, one for each entry of `windows`, equal in all layers."""
    return _equal_layers([head(0, 0.0, sink, window) for window in windows], num_layers, shape)


def dense_topology(*, num_layers: int = 1, num_heads: int = 1, **shape: Unpack[Shape]) -> Topology:
    """A topology whose heads are all dense, which is the model itself."""
    return build([[DENSE] * num_heads] * num_layers, **shape)


def one_cluster_topology(*, num_layers: int = 1, num_heads: int = 1, **shape: Unpack[Shape]) -> Topology:
    """A topology with every cut above the root: dense up to num_blocks through the tree, then through `beyond`."""
    return _equal_layers([head(0, HUGE_CUT)] * num_heads, num_layers, Shape(beyond="dense") | shape)


def _equal_layers(heads: Sequence[dict[str, Any]], num_layers: int, shape: Shape) -> Topology:
    """A topology with the same heads in all layers, over one balanced tree."""
    linkage = balanced_tree(shape.get("num_blocks", NUM_BLOCKS))
    return build([heads] * num_layers, [{"linkage": linkage}], **shape)
