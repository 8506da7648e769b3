"""The cuts that are proposed, and those of them that are admitted."""

import numpy as np

from surgeon.compiler.learn.budget.cuts import proposed_cuts, with_cuts
from surgeon.compiler.learn.budget.refine import Trust
from surgeon.compiler.learn.measure.runs import CutChanges
from surgeon.compiler.learn.patterns.pattern import Cut, Grid, Pattern
from surgeon.compiler.learn.patterns.trees import interval_tree
from surgeon.compiler.learn.patterns.windows import visible_pairs

GRID = Grid(16, 8, 1, 0.5)
PAIRS = visible_pairs(8, 1)


def test_every_head_has_as_many_candidates_its_own_tree_among_them() -> None:
    changes = np.zeros((2, 3, 8, 8))
    changes[1, 2, 6, 3] = -4.0
    cuts = proposed_cuts(changes, GRID)
    assert len({len(head) for layer in cuts for head in layer}) == 1
    assert cuts[1][2][0].tree.linkage[0][:2] == (3, 6)
    assert cuts[0][0][-1].tree == cuts[1][2][-1].tree


def chosen(gain: float, budget: float) -> Pattern:
    """A layer of two heads with windows of 1: a window of 2 gains 6, head 1's cut, for half as many pairs, `gain`."""
    cut = Cut(interval_tree(8), 1.0)
    windows = np.array([[1, 1]])
    row = np.where(np.arange(1, 9) > 1, -6.0, 0.0)
    changes = CutChanges(np.stack([row, row])[None], np.array([[[0.0], [-gain]]]))
    return with_cuts(Pattern(windows), [[[cut], [cut]]], changes, GRID, budget, 1, Trust(1.0))


def pairs_of(pattern: Pattern) -> int:
    return sum(int(mask.sum()) for mask in pattern.masks(GRID))


def test_a_cut_is_admitted_only_where_it_beats_as_many_pairs_of_window() -> None:
    present = 2 * int(PAIRS[0])
    cut = Cut(interval_tree(8), 1.0)
    assert pairs_of(Pattern(np.array([[1, 1]]), {(0, 1): cut})) == present + 3
    assert PAIRS[1] - PAIRS[0] == 6
    assert not chosen(gain=2.9, budget=present + 3).cuts
    assert not chosen(gain=2.9, budget=1e9).cuts
    admitted = chosen(gain=3.1, budget=present + 3)
    assert admitted.cuts == {(0, 1): cut}
    assert pairs_of(admitted) == present + 3


def test_the_rest_of_the_budget_goes_to_windows() -> None:
    found = chosen(gain=3.1, budget=2 * PAIRS[0] + 9)
    assert found.windows.tolist() == [[2, 1]]
    assert list(found.cuts) == [(0, 1)]
    assert not chosen(gain=3.1, budget=2 * PAIRS[0] + 12).cuts, "both windows fit, and gain more than window and cut"
