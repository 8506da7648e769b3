"""Topologies made by learning: building them, scaling them to other lengths, and writing them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgeon.compiler.learn.patterns.pattern import Grid, Pattern
from surgeon.compiler.system.atomic_files import write_file
from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.compiler.topology.read import parse_topology
from surgeon.compiler.topology.topology import DenseHead, Head, SparseHead, Topology, WindowHead
from surgeon.compiler.topology.write import spelled
from surgeon.runtime.errors import TopologyError
from surgeon.runtime.package.manifest import ModelShape


def pattern_topology(model: ModelShape, grid: Grid, pattern: Pattern, provenance: Mapping[str, Any]) -> Topology:
    """Builds the topology of a learned pattern. Equal trees are shared; a head without a cut has none."""
    trees: dict[Dendrogram, int] = {}

    def head(layer: int, index: int) -> Head:
        cut, window = pattern.cuts.get((layer, index)), int(pattern.windows[layer, index])
        if cut is None:
            return WindowHead(grid.sink, window)
        return SparseHead(trees.setdefault(cut.tree, len(trees)), cut.height, grid.sink, window)

    layers = tuple(tuple(head(layer, index) for index in range(len(row))) for layer, row in enumerate(pattern.windows))
    return Topology(model, grid.block_size, grid.blocks, tuple(trees), layers, "window", provenance)


def scaled(topology: Topology, blocks: int) -> Topology:
    """Scales a topology to sequences of `blocks` blocks: windows scale with the length, sinks stay the same.

    Measured: windows learned at one length keep their gain over equal windows at other lengths.

    Raises:
        TopologyError: a head has clusters, which are tied to the positions that they were learned on.
    """
    factor = blocks / topology.num_blocks

    def head(present: Head, where: str) -> Head:
        if isinstance(present, DenseHead):
            return present
        window = max(1, min(blocks, round(present.window * factor)))
        if isinstance(present, WindowHead):
            return dataclasses.replace(present, window=window)
        if len(topology.dendrograms[present.dendrogram].clusters(present.cut)) < topology.num_blocks:
            raise TopologyError(
                f"{where}.cut",
                "clusters of single blocks, so that the topology can be scaled",
                str(present.cut),
                "learn for this length",
            )
        return WindowHead(present.sink, window)

    layers = tuple(
        tuple(head(present, f"layers[{layer}].heads[{index}]") for index, present in enumerate(heads))
        for layer, heads in enumerate(topology.layers)
    )
    return dataclasses.replace(topology, num_blocks=blocks, dendrograms=(), layers=layers)


def write_topology(topology: Topology, file: Path) -> None:
    """Checks a topology as its reader will, writes it to a temporary file, and renames that into place.

    Raises:
        TopologyError: it violates the format.
    """
    text = spelled(topology)
    parse_topology(text)
    write_file(file, text)
