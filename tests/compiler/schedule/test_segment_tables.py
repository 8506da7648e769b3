"""Segment tables for tiles of queries and for decoding, and their decision trees, against the definition."""

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import topologies
from strategies import checked_topologies
from surgeon.compiler.kernels.gpu.decision_tree import Leaf, Tree
from surgeon.compiler.kernels.gpu.segment_trees import Place, SegmentTrees, num_leaves, segment_trees
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.schedule.segment_tables import decode_table, prefill_table
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.schedule import UNBOUNDED
from surgeon.runtime.package.segment_table import SegmentTable

Value = TypeVar("Value")
Segments = list[tuple[int, int, int]]
TILES = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (4, 2, 1), (8, 4, 1), (1, 1, 2), (2, 1, 2), (4, 4, 2)]
"""The rows of blocks, the blocks of a unit, and the heads of a program."""


def from_table(table: SegmentTable, head: int, row: int, own: int) -> tuple[Segments, int]:
    """The segments of a row of tiles, and the number that all see, read as a kernel reads them."""
    first, middle, end = table.plans[table.rows[head, min(row, table.rows.shape[1] - 1)]].tolist()
    segments = [
        (begin + own * (follows & 1), end + own * (follows >> 1), readers)
        for begin, end, follows, readers in table.segments[first:end].tolist()
    ]
    return segments, middle - first


def from_trees(trees: SegmentTrees, head: int, row: int, own: int) -> tuple[Segments, int]:
    """The same from decision trees, deciding as a kernel does."""
    pattern = decide(trees.pattern, head=head)
    plan = decide(trees.plan, pattern=pattern, row=row)
    segments: Segments = []
    shared = None
    length, end = 0, at(plan.shared, own) + at(plan.masked, own)
    while length < end:
        if length == at(plan.shared, own):
            shared = len(segments)
        leaf = decide(trees.segment, segment=plan.first_segment + len(segments))
        segments.append((at(leaf.begin, own), at(leaf.end, own), leaf.readers))
        length += segments[-1][1] - segments[-1][0]
    assert length == end
    assert shared is not None  # the tile's own keys are never among them
    return segments, shared


def decide(tree: Tree[Value], **variables: int) -> Value:
    while not isinstance(tree, Leaf):
        tree = tree.below if variables[tree.variable] < tree.bound else tree.above
    return tree.value


def at(place: Place, own: int) -> int:
    return place.offset + place.times * own


def visible(
    segments: Segments, shared: int, rows: int, blocks: int, heads: int, row: int, num_blocks: int
) -> npt.NDArray[np.bool_]:
    """The blocks that a tile reads for each of its heads and rows, with causality, `[heads, rows, num_blocks]`."""
    own = row * rows // blocks
    seen = np.zeros((heads * rows, num_blocks), dtype=np.bool_)
    everyone = (1 << heads * rows * blocks) - 1
    places = [place for begin, end, _ in segments for place in range(begin, end)]
    assert len(set(places)) == len(places), "a unit is read twice"
    for number, (begin, end, readers) in enumerate(segments):
        assert 0 <= begin < end <= own + rows // blocks
        assert -(2**31) <= readers < 2**31
        assert readers != 0
        if number < shared:
            assert readers & everyone == everyone
            assert end <= own
        for reader in range(heads * rows):
            for block in range(blocks):
                if readers >> reader * blocks + block & 1:
                    seen[reader, begin * blocks + block : end * blocks : blocks] = True
    causal = np.arange(num_blocks) <= row * rows + np.arange(rows)[:, None]
    return seen.reshape(heads, rows, num_blocks) & causal


