"""The way that is chosen: the one whose divergence, measured by the model itself, is the least of those allowed."""

import pytest
import torch

import topologies
from models import SHAPE, tiny_llama, tokens
from surgeon.compiler.learn.measure.checkpoint_store import CheckpointStore
from surgeon.compiler.learn.measure.decoder import dense_states, sparse_divergence
from surgeon.compiler.learn.measure.runs import Runs
from surgeon.compiler.learn.patterns.pattern import Grid
from surgeon.compiler.learn.routing.key_ranges import measure_routers
from surgeon.compiler.learn.routing.routed import NEAR_TOKENS
from surgeon.compiler.learn.routing.ways import best_way
from surgeon.compiler.topology.topology import Topology

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = 16
GRID = Grid(16, BLOCKS, 1, 0.5)
SEQUENCES = [tokens(1, 16 * BLOCKS, seed) for seed in (1, 2)]


def windows(length: int) -> Topology:
    return topologies.build([[topologies.window_head(1, length)] * 4] * 3, **(SHAPE | {"num_blocks": BLOCKS}))


def runs() -> Runs:
    return Runs(tiny_llama(), GRID, CheckpointStore(None), {"weights": "tiny"}, None)


def test_the_divergence_of_windows_is_that_of_their_mask() -> None:
    model, given = tiny_llama(), windows(9)
    routers = measure_routers(model, SEQUENCES)
    masks = [torch.from_numpy(given.block_mask(layer, BLOCKS)) for layer in range(3)]
    expected = [sparse_divergence(model, ids, dense_states(model, ids), masks) for ids in SEQUENCES]
    found = best_way(runs(), given, given, routers, NEAR_TOKENS, SEQUENCES, may_stay=True)
    assert found.divergences["windows"] == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert found.way == min(found.divergences, key=lambda way: found.divergences[way])
    assert len(found.divergences) == 3


def test_windows_that_see_everything_stay_if_they_may() -> None:
    routers = measure_routers(tiny_llama(), SEQUENCES)
    everything, few = windows(BLOCKS), windows(9)
    kept = best_way(runs(), everything, few, routers, NEAR_TOKENS, SEQUENCES, may_stay=True)
    assert (kept.way, kept.topology) == ("windows", everything)
    routed = best_way(runs(), everything, few, routers, NEAR_TOKENS, SEQUENCES, may_stay=False)
    assert routed.way in ("64 near", "128 near")
    assert routed.topology.router is not None
    assert routed.divergences == kept.divergences
    assert routed.figures(None)["heads"] == 12


def test_windows_too_short_to_be_converted_stay_in_any_case() -> None:
    few, routers = windows(4), measure_routers(tiny_llama(), SEQUENCES)
    found = best_way(runs(), few, few, routers, NEAR_TOKENS, SEQUENCES, may_stay=False)
    assert (found.way, found.topology) == ("windows", few)
    assert found.figures(None) == {"heads": 0, "way": "windows", "validation": dict(found.divergences)}
