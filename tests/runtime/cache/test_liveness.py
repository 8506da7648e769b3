"""Liveness against its definition: a block is live as long as some later row reads it, and no longer."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

import routing
import strategies
from models import Compiled
from surgeon.compiler.schedule.liveness import liveness_table
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.cache.liveness import Liveness


@given(strategies.checked_topologies(max_blocks=10), st.data())
def test_a_block_is_live_while_some_later_row_of_some_query_head_reads_it(
    topology: Topology, data: st.DataObject
) -> None:
    most = topology.num_blocks if topology.beyond == "error" else 2 * topology.num_blocks + 20
    length = data.draw(st.integers(1, most))
    # No sink or window is wider than num_blocks + 5: a block that no row up to `far` reads again is never read again.
    far = topology.num_blocks if topology.beyond == "error" else length + topology.num_blocks + 30
    for index in topology.covered:
        layer = schedule_layers(topology)[index]
        mask = (
            routing.may_read(topology, index, far)
            .numpy()
            .reshape(topology.model.num_key_value_heads, -1, far, far)
            .any(axis=1)
        )
        from_row_on = np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]  # [KV heads, rows, blocks]
        liveness = Liveness(torch.from_numpy(liveness_table(layer)))
        found = liveness.live(torch.arange(length), length).numpy()
        for row in range(length):
            cached = row + 1  # blocks up to the row's own; later ones do not exist yet
            np.testing.assert_array_equal(found[row, :, :cached], from_row_on[:, row, :cached], err_msg=f"row {row}")
            assert found[row, :, cached:].all()


@given(strategies.checked_topologies())
def test_the_table_is_no_longer_than_the_rules(topology: Topology) -> None:
    for index in topology.covered:
        table = liveness_table(schedule_layers(topology)[index])
        assert 1 <= table.shape[1] <= max(topology.num_blocks, 2 * (topology.num_blocks + 5)) + 1


def test_a_package_says_when_blocks_may_leave(compiled: dict[str, Compiled]) -> None:
    topology, package = compiled["sparse"].topology, compiled["sparse"].package
    layers = schedule_layers(topology)
    liveness = package.liveness()
    assert sorted(liveness) == [0, 1, 2]
    for index, layer in enumerate(layers):
        np.testing.assert_array_equal(liveness[index].last_readers.numpy(), liveness_table(layer))
