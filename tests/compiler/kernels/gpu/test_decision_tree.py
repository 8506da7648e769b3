"""Decision trees: equal to the schedule, and small."""

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest

import topologies
from surgeon.compiler.kernels.gpu.decision_tree import Leaf, Tree
from surgeon.compiler.kernels.gpu.prefill import head_groups
from surgeon.compiler.kernels.gpu.row_trees import ScheduleTrees, num_leaves, schedule_trees
from surgeon.compiler.schedule.schedule import schedule_layers

Value = TypeVar("Value")


def decide(tree: Tree[Value], **variables: int) -> Value:
    while not isinstance(tree, Leaf):
        tree = tree.below if variables[tree.variable] < tree.bound else tree.above
    return tree.value


def depth(tree: Tree[Value]) -> int:
    return 0 if isinstance(tree, Leaf) else 1 + max(depth(tree.below), depth(tree.above))


def leaves(tree: Tree[Value]) -> list[Value]:
    return [tree.value] if isinstance(tree, Leaf) else leaves(tree.below) + leaves(tree.above)


def expand(trees: ScheduleTrees, head: int, num_rows: int, block_size: int) -> npt.NDArray[np.int64]:
    """Counts how often a head's rows read each block, `[num_rows, num_rows]`, deciding as a kernel does."""
    reads = np.zeros((num_rows, num_rows), dtype=np.int64)
    pattern = decide(trees.pattern, head=head)
    for row in range(num_rows):
        plan = decide(trees.plan, pattern=pattern, row=row)
        for entry in range(plan.first_entry, plan.first_entry + plan.listed_keys, block_size):
            assert trees.shift is not None
            key = entry + decide(trees.shift, entry=entry)
            assert key % block_size == 0
            reads[row, key // block_size] += 1
        first = row * block_size - plan.last_run if plan.follows_row else plan.last_run
        assert first % block_size == 0
        reads[row, first // block_size : row + 1] += 1
    return reads


@pytest.mark.parametrize("beyond", ["window", "dense"])
@pytest.mark.parametrize("seed", range(6))
def test_trees_read_what_the_definition_says_and_nothing_twice(seed: int, beyond: str) -> None:
    topology = topologies.random_topology(
        np.random.default_rng(seed),
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        block_size=32,
        num_blocks=(1, 5, 23)[seed % 3],
        beyond=beyond,
    )
    for index, layer in enumerate(schedule_layers(topology)):
        trees = schedule_trees(layer)
        length = topology.num_blocks + 9
        mask = topology.block_mask(index, length)
        for head in range(6):
            np.testing.assert_array_equal(expand(trees, head, length, 32), mask[head].astype(np.int64))


def test_equal_heads_share_one_pattern() -> None:
    (layer,) = schedule_layers(topologies.window_topology([2, 5, 2, 2, 5, 1], sink=1))
    trees = schedule_trees(layer)
    assert [decide(trees.pattern, head=head) for head in range(6)] == [0, 1, 0, 0, 1, 2]
    assert trees.num_patterns == 3


def test_one_pattern_and_no_constant_runs_leave_nothing_to_decide() -> None:
    (layer,) = schedule_layers(topologies.dense_topology(num_heads=4))
    trees = schedule_trees(layer)
    assert isinstance(trees.pattern, Leaf)
    assert isinstance(trees.plan, Leaf)
    assert trees.shift is None
    assert trees.num_entries == 0


def test_patterns_with_equal_lists_share_their_entries() -> None:
    (layer,) = schedule_layers(topologies.window_topology([2, 3, 4], sink=1, block_size=64))
    trees = schedule_trees(layer)
    assert trees.num_entries == 64
    assert trees.shift == Leaf(0)


def test_rows_that_are_refused_are_not_decided() -> None:
    (bounded,) = schedule_layers(topologies.window_topology([2], sink=0, num_blocks=2, beyond="error"))
    (unbounded,) = schedule_layers(topologies.window_topology([2], sink=0, num_blocks=2, beyond="window"))
    assert len(leaves(schedule_trees(bounded).plan)) == 1  # rows 0 and 1 both read from block 0 on
    assert len(leaves(schedule_trees(unbounded).plan)) == 2


def test_depth_grows_with_the_logarithm_of_the_leaves() -> None:
    rng = np.random.default_rng(0)
    topology = topologies.build(
        [[topologies.head(0, 0.0, 1, 1)], [topologies.head(0, 8.0, 1, 1)]],
        [{"linkage": topologies.tree(200, rng, contiguous=False)}],
        num_blocks=200,
    )
    trees = schedule_trees(schedule_layers(topology)[1])
    assert trees.shift is not None
    for tree in (trees.plan, trees.shift):
        count = len(leaves(tree))
        assert count > 20
        assert depth(tree) <= int(np.ceil(np.log2(count)))


def test_heads_are_grouped_by_the_leaves_they_need() -> None:
    rng = np.random.default_rng(0)
    trees = [{"linkage": topologies.tree(40, rng, contiguous=False)} for _ in range(4)]
    heads = [topologies.head(index // 2, 3.0) for index in range(8)]
    layer = schedule_layers(topologies.build([heads], trees, num_blocks=40))[0]
    leaves = [num_leaves(schedule) for schedule in layer.heads]
    assert head_groups(layer, leaves, sum(leaves)) == (range(8),)
    assert head_groups(layer, leaves, max(leaves)) == (range(2), range(2, 4), range(4, 6), range(6, 8))
    assert head_groups(layer, leaves, 1) == head_groups(layer, leaves, max(leaves))  # equal heads cost nothing extra
    whole, part = schedule_trees(layer), schedule_trees(layer, range(2, 4))
    assert (whole.num_patterns, part.num_patterns) == (4, 1)
