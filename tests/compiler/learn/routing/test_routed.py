"""Routes in place of windows: heads that retrieve get long ones, the others pay, and the density stays."""

import dataclasses

import pytest
import torch

import topologies
from surgeon.compiler.learn.routing.routed import converted, lengthened, routed_heads, routed_places
from surgeon.compiler.topology.read import parse_topology
from surgeon.compiler.topology.router import LayerRouter
from surgeon.compiler.topology.topology import Topology, WindowHead, mean_density
from surgeon.compiler.topology.write import spelled
from surgeon.runtime.errors import TopologyError

ROUTER = LayerRouter(((0.5,) * 32,), ((2.0,) * 32,))
PLACES = frozenset({(0, 1), (1, 0)})


def windows(num_blocks: int = 256) -> Topology:
    heads = [topologies.window_head(1, window) for window in (90, 40, 5, 30)]
    layers = [heads, [topologies.DENSE, *heads[1:]], heads]
    return topologies.build(layers, num_blocks=num_blocks, block_size=32)


@pytest.mark.parametrize("share", [1.0, 0.9, 1.4], ids=["as before", "sparser", "denser"])
def test_heads_that_retrieve_get_windows_long_enough_and_all_pay(share: float) -> None:
    before = windows()
    density = share * mean_density(before)
    after = lengthened(before, PLACES | {(0, 2)}, density)
    assert density - 0.004 < mean_density(after) <= density
    assert after.router is None
    factors = []
    for layer, heads in enumerate(after.layers):
        for index, head in enumerate(heads):
            old = before.layers[layer][index]
            if not isinstance(old, WindowHead):
                assert head == old
            elif (layer, index) == (0, 2):
                assert head == WindowHead(1, 4 + 11)  # 5 blocks before
            else:
                assert isinstance(head, WindowHead)
                factors.append((head.window / old.window, (head.window + 1) / old.window))
    assert max(low for low, _ in factors) < min(high for _, high in factors)  # one factor gives them all, rounded down


def test_windows_long_enough_that_exceed_the_density_are_refused() -> None:
    with pytest.raises(TopologyError, match=r"--route: expected a density that holds windows of 15 blocks in every"):
        lengthened(windows(32), PLACES, 0.1)


def test_clusters_are_refused() -> None:
    clustered = topologies.one_cluster_topology(num_blocks=9)
    with pytest.raises(TopologyError, match=r"layers\[0\]\.heads\[0\]: expected a head without clusters"):
        lengthened(clustered, frozenset(), 1.0)


def test_conversion_keeps_the_number_of_blocks_that_every_row_reads() -> None:
    before = windows()
    after = converted(before, [ROUTER] * 3, 128)
    assert after.layers[0] == (WindowHead(1, 4, 86), WindowHead(1, 4, 36), WindowHead(1, 4, 1), WindowHead(1, 4, 26))
    assert after.layers[1] == (before.layers[1][0], *after.layers[0][1:])
    assert routed_heads(after) == 11
    for old, new in zip(before.layers[0], after.layers[0], strict=True):
        alone = [dataclasses.replace(topology, layers=((head,),)) for topology, head in ((before, old), (after, new))]
        for length in (1, 4, 5, 6, 30, 91, 92, 256):
            assert len({mean_density(dataclasses.replace(each, num_blocks=length)) for each in alone}) == 1
    assert parse_topology(spelled(after)).sha256 == after.sha256


def test_short_windows_and_those_that_see_everything_are_not_converted() -> None:
    before = topologies.build(
        [[topologies.window_head(1, window) for window in (3, 4, 63, 64)]], num_blocks=64, block_size=32
    )
    assert converted(before, [ROUTER], 128) == before
    with pytest.raises(TopologyError, match=r"layers\[0\]\.heads\[0\]: expected a head without clusters"):
        converted(topologies.one_cluster_topology(num_blocks=9), [ROUTER], 128)


def test_the_best_quarter_is_routed() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.8, 0.0, 0.0, 0.0]])
    assert routed_places(scores) == {(0, 1), (1, 0)}
