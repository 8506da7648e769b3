"""Schedules against the definition: exact at every length, compact, shared, and computed in bounded memory."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

import strategies
import topologies
from schedules import block_mask
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.schedule import UNBOUNDED, HeadSchedule, Piece, Run

HELPERS = Path(__file__).parents[2] / "helpers"


@given(strategies.topologies_and_lengths())
def test_a_schedule_is_the_definition(drawn: tuple[Topology, int]) -> None:
    topology, length = drawn
    for index, layer in enumerate(schedule_layers(topology)):
        masks = [block_mask(head, length) for head in layer.heads]
        expanded = np.reshape(masks, (len(masks), length, length))  # also of a layer that is not covered
        np.testing.assert_array_equal(expanded, topology.block_mask(index, length))


@pytest.mark.parametrize("beyond", ["window", "dense", "error"])
@pytest.mark.parametrize("num_blocks", [1, 2, 60, 301])
def test_a_schedule_of_large_trees_is_the_definition(num_blocks: int, beyond: str) -> None:
    topology = topologies.random_topology(
        np.random.default_rng(num_blocks),
        num_layers=1,
        num_heads=14,
        num_kv_heads=7,
        head_dim=32,
        block_size=64,
        num_blocks=num_blocks,
        beyond=beyond,
    )
    (layer,) = schedule_layers(topology)
    for length in (num_blocks,) if beyond == "error" else (num_blocks, num_blocks + 20):
        expanded = np.stack([block_mask(head, length) for head in layer.heads])
        np.testing.assert_array_equal(expanded, topology.block_mask(0, length))


@given(strategies.topologies_and_lengths())
def test_the_runs_of_a_row_are_ascending_disjoint_and_apart(drawn: tuple[Topology, int]) -> None:
    topology, length = drawn
    for layer in schedule_layers(topology):
        for head in layer.heads:
            for row in range(length):
                runs = head.row(row)
                assert runs[0].begin >= 0
                assert runs[-1].end == row + 1
                assert all(run.begin < run.end for run in runs)
                assert all(before.end < after.begin for before, after in itertools.pairwise(runs))


@given(strategies.checked_topologies())
def test_pieces_cover_the_rows_without_gap_and_neighbours_differ(topology: Topology) -> None:
    for layer in schedule_layers(topology):
        assert layer.num_rows == (topology.num_blocks if topology.beyond == "error" else UNBOUNDED)
        for head in layer.heads:
            assert head.pieces[0].first_row == 0
            assert head.pieces[-1].end_row in (layer.num_rows, UNBOUNDED)
            for before, after in itertools.pairwise(head.pieces):
                assert before.end_row == after.first_row
                assert before[2:] != after[2:]
            for piece in head.pieces:
                assert piece.first_row < piece.end_row
                assert 0 <= piece.first_run <= piece.end_run <= len(head.runs)


def parts(num_blocks: int, number: int) -> dict[str, Any]:
    """A tree whose cut at 0 is `number` contiguous clusters of equal size."""
    return {"paths": [[block * number // num_blocks] for block in range(num_blocks)], "arity": number}


def test_a_schedule_that_a_reader_can_follow() -> None:
    head = topologies.head(0, 0.0, sink=1, window=2)
    (layer,) = schedule_layers(topologies.build([[head]], [parts(8, 2)], num_blocks=8))
    assert layer.heads[0] == HeadSchedule(
        runs=(Run(0, 1),),
        pieces=(
            Piece(0, 4, 0, 0, 0, False),  # the first cluster, which holds the sink: 0 to the row
            Piece(4, 6, 0, 1, -1, True),  # the window still begins before the second cluster: the sink, the window
            Piece(6, 8, 0, 1, 4, False),  # the window is in the second cluster: the sink, 4 to the row
            Piece(8, UNBOUNDED, 0, 1, -1, True),  # beyond: the sink, the window
        ),
    )
    assert layer.heads[0].row(5) == (Run(0, 1), Run(4, 6))
    assert layer.heads[0].row(7) == (Run(0, 1), Run(4, 8))
    assert layer.heads[0].row(100) == (Run(0, 1), Run(99, 101))


def test_heads_and_layers_that_read_alike_are_one_object() -> None:
    tree = {"linkage": topologies.balanced_tree(8)}
    heads = [topologies.head(0, 2.0, 1, 2), topologies.head(1, 2.5, 1, 2), topologies.head(0, 0.0, 1, 2)]
    dense = [topologies.head(0, topologies.HUGE_CUT), topologies.DENSE, topologies.head(0, 0.0, 8, 1)]
    first, second, third = schedule_layers(
        topologies.build([heads, heads, dense], [tree, tree], num_blocks=8, beyond="dense")
    )
    assert first is second
    assert first.heads[0] is first.heads[1]
    assert first.heads[0] is not first.heads[2]
    assert third is not first
    assert third.heads[0] is third.heads[1] is third.heads[2]


@pytest.mark.parametrize("beyond", ["window", "dense", "error"])
def test_the_number_of_pieces_does_not_grow_with_the_length(beyond: str) -> None:
    heads = [topologies.head(tree, 0.0, sink, window) for tree in (0, 1) for sink in (0, 1, 3) for window in (1, 2, 5)]
    counts = set()
    for num_blocks in (64, 256, 1024, 4096):
        trees = [parts(num_blocks, 4), {"linkage": topologies.balanced_tree(num_blocks)}]
        (layer,) = schedule_layers(topologies.build([heads], trees, num_blocks=num_blocks, beyond=beyond))
        counts.add(tuple((len(head.pieces), len(head.runs)) for head in layer.heads))
    (same,) = counts
    assert max(pieces for pieces, _ in same) <= 4 * 3 + 1
    assert max(runs for _, runs in same) <= 1


# A 32-layer, 32-head topology with 1,024 blocks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixed", "scattered"])
def test_a_large_topology_is_scheduled_in_bounded_memory(kind: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(HELPERS)}
    script = Path(__file__).with_name("schedule_scale.py")
    done = subprocess.run([sys.executable, script, kind], env=environment, cwd=HELPERS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    print(figures)
    assert figures["heads"] >= 300
    assert figures["peak_bytes"] < 1e9
    assert figures["most_pieces"] <= 1024 + 2
    assert figures["most_runs"] <= 2 * 1024
    if kind == "mixed":
        assert figures["most_pieces_of_a_window"] <= 4
