"""Topologies made by learning: written, read again, scaled."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from models import sparse_topology
from surgeon.compiler.learn.patterns.pattern import Cut, Grid, Pattern
from surgeon.compiler.learn.patterns.to_topology import pattern_topology, scaled, write_topology
from surgeon.compiler.learn.patterns.trees import residue_tree
from surgeon.compiler.topology.read import parse_topology, read_topology
from surgeon.compiler.topology.topology import SparseHead, Topology, WindowHead
from surgeon.compiler.topology.write import spelled
from surgeon.runtime.errors import TopologyError
from surgeon.runtime.package.manifest import ModelShape
from topologies import window_topology


def made(blocks: int = 8) -> Topology:
    shape = ModelShape("llama", 2, 2, 1, 32, None)
    pattern = Pattern(np.array([[1, 3], [8, 2]]))
    return pattern_topology(shape, Grid(64, blocks, 1, 0.5), pattern, {"method": "budget", "rounds": [1, 2]})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_topology(made(), tmp_path / "t.json")
    found = read_topology(tmp_path / "t.json")
    assert found.sha256 == made().sha256
    assert found.provenance == made().provenance
    assert [file.name for file in tmp_path.iterdir()] == ["t.json"]


def test_what_breaks_the_format_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="block_size"):
        write_topology(dataclasses.replace(made(), block_size=17), tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocks", [4, 12, 16, 17])
def test_windows_scale_and_sinks_stay(blocks: int) -> None:
    heads = [head for layer in scaled(made(), blocks).layers for head in layer]
    assert [head.sink for head in heads if isinstance(head, WindowHead)] == [1] * 4
    expected = [max(1, round(window * blocks / 8)) for window in (1, 3, 8, 2)]
    assert [head.window for head in heads if isinstance(head, WindowHead)] == expected
    assert parse_topology(spelled(scaled(made(), blocks))).num_blocks == blocks


def test_a_topology_with_clusters_is_not_scaled() -> None:
    with pytest.raises(TopologyError, match=r"layers\[0\].heads\[2\].cut: expected clusters of single blocks"):
        scaled(sparse_topology(), 8)


def test_only_heads_with_clusters_have_a_tree() -> None:
    assert made().dendrograms == ()
    cut = Cut(residue_tree(8, 2), 1.0)
    pattern = Pattern(np.array([[1, 3], [8, 2]]), {(1, 0): cut})
    topology = pattern_topology(made().model, Grid(64, 8, 1, 0.5), pattern, {})
    assert topology.dendrograms == (cut.tree,)
    assert topology.layers == ((WindowHead(1, 1), WindowHead(1, 3)), (SparseHead(0, 1.0, 1, 8), WindowHead(1, 2)))


def test_a_cut_that_leaves_single_blocks_is_scaled_to_a_window() -> None:
    assert scaled(window_topology([2], num_blocks=8), 16).layers == ((WindowHead(1, 4),),)


def test_a_layer_that_is_not_covered_stays_so() -> None:
    bare = dataclasses.replace(made(), layers=(made().layers[0], ()))
    assert parse_topology(spelled(bare)).sha256 == bare.sha256
    assert scaled(bare, 16).covered == (0,)
