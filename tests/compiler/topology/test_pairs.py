"""Counted pairs of blocks and the densities made from them: exactly the mask's, without a mask."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import strategies
import topologies
from surgeon.compiler.learn.patterns.trees import interval_tree, residue_tree
from surgeon.compiler.topology.pairs import causal_pairs, cluster_pairs, window_pairs
from surgeon.compiler.topology.read import MAX_BLOCKS, MAX_HEADS, MAX_LAYERS
from surgeon.compiler.topology.topology import DenseHead, Head, SparseHead, Topology, mean_density
from surgeon.runtime.errors import TopologyError
from surgeon.runtime.package.manifest import ModelShape

SCATTERED = {"linkage": [[0, 2, 0.5, 2], [1, 3, 0.5, 2], [4, 5, 2.0, 4]]}


@given(st.data(), strategies.checked_topologies())
def test_a_density_is_exactly_that_of_the_mask(data: st.DataObject, topology: Topology) -> None:
    most = topology.num_blocks if topology.beyond == "error" else 3 * topology.num_blocks + 15
    length = data.draw(st.integers(1, most))
    total = Fraction(0)
    for layer, heads in enumerate(topology.layers):
        rows = topology.block_mask(layer, length).sum(axis=2)
        hidden = np.arange(1, length + 1) - rows
        routes = np.array([getattr(head, "route", 0) for head in heads])
        pairs = (rows + np.minimum(hidden, routes[:, None])).sum(axis=1).tolist()
        assert [topology.visible_pairs(head, length) for head in heads] == pairs
        assert topology.density(layer, length).tolist() == [found / causal_pairs(length) for found in pairs]
        total += sum(pairs)
    heads_in_all = sum(map(len, topology.layers))
    assert mean_density(topology, length) == float(total / (heads_in_all * causal_pairs(length)))


@pytest.mark.parametrize("beyond", ["window", "dense", "error"])
def test_large_trees_are_counted_exactly(beyond: str) -> None:
    shape = {"num_layers": 2, "num_heads": 14, "num_kv_heads": 7, "num_blocks": 301}
    topology = topologies.random_topology(np.random.default_rng(0), **shape, beyond=beyond)
    for length in (300, 301) if beyond == "error" else (300, 301, 350):
        for layer in range(2):
            expected = topology.block_mask(layer, length).sum(axis=(1, 2)) / causal_pairs(length)
            np.testing.assert_array_equal(topology.density(layer, length), expected)


def test_a_density_at_its_own_length_and_beyond_it() -> None:
    heads = [topologies.DENSE, topologies.head(), topologies.head(0, 0.5), topologies.head(0, 0.0, 1, 2)]
    topology = topologies.build([heads, []], [SCATTERED], num_blocks=4)
    np.testing.assert_allclose(topology.density(0), [1.0, 4 / 10, 6 / 10, 9 / 10])
    np.testing.assert_allclose(topology.density(0, 6), [1.0, 6 / 21, 8 / 21, 15 / 21])
    assert topology.density(1).shape == (0,)
    assert mean_density(topology) == 29 / 40


def test_a_length_that_the_topology_refuses_has_no_density() -> None:
    topology = topologies.window_topology([2], beyond="error")
    for count in (lambda: topology.density(0, 9), lambda: mean_density(topology, 9)):
        with pytest.raises(TopologyError, match=r"density: expected at most 8 blocks, .*, got 9"):
            count()


def test_at_the_limits_of_the_format_it_needs_little_memory() -> None:
    """512 layers of 512 heads over 16,384 blocks, whose masks would take 137 GB per layer."""
    trees = (interval_tree(MAX_BLOCKS), residue_tree(MAX_BLOCKS, 2))
    few = [SparseHead(index % 2, float(index % 16), index % 5, 1 + index * 32) for index in range(MAX_HEADS - 1)]
    layer: tuple[Head, ...] = (DenseHead(), *few)
    model = ModelShape("llama", MAX_LAYERS, MAX_HEADS, MAX_HEADS, 64, None)
    topology = Topology(model, 16, MAX_BLOCKS, trees, (layer,) * MAX_LAYERS, "window", {})
    tracemalloc.start()
    density = topology.density(0)
    mean = mean_density(topology)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20
    assert mean == pytest.approx(density.mean(), rel=1e-12)
    for height in (0, 3, 14):  # whole subtrees of 2^height blocks
        found = cluster_pairs(MAX_BLOCKS, 0, 1, trees[0], float(height)) + window_pairs(MAX_BLOCKS, 0, 1)
        assert found == MAX_BLOCKS // 2**height * causal_pairs(2**height)
