"""Dendrograms against SciPy, and against the definition of digit paths."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist, squareform

import strategies
import topologies
from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.runtime.errors import TopologyError

many_blocks = strategies.linkages(min_blocks=2)


def from_linkage(rows: list[list[float]]) -> Dendrogram:
    return Dendrogram.from_linkage(rows, len(rows) + 1, "linkage")


@given(many_blocks)
def test_distances_are_scipys_cophenetic_distances(rows: list[list[float]]) -> None:
    np.testing.assert_array_equal(from_linkage(rows).distances(), squareform(hierarchy.cophenet(np.array(rows))))


@given(many_blocks, st.data())
def test_clusters_are_scipys_flat_clusters(rows: list[list[float]], data: st.DataObject) -> None:
    heights = [row[2] for row in rows]
    cut = data.draw(st.sampled_from([0.0, *heights]) | st.floats(0, max(heights) + 1))
    flat = hierarchy.fcluster(np.array(rows), cut, criterion="distance")
    expected = {tuple(np.flatnonzero(flat == number).tolist()) for number in set(flat.tolist())}
    clusters = from_linkage(rows).clusters(cut)
    assert set(clusters) == expected
    assert list(clusters) == sorted(clusters)


@given(many_blocks)
def test_leaf_order_is_scipys(rows: list[list[float]]) -> None:
    assert from_linkage(rows).leaf_order() == tuple(hierarchy.leaves_list(np.array(rows)).tolist())


@pytest.mark.parametrize("method", ["single", "complete", "average", "weighted", "ward"])
def test_a_linkage_made_by_scipy_is_taken_as_it_is(method: str) -> None:
    points = np.random.default_rng(0).normal(size=(60, 3))
    made = hierarchy.linkage(pdist(points), method)
    np.testing.assert_array_equal(
        from_linkage(made.tolist()).distances(), squareform(hierarchy.cophenet(made)), strict=True
    )


@given(strategies.dendrograms())
def test_distances_are_an_ultrametric(tree: Dendrogram) -> None:
    distances = tree.distances()
    assert not distances.diagonal().any()
    np.testing.assert_array_equal(distances, distances.T)
    # d(i,k) ≤ max(d(i,j), d(j,k)) for all i, j, k
    assert (distances[:, None, :] <= np.maximum(distances[:, :, None], distances[None, :, :])).all()


@given(strategies.dendrograms(max_blocks=10))
def test_a_distance_is_the_height_of_the_lowest_common_ancestor(tree: Dendrogram) -> None:
    distances = tree.distances()
    for first, second in itertools.product(range(tree.num_blocks), repeat=2):
        assert topologies.distance(tree, first, second) == distances[first, second]


@given(strategies.dendrograms(), st.floats(0, 5))
def test_clusters_are_the_pairs_within_the_cut(tree: Dendrogram, cut: float) -> None:
    together = np.zeros((tree.num_blocks, tree.num_blocks), dtype=bool)
    for cluster in tree.clusters(cut):
        together[np.ix_(cluster, cluster)] = True
    np.testing.assert_array_equal(together, tree.distances() <= cut)


@given(strategies.dendrograms(), st.floats(0, 5))
def test_the_leaf_order_has_every_block_once_and_clusters_in_one_stretch(tree: Dendrogram, cut: float) -> None:
    order = tree.leaf_order()
    assert sorted(order) == list(range(tree.num_blocks))
    for cluster in tree.clusters(cut):
        places = [order.index(block) for block in cluster]
        assert max(places) - min(places) + 1 == len(cluster)


@given(strategies.paths())
@example(([[]], 2))
@example(([[], [], []], 2))
@example(([[0, 1], [0, 1], [0, 0]], 2))
def test_a_distance_of_paths_is_the_depth_less_the_common_prefix(made: tuple[list[list[int]], int]) -> None:
    paths, arity = made
    tree = Dendrogram.from_paths(paths, arity, "paths")
    distances = tree.distances()
    for i, j in itertools.product(range(len(paths)), repeat=2):
        common = 0
        while common < len(paths[i]) and paths[i][common] == paths[j][common]:
            common += 1
        assert distances[i, j] == len(paths[i]) - common


@given(strategies.paths())
def test_the_linkage_of_paths_is_a_linkage(made: tuple[list[list[int]], int]) -> None:
    tree = Dendrogram.from_paths(*made, "paths")
    assert Dendrogram.from_linkage(tree.linkage, tree.num_blocks, "linkage") == tree


def test_a_node_with_many_children_becomes_merges_at_one_height() -> None:
    tree = Dendrogram.from_paths([[digit] for digit in (2, 0, 1, 0)], 3, "paths")
    assert tree.linkage == ((1, 3, 0.0, 2), (0, 4, 1.0, 3), (5, 2, 1.0, 4))


def test_one_block() -> None:
    tree = Dendrogram.from_linkage([], 1, "linkage")
    assert tree == Dendrogram.from_paths([[0, 1]], 2, "paths")
    assert tree.distances().tolist() == [[0.0]]
    assert tree.clusters(0.0) == ((0,),)
    assert tree.leaf_order() == (0,)


def test_a_chain_of_thousands_of_merges_is_no_recursion() -> None:
    number = 3000
    rows: list[list[float]] = [[0, 1, 1.0, 2]]
    rows += [[number + index - 1, index + 1, float(index + 1), index + 2] for index in range(1, number - 1)]
    tree = from_linkage(rows)
    assert tree.leaf_order() == tuple(range(number))
    assert tree.clusters(1000.0)[0] == tuple(range(1001))


def test_the_shared_builders_make_the_trees_they_promise() -> None:
    contiguous = from_linkage(topologies.tree(40, np.random.default_rng(1), contiguous=True))
    scattered = from_linkage(topologies.tree(40, np.random.default_rng(1), contiguous=False))
    assert contiguous.leaf_order() == tuple(range(40))
    assert scattered.leaf_order() != tuple(range(40))
    assert from_linkage(topologies.balanced_tree(8)).clusters(2) == ((0, 1, 2, 3), (4, 5, 6, 7))


@pytest.mark.parametrize(
    ("rows", "num_blocks", "text"),
    [
        (
            [[0, 1, 1, 2]],
            3,
            "linkage: expected 2 merges for 3 blocks, got 1; "
            "give one row for every merge, as scipy.cluster.hierarchy.linkage does",
        ),
        (
            [[0, 1, 1, 2], [0, 3, 2, 3]],
            3,
            "linkage[1]: expected nodes not merged before, got block 0 again; merge every node exactly once",
        ),
    ],
)
def test_an_error_names_the_place_that_it_was_given(rows: list[list[float]], num_blocks: int, text: str) -> None:
    with pytest.raises(TopologyError) as caught:
        Dendrogram.from_linkage(rows, num_blocks, "linkage")
    assert str(caught.value) == text
    with pytest.raises(TopologyError) as caught:
        Dendrogram.from_linkage(rows, num_blocks, "dendrograms[7].linkage")
    assert str(caught.value) == f"dendrograms[7].{text}"
