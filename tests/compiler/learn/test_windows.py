"""Windows: what they see, what they use of a density, and where they may move in a round."""

import numpy as np
import pytest

from surgeon.compiler.learn.emit import window_topology
from surgeon.compiler.learn.refine import Trust, refined_windows
from surgeon.compiler.learn.windows import (
    causal_pairs,
    density_of,
    uniform_windows,
    visible_pairs,
    window_floor,
    window_masks,
)
from surgeon.runtime.errors import TopologyError
from surgeon.runtime.manifest import ModelShape

BLOCKS = 32


def test_masks_and_density_are_those_of_the_topologys_definition() -> None:
    windows = np.array([[1, 2, 5], [32, 7, 3]])
    topology = window_topology(ModelShape("llama", 2, 3, 1, 32, None), 64, BLOCKS, 1, windows, {})
    for layer, masks in enumerate(window_masks(windows, BLOCKS, 1)):
        np.testing.assert_array_equal(masks.numpy(), topology.block_mask(layer, BLOCKS))
    densities = np.stack([topology.density(layer) for layer in range(2)])
    assert density_of(windows, BLOCKS, 1) == pytest.approx(densities.mean())


@pytest.mark.parametrize("density", [0.12, 0.15, 0.25, 0.35, 0.5, 0.9, 1.0])
def test_equal_windows_use_the_density_up_to_one_step(density: float) -> None:
    windows = uniform_windows(30, 9, BLOCKS, 1, density)
    assert windows.max() - windows.min() <= 1
    assert density_of(windows, BLOCKS, 1) == pytest.approx(density, abs=2e-4)
    assert density_of(windows, BLOCKS, 1) <= density + 1e-12
    spread = windows.sum(axis=1)
    assert spread.max() - spread.min() <= 1, "heads with one more are spread over the layers"


def test_the_floor_uses_about_two_thirds_and_never_more_than_there_is() -> None:
    assert [window_floor(BLOCKS, 1, density) for density in (0.12, 0.15, 0.25, 0.35, 0.5)] == [1, 1, 2, 3, 5]
    for density in np.linspace(0.13, 1.0, 30):
        assert visible_pairs(BLOCKS, 1)[window_floor(BLOCKS, 1, density) - 1] <= density * causal_pairs(BLOCKS)


def test_a_density_below_sink_and_diagonal_is_out_of_reach() -> None:
    for function in (lambda: uniform_windows(2, 2, BLOCKS, 1, 0.1), lambda: window_floor(BLOCKS, 1, 0.1)):
        with pytest.raises(TopologyError, match=r"--density: expected at least 0\.1193: .*, got 0\.1; raise"):
            function()


def test_a_round_stays_in_the_trust_region_the_budget_and_above_the_floor() -> None:
    rng = np.random.default_rng(0)
    windows = rng.integers(2, 12, size=(4, 3))
    changes = rng.normal(size=(4, 3, BLOCKS)).cumsum(axis=2)
    pairs = visible_pairs(BLOCKS, 1)
    budget = float(pairs[windows - 1].sum())
    found = refined_windows(windows, changes, 1, budget, 2, Trust(1.0))
    assert (found >= np.maximum(2, np.ceil(windows / 2))).all()
    assert (found <= np.minimum(BLOCKS, 2 * windows + 2)).all()
    assert pairs[found - 1].sum() <= budget
    gained = np.take_along_axis(changes, found[..., None] - 1, axis=2).sum()
    assert gained < np.take_along_axis(changes, windows[..., None] - 1, axis=2).sum()
    nearer = refined_windows(windows, changes, 1, budget, 2, Trust(1.0).narrower())
    assert np.abs(nearer - windows).max() < np.abs(found - windows).max()


def test_a_window_below_the_floor_may_stay() -> None:
    assert 1 in Trust(1.0).bounds(1, 2, BLOCKS)
