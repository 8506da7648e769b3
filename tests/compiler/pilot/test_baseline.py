"""Equal windows as dense as a topology, to within one head's next block."""

import math

import numpy as np
import pytest

from surgeon.compiler.pilot.baseline import density_at, window_baseline
from surgeon.compiler.topology.topology import WindowHead
from surgeon.runtime.errors import TopologyError
from topologies import build, dense_topology, random_topology, window_head, window_topology


@pytest.mark.parametrize("length", [512, 500, 1024])
def test_the_windows_are_equal_and_as_dense(length: int) -> None:
    topology = random_topology(
        np.random.default_rng(3), num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, block_size=16, num_blocks=32
    )
    baseline = window_baseline(topology, length)
    heads = [head for layer in baseline.layers for head in layer]
    windows = [head.window for head in heads if isinstance(head, WindowHead)]
    assert len(windows) == 12
    assert max(windows) - min(windows) <= 1
    wanted, found = density_at(topology, length), density_at(baseline, length)
    blocks = math.ceil(length / 16)
    assert wanted - 1 / 12 / (blocks + 1) * 2 < found <= wanted + 1e-12


def test_windows_of_windows_are_the_same_windows() -> None:
    topology = window_topology([3, 3], num_layers=2)
    assert window_baseline(topology, 512).layers == ((WindowHead(1, 3),) * 2,) * 2
    assert density_at(window_baseline(dense_topology(), 512), 512) == 1
    assert density_at(window_baseline(window_topology([1], sink=0), 512), 512) == pytest.approx(1 / 4.5)


def test_windows_beside_routed_heads_read_as_many_blocks_and_choose_none() -> None:
    routed = build([[window_head(1, 2, route=3), window_head(1, 3)]], num_blocks=16)
    baseline = window_baseline(routed, 1024)
    assert baseline.router is None
    assert all(isinstance(head, WindowHead) and not head.route for layer in baseline.layers for head in layer)
    assert density_at(routed, 1024) - 2 / 17 < density_at(baseline, 1024) <= density_at(routed, 1024)


def test_a_length_that_the_topology_refuses() -> None:
    with pytest.raises(TopologyError, match="expected at most 8 blocks, which the topology covers"):
        window_baseline(window_topology([2], beyond="error"), 9 * 64)
