"""Liveness computed from schedules, against their expansion."""

import numpy as np
from hypothesis import given

import routing
import strategies
from surgeon.compiler.schedule.liveness import last_readers
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.schedule import UNBOUNDED


@given(strategies.topologies_and_lengths(max_blocks=12))
def test_the_last_readers_are_those_of_the_mask(drawn: tuple[Topology, int]) -> None:
    topology, length = drawn
    # So long that no window joins a block below `length` and the last row, which thus reads only those read for ever.
    far = topology.num_blocks if topology.beyond == "error" else 3 * topology.num_blocks + length + 30
    num_kv_heads = topology.model.num_key_value_heads
    for index, layer in enumerate(schedule_layers(topology)):
        if not layer.heads:
            assert (last_readers(layer, length) == UNBOUNDED).all()
            continue
        mask = routing.may_read(topology, index, far).numpy().reshape(num_kv_heads, -1, far, far).any(axis=1)
        last = far - 1 - np.asarray(mask)[:, ::-1, :length].argmax(axis=1)
        if topology.beyond != "error":
            last[last == far - 1] = UNBOUNDED
        np.testing.assert_array_equal(last_readers(layer, length), last)
