"""Decode tables against the definition of visibility."""

import numpy as np
import pytest

import topologies
from surgeon.compiler.schedule.decode_table import decode_table
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.schedule.segments import SegmentTable
from surgeon.compiler.topology.topology import Topology


def expanded(table: SegmentTable, kv_head: int, row: int, group: int) -> np.ndarray:
    """Which blocks up to the diagonal a row reads for each head of a group, as a kernel that follows the table does."""
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


def check(topology: Topology, rows: int) -> None:
    group = topology.model.num_attention_heads // topology.model.num_key_value_heads
    for layer, schedule in enumerate(schedule_layers(topology)):
        table = decode_table(schedule)
        expected = topology.block_mask(layer, rows)
        for row in range(rows):
            for kv_head in range(topology.model.num_key_value_heads):
                heads = expected[kv_head * group : (kv_head + 1) * group, row, : row + 1]
                np.testing.assert_array_equal(expanded(table, kv_head, row, group), heads)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (3, 1), (8, 2), (8, 1)])
def test_tables_give_what_the_topology_says(seed: int, num_heads: int, num_kv_heads: int) -> None:
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
    check(topology, rows=40)


def test_rows_that_the_topology_refuses_have_no_entry() -> None:
    heads = [topologies.DENSE, topologies.head(0, 1.0, 1, 2)]
    topology = topologies.build([heads], [{"linkage": topologies.balanced_tree(9)}], num_blocks=9, beyond="error")
    check(topology, rows=9)
    assert decode_table(schedule_layers(topology)[0]).rows.shape[1] <= 9


def test_windows_of_different_lengths_are_two_segments_that_follow_the_row() -> None:
    topology = topologies.window_topology([2, 4], sink=1, num_blocks=8)
    table = decode_table(schedule_layers(topology)[0])
    first, _, end = table.plans[table.rows[0, -1]]
    assert table.segments[first:end].tolist() == [[0, 1, 0, 3], [-3, -1, 3, 2], [-1, 1, 3, 3]]


def test_equal_rows_share_a_plan_and_the_length_changes_nothing() -> None:
    small, large = (
        decode_table(schedule_layers(topologies.window_topology([2, 5], num_blocks=blocks))[0]) for blocks in (16, 4096)
    )
    assert np.array_equal(small.rows, large.rows)
    assert np.array_equal(small.segments, large.segments)
