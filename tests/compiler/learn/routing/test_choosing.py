"""Attention under a topology in plain torch: the oracle's masks, with the blocks that the oracle chooses."""

import pytest
import torch

import routing
import topologies
from models import SHAPE, masked_model, routed_topology, sparse_topology, tiny_llama, tokens
from surgeon.compiler.learn.measure.attending import attending, last_states
from surgeon.compiler.learn.routing.choosing import add_chosen, attending_as
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.topology.topology import Topology

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, SCALE = 224, 0.3
BLOCKS_OF_32 = topologies.build([[topologies.window_head(1, 1, route=3)] * 4], **(SHAPE | {"block_size": 32}))


@pytest.mark.parametrize(
    "topology", [sparse_topology(), routed_topology(), BLOCKS_OF_32], ids=["sparse", "routed", "blocks of 32"]
)
def test_every_row_sees_the_mask_and_what_it_chooses(topology: Topology) -> None:
    attend = attending_as(topology)
    for layer in range(len(topology.layers)):
        drawn = torch.Generator().manual_seed(layer)
        q, k, v = (torch.randn(1, heads, LENGTH, 32, generator=drawn) for heads in (4, 2, 2))
        blocks = torch.from_numpy(topology.block_mask(layer, LENGTH // topology.block_size))
        seen = blocks.repeat_interleave(topology.block_size, dim=1)
        chosen = routing.chosen_blocks(topology, layer, q[0], k[0], 0)
        assert bool(chosen.any()) == (topology.router is not None and topology.router.layers[layer] is not None)
        tokens_seen = (seen | chosen).repeat_interleave(topology.block_size, dim=2).tril()
        wide = [each[0].repeat_interleave(2, dim=0) for each in (k, v)]
        scores = (q[0] @ wide[0].transpose(1, 2) * SCALE).masked_fill(~tokens_seen, -torch.inf)
        expected = torch.softmax(scores, dim=-1) @ wide[1]
        torch.testing.assert_close(attend(layer, q, k, v, SCALE)[0], expected, atol=1e-5, rtol=1e-5)


def test_the_last_query_chooses_alone() -> None:
    layer = schedule_layers(BLOCKS_OF_32)[0]
    drawn = torch.Generator().manual_seed(5)
    q, k = (torch.randn(heads, LENGTH, 32, generator=drawn) for heads in (4, 2))
    seen = torch.zeros(4, 1, LENGTH // 32, dtype=torch.bool)
    for kv_head in range(2):
        own = slice(2 * kv_head, 2 * kv_head + 2)
        add_chosen(list(seen[own]), layer, kv_head, q[own, -1:], k[kv_head], LENGTH - 1)
    assert seen.any()
    assert torch.equal(seen, routing.chosen_blocks(BLOCKS_OF_32, 0, q[:, -1:], k, LENGTH - 1))


def test_a_model_computes_with_it() -> None:
    model, ids = tiny_llama(), tokens(1, LENGTH)
    with torch.no_grad():
        expected = masked_model(model, sparse_topology()).base_model(ids).last_hidden_state[0]
        with attending(model, attending_as(sparse_topology())):
            found = last_states(model, ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
