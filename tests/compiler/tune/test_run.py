"""What tiles are timed on."""

import topologies
from surgeon.compiler.tune.run import one_layer, with_head_dim
from topologies import DENSE, window_head


def test_tiles_are_timed_on_a_layers_schedule_without_its_routes() -> None:
    layers = [[window_head(1, 1), DENSE], [window_head(1, 2, route=3), DENSE]]
    topology = topologies.build(layers, num_kv_heads=1, head_dim=16, block_size=16, num_blocks=8)
    timed = with_head_dim(one_layer(topology, 1), 64)
    assert timed.router is None
    expected = topologies.build([[window_head(1, 2), DENSE]], num_kv_heads=1, head_dim=64, block_size=16, num_blocks=8)
    assert timed.layers == expected.layers
    assert timed.sha256 == expected.sha256