def check(topology: Topology, rows: int, blocks: int, heads: int, num_tiles: int) -> None:
    num_blocks = num_tiles * rows
    limit = topology.num_blocks if topology.beyond == "error" else UNBOUNDED
    for index, layer in enumerate(schedule_layers(topology)[:2]):
        if not layer.heads:  # not covered, and so without a kernel
            continue
        table = prefill_table(layer, rows, blocks, heads)
        trees = segment_trees(table, range(len(table.rows)))
        expected = topology.block_mask(index, min(num_blocks, limit))
        for group in range(len(layer.heads) // heads):
            for row in range(num_tiles):
                own = row * rows // blocks
                read, shared = from_table(table, group, row, own)
                assert from_trees(trees, group, row, own) == (read, shared)
                found = visible(read, shared, rows, blocks, heads, row, num_blocks)
                own_heads = slice(group * heads, (group + 1) * heads)
                there = expected[own_heads, row * rows : (row + 1) * rows]  # fewer where the topology refuses the rest
                np.testing.assert_array_equal(found[:, : there.shape[1], : there.shape[2]], there)


@pytest.mark.parametrize(("rows", "blocks", "heads"), TILES)
@pytest.mark.parametrize("beyond", ["window", "dense", "error"])
def test_tiles_read_what_the_definition_says_and_nothing_twice(rows: int, blocks: int, heads: int, beyond: str) -> None:
    topology = topologies.random_topology(
        np.random.default_rng(rows + 10 * blocks),
        num_layers=1,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        block_size=16,
        num_blocks=21,
        beyond=beyond,
    )
    check(topology, rows, blocks, heads, num_tiles=-(-21 // rows) + (0 if beyond == "error" else 2))


@settings(max_examples=40)
@given(checked_topologies(max_blocks=9), st.sampled_from(TILES))
def test_any_topology(topology: Topology, tile: tuple[int, int, int]) -> None:
    rows, blocks, heads = tile
    if topology.model.num_attention_heads % heads:
        heads = 1
    beyond = 0 if topology.beyond == "error" else topology.num_blocks // 2 + 2 * rows
    check(topology, rows, blocks, heads, num_tiles=-(-(topology.num_blocks + beyond) // rows))


def test_a_window_is_a_few_segments_that_move_with_the_tile() -> None:
    (layer,) = schedule_layers(topologies.window_topology([4], sink=2, num_blocks=8))
    table = prefill_table(layer, rows=2, blocks=1)
    segments, shared = from_table(table, 0, 20, 40)
    assert segments == [(0, 2, 3), (38, 40, 3), (37, 38, 1), (40, 42, 3)]
    assert shared == 2


def test_heads_of_a_program_share_what_both_see() -> None:
    (layer,) = schedule_layers(topologies.window_topology([2, 4], sink=2, num_blocks=8))
    segments, shared = from_table(prefill_table(layer, rows=1, blocks=1, heads=2), 0, 20, 20)
    assert segments == [(0, 2, 3), (19, 20, 3), (17, 19, 2), (20, 21, 3)]
    assert shared == 2


def test_the_table_does_not_grow_with_the_length() -> None:
    small, large = (
        prefill_table(schedule_layers(topologies.window_topology([2, 5, 30], num_blocks=blocks))[0], 4, 2)
        for blocks in (64, 1024)
    )
    assert np.array_equal(small.rows, large.rows)
    assert np.array_equal(small.segments, large.segments)


def test_leaves_are_counted() -> None:
    (layer,) = schedule_layers(topologies.window_topology([4, 4], sink=2, num_blocks=8))
    table = prefill_table(layer, rows=2, blocks=1)
    assert table.rows.tolist() == [[0, 1, 1, 2]] * 2
    assert num_leaves(table, 0) == num_leaves(table, 1) == 3 + len(table.segments)


# Decoding


def decoding_mask(table: SegmentTable, kv_head: int, row: int, group: int) -> np.ndarray:
    """The blocks up to the diagonal that a row reads for each head of a group, as a kernel follows the table."""
    plan = table.plans[table.rows[kv_head, min(row, table.rows.shape[1] - 1)]]
    mask = np.zeros((group, row + 1), dtype=bool)
    previous = 0
    for begin, end, follows, heads in table.segments[plan[0] : plan[2]].tolist():
        begin += row * (follows & 1)
        end += row * (follows >> 1)
        assert previous <= begin < end <= row + 1
        previous = end
        for head in range(group):
            mask[head, begin:end] |= bool(heads >> head & 1)
        assert 0 < heads < 1 << group
    assert previous == row + 1
    return mask


def check_decoding(topology: Topology, rows: int) -> None:
    group = topology.model.num_attention_heads // topology.model.num_key_value_heads
    for layer, schedule in enumerate(schedule_layers(topology)):
        table = decode_table(schedule)
        expected = topology.block_mask(layer, rows)
        for row in range(rows):
            for kv_head in range(topology.model.num_key_value_heads):
                heads = expected[kv_head * group : (kv_head + 1) * group, row, : row + 1]
                np.testing.assert_array_equal(decoding_mask(table, kv_head, row, group), heads)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (3, 1), (8, 2), (8, 1)])
def test_decoding_tables_give_what_the_topology_says(seed: int, num_heads: int, num_kv_heads: int) -> None:
    topology = topologies.random_topology(
        np.random.default_rng(seed),
        num_layers=3,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=32,
        block_size=16,
        num_blocks=23,
        beyond=["window", "dense"][seed % 2],
    )
    check_decoding(topology, rows=40)


def test_decoding_rows_that_the_topology_refuses_have_no_entry() -> None:
    heads = [topologies.DENSE, topologies.head(0, 1.0, 1, 2)]
    topology = topologies.build([heads], [{"linkage": topologies.balanced_tree(9)}], num_blocks=9, beyond="error")
    check_decoding(topology, rows=9)
    assert decode_table(schedule_layers(topology)[0]).rows.shape[1] <= 9


def test_windows_of_different_lengths_are_two_segments_that_follow_the_row() -> None:
    topology = topologies.window_topology([2, 4], sink=1, num_blocks=8)
    table = decode_table(schedule_layers(topology)[0])
    first, _, end = table.plans[table.rows[0, -1]]
    assert table.segments[first:end].tolist() == [[0, 1, 0, 3], [-3, -1, 3, 2], [-1, 1, 3, 3]]


def test_equal_decoding_rows_share_a_plan_and_the_length_changes_nothing() -> None:
    small, large = (
        decode_table(schedule_layers(topologies.window_topology([2, 5], num_blocks=blocks))[0]) for blocks in (16, 4096)
    )
    assert np.array_equal(small.rows, large.rows)
    assert np.array_equal(small.segments, large.segments)
