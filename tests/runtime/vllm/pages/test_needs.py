"""Pages that may go: exactly those with no block that a later row of any layer of the group sees, by the definition."""

from pathlib import Path

import numpy as np
import pytest
import torch

from surgeon.compiler.schedule.liveness import liveness_tables
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.topology.read import read_topology
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.cache.liveness import Liveness
from surgeon.runtime.vllm.pages.needs import groups_of, unread_pages
from topologies import DENSE, build, random_topology, window_head

LONG = 24
TOPOLOGIES = Path(__file__).parents[4] / "benchmarks/topologies"


def liveness_of(topology: Topology) -> dict[int, Liveness]:
    layers = schedule_layers(topology)
    tables = liveness_tables(layers)
    return {index: Liveness(torch.from_numpy(tables[layer])) for index, layer in enumerate(layers) if layer.heads}


def windows(*layers: int) -> Topology:
    return build([[window_head(1, window)] for window in layers], num_blocks=16)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("page_blocks", [1, 2, 3])
def test_the_pages_that_no_later_row_sees(seed: int, page_blocks: int) -> None:
    made = random_topology(np.random.default_rng(seed), num_layers=3, num_heads=4, num_kv_heads=2, num_blocks=10)
    seen = [made.block_mask(layer, LONG).any(axis=0) for layer in range(3)]
    for group in groups_of(liveness_of(made), made.num_blocks):
        for row in range(1, LONG - 6):  # windows are at most 6: no later row sees a block before the last of these
            pages = row // page_blocks
            read = np.logical_or.reduce([seen[layer][row:].any(axis=0) for layer in group.layers])
            expected = [page for page in range(pages) if not read[page * page_blocks : (page + 1) * page_blocks].any()]
            assert unread_pages(group.readers, page_blocks, row, pages) == expected


def test_layers_of_like_need_are_grouped() -> None:
    groups = groups_of(liveness_of(windows(8, 1, 8, 1)), 16)
    assert [group.layers for group in groups] == [(1, 3), (0, 2)]


def test_like_layers_are_one_group() -> None:
    assert [group.layers for group in groups_of(liveness_of(windows(3, 3, 3, 3)), 16)] == [(0, 1, 2, 3)]


def test_groups_have_one_size() -> None:
    groups = groups_of(liveness_of(windows(1, 1, 1, 1, 1, 12, 12)), 16)
    assert [len(group.layers) for group in groups] == [7], "seven layers have no other division up to six groups"


def test_a_dense_layer_keeps_its_pages() -> None:
    made = build([[window_head()], [DENSE]], num_blocks=16)
    kept = [unread_pages(group.readers, 1, 40, 40) for group in groups_of(liveness_of(made), 16)]
    assert kept == [list(range(40)), []]


def test_what_a_learned_topology_leaves() -> None:
    made = read_topology(TOPOLOGIES / "smollm2-135m-21-8192.json")
    row = made.num_blocks
    groups = groups_of(liveness_of(made), row)
    freed = sum(len(group.layers) * len(unread_pages(group.readers, 1, row, row)) for group in groups)
    assert len(groups) == 5
    assert 1 - freed / (row * len(made.layers)) == pytest.approx(0.25, abs=0.005), "runtime/README.md says 25%"
