"""Windows: the pairs they see, the density they use, and the range of a round's moves."""

import numpy as np
import pytest
import torch

from surgeon.compiler.learn.budget.refine import Trust, refined_windows
from surgeon.compiler.learn.patterns.pattern import Cut, Grid, Pattern
from surgeon.compiler.learn.patterns.to_topology import pattern_topology
from surgeon.compiler.learn.patterns.trees import interval_tree, residue_tree
from surgeon.compiler.learn.patterns.windows import (
    Windows,
    causal_pairs,
    uniform_windows,
    visible_pairs,
    window_floor,
    window_patterns,
)
from surgeon.compiler.topology.topology import mean_density
from surgeon.runtime.errors import TopologyError
from surgeon.runtime.package.manifest import ModelShape

BLOCKS = 32


def density_of(windows: Windows) -> float:
    return float(visible_pairs(BLOCKS, 1)[windows - 1].mean() / causal_pairs(BLOCKS))


def test_masks_and_density_are_those_of_the_topologys_definition() -> None:
    grid, windows = Grid(64, BLOCKS, 1, 0.5), np.array([[1, 2, 5], [32, 7, 3]])
    shape = ModelShape("llama", 2, 3, 1, 32, None)
    cuts = {(0, 1): Cut(residue_tree(BLOCKS, 3), 1.0), (1, 2): Cut(interval_tree(BLOCKS), 3.0)}
    for pattern in (Pattern(windows), Pattern(windows, cuts)):
        topology = pattern_topology(shape, grid, pattern, {})
        for layer, masks in enumerate(pattern.masks(grid)):
            np.testing.assert_array_equal(masks.numpy(), topology.block_mask(layer, BLOCKS))
    assert density_of(windows) == pytest.approx(mean_density(pattern_topology(shape, grid, Pattern(windows), {})))


@pytest.mark.parametrize("density", [0.12, 0.15, 0.25, 0.35, 0.5, 0.9, 1.0])
def test_equal_windows_use_the_density_up_to_one_step(density: float) -> None:
    windows = uniform_windows(30, 9, BLOCKS, 1, density)
    assert windows.max() - windows.min() <= 1
    assert density_of(windows) == pytest.approx(density, abs=2e-4)
    assert density_of(windows) <= density + 1e-12
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


@pytest.mark.parametrize(
    ("block_size", "blocks", "first", "scored"),
    [
        (64, 32, 1664 // 64, 256),
        (32, 64, 1664 // 32, 256),
        (64, 128, 7808 // 64, 256),
        (16, 8, 104 // 16, 16),
        (16, 1, 0, 2),
    ],
)
def test_the_grid_for_answers(block_size: int, blocks: int, first: int, scored: int) -> None:
    """The last 256 of 2,048 tokens are scored, the 128 before them are the prompt's end; fewer of fewer tokens."""
    grid = Grid.for_answers(block_size, blocks, 1, 0.25)
    assert (blocks - grid.asking, grid.scored) == (first, scored)
    masks = window_patterns(blocks, 1)
    seen = grid.with_asking(masks)
    assert torch.equal(seen[:, :first], masks[:, :first])
    assert torch.equal(seen[:, first:], torch.ones_like(masks).tril()[:, first:])
