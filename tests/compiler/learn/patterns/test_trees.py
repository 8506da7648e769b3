"""The trees that clusters may come from."""

import numpy as np
import pytest

from surgeon.compiler.learn.patterns.trees import cuts_of, interval_tree, learned_tree, residue_tree
from surgeon.compiler.topology.dendrogram import Dendrogram
from topologies import balanced_tree


def ultrametric(tree: Dendrogram) -> bool:
    d = tree.distances()
    return bool((d[:, None, :] <= np.maximum(d[:, :, None], d[None, :, :]) + 1e-12).all())


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 8, 32])
def test_the_tree_is_one_of_intervals(blocks: int) -> None:
    tree = interval_tree(blocks)
    assert [list(row) for row in tree.linkage] == balanced_tree(blocks)
    assert tree.clusters(0.0) == tuple((block,) for block in range(blocks))


@pytest.mark.parametrize(("blocks", "prime"), [(8, 2), (10, 3), (32, 5)])
def test_the_residue_tree_measures_differences_p_adically(blocks: int, prime: int) -> None:
    tree = residue_tree(blocks, prime)
    d = tree.distances()
    depth = round(d.max())
    for i in range(blocks):
        for j in range(i):
            power = next(power for power in range(depth, -1, -1) if (i - j) % prime**power == 0)
            assert d[i, j] == depth - power


def test_the_learned_tree_joins_first_the_blocks_that_gain_most_from_each_other() -> None:
    rng = np.random.default_rng(0)
    gains = np.tril(rng.random((9, 9)), -1)
    for i, j in ((7, 2), (5, 3)):
        gains[i, j] = 5.0
    tree = learned_tree(gains + np.triu(np.full((9, 9), 99.0)))  # gains on and above the diagonal do not count
    assert {tuple(sorted(row[:2])) for row in tree.linkage[:2]} == {(2, 7), (3, 5)}
    assert Dendrogram.from_linkage([list(row) for row in tree.linkage], 9, "t") == tree
    assert ultrametric(tree)


def test_cuts_are_heights_that_make_other_clusters_from_fine_to_coarse() -> None:
    tree = interval_tree(32)
    assert list(cuts_of(tree, 9)) == [1.0, 2.0, 3.0, 4.0]
    assert list(cuts_of(tree, 2)) == [1.0, 4.0]
    sizes = [len(tree.clusters(cut)) for cut in cuts_of(tree, 9)]
    assert sizes == [16, 8, 4, 2]
    assert list(cuts_of(interval_tree(2), 4)) == []
