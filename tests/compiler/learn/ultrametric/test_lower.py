"""The lowering of cuts to a density: within it, level by level, the cheapest first."""

import numpy as np
import pytest
import torch

from models import tiny_llama, tokens
from surgeon.compiler.learn.measure.checkpoint import frozen
from surgeon.compiler.learn.measure.checkpoint_store import CheckpointStore
from surgeon.compiler.learn.measure.runs import Runs, Table
from surgeon.compiler.learn.patterns.pattern import Cut, Grid, Pattern
from surgeon.compiler.learn.patterns.trees import interval_tree
from surgeon.compiler.learn.patterns.windows import window_patterns
from surgeon.compiler.learn.ultrametric.lower import lowered
from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.compiler.topology.pairs import causal_pairs

LAYERS, HEADS, BLOCKS, SIZE = 3, 4, 8, 16
TOP = 3.0  # the height of an interval tree over the blocks


def pattern(height: float = TOP) -> Pattern:
    cuts = {(layer, head): Cut(interval_tree(BLOCKS), height) for layer in range(LAYERS) for head in range(HEADS)}
    return Pattern(np.full((LAYERS, HEADS), 1), cuts)


def grid(density: float) -> Grid:
    return Grid(SIZE, BLOCKS, 1, density)


def density(found: Pattern) -> float:
    pairs = sum(int(mask.sum()) for mask in found.masks(grid(1.0)))
    return pairs / (LAYERS * HEADS * causal_pairs(BLOCKS))


def by_layer(found: Pattern, candidates: torch.Tensor) -> Table:
    """A cost of lowering: the layer's number in nats per pair, so nothing in layer 0."""
    masks = torch.stack(list(found.masks(grid(1.0))))[:, :, None]
    lost: Table = (masks.sum(dim=(3, 4)) - candidates.sum(dim=(3, 4))).numpy().astype(np.float64)
    return lost * np.arange(LAYERS)[:, None, None]


def heights(found: Pattern) -> list[list[float]]:
    return [
        [found.cuts[layer, head].height if (layer, head) in found.cuts else 0.0 for head in range(HEADS)]
        for layer in range(LAYERS)
    ]


def test_within_the_density_nothing_is_measured_or_changed() -> None:
    def refuse(_pattern: Pattern, _candidates: torch.Tensor) -> Table:
        raise AssertionError("measured")

    whole = pattern()
    assert density(whole) == 1.0
    assert lowered(whole, grid(1.0), refuse) == whole
    assert lowered(Pattern(whole.windows), grid(0.01), refuse).cuts == {}, "windows are not lowered"


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.5, 0.43])
def test_what_costs_least_falls_first_and_the_density_is_kept(share: float) -> None:
    found = lowered(pattern(), grid(share), by_layer)
    assert density(found) <= share
    assert found.windows.tolist() == pattern().windows.tolist()
    least = [min(row) for row in heights(found)]
    assert least == sorted(least), "a layer falls before a dearer one"
    assert max(heights(found)[0]) < TOP


def test_a_cut_falls_by_one_level_in_a_round_and_is_none_below_the_last() -> None:
    seen = []

    def watch(found: Pattern, candidates: torch.Tensor) -> Table:
        seen.append((found, candidates))
        return by_layer(found, candidates)

    found = lowered(pattern(), grid(15 / causal_pairs(BLOCKS)), watch)
    assert found.cuts == {}
    assert [found.cuts[0, 0].height for found, _ in seen] == [3.0, 2.0, 1.0]
    for before, candidates in seen:
        expected = interval_tree(BLOCKS).distances() <= before.cuts[0, 0].height - 1
        assert torch.equal(candidates[0, 0, 0], (torch.from_numpy(expected).tril() | window_patterns(BLOCKS, 1)[0]))


def test_equal_paths_are_a_level_like_any_other() -> None:
    tree = Dendrogram.from_paths([[0, 0, 0], [0, 0, 0], *([[1, 0, 0]] * 6)], 2, "paths")
    found = lowered(Pattern(np.array([[1]]), {(0, 0): Cut(tree, 3.0)}), grid(0.9), lambda *_: np.zeros((1, 1, 1)))
    assert found.cuts[0, 0].height == 0.0
    mask = found.masks(grid(0.9))[0][0]
    assert bool(mask[7, 2])
    assert not mask[7, 1]


def test_the_change_of_a_mask_is_that_of_the_same_window() -> None:
    model, sequences = tiny_llama(), [tokens(1, BLOCKS * SIZE), tokens(1, BLOCKS * SIZE, seed=2)]
    windows = window_patterns(BLOCKS, 1)
    candidates = windows.expand(LAYERS, HEADS, *windows.shape).clone()
    with frozen(model):
        runs = Runs(model, grid(0.6), CheckpointStore(None), {}, None)
        narrow = Pattern(np.full((LAYERS, HEADS), 3))
        found = runs.mask_changes(narrow, candidates, sequences, "masks")
        np.testing.assert_allclose(found, runs.changes(narrow, sequences, "windows"), atol=1e-9)
        assert np.abs(found[:, :, 2]).max() < 1e-4 < np.abs(found[:, :, 0]).max(), "3 is what they have"
