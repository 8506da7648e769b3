"""Lowers the cuts of a pattern that sees too much, where it raises the divergence from the dense model least."""

from collections.abc import Callable

import numpy as np
import torch

from surgeon.compiler.learn.budget.knapsack import allocate
from surgeon.compiler.learn.measure.runs import Table
from surgeon.compiler.learn.patterns.pattern import Cut, Grid, Pattern
from surgeon.compiler.topology.pairs import causal_pairs

Changes = Callable[[Pattern, torch.Tensor], Table]
"""The linear change of the divergence, `[layers, heads, candidates]`, if a head had another mask than the pattern's:
one of the candidates, bool `[layers, heads, candidates, blocks, blocks]`."""


def lowered(pattern: Pattern, grid: Grid, changes_of: Changes) -> Pattern:
    """The pattern with its cuts lowered as far as the grid's density requires; its windows stay, and must fit into it.

    In a round every cut is lowered by at most one level of its tree, because a linear change holds only for small
    steps; those that cost least per pair of blocks go first. A cut below the last level is removed.
    """
    budget = grid.density * causal_pairs(grid.blocks) * pattern.windows.size
    while pattern.cuts and pattern.visible_pairs(grid).sum() > budget:
        below = Pattern(pattern.windows, {place: cut for place in pattern.cuts if (cut := _below(pattern.cuts[place]))})
        fewer, more = (each.visible_pairs(grid).ravel() for each in (below, pattern))
        candidates = torch.stack(list(below.masks(grid)))[:, :, None]
        changes = changes_of(pattern, candidates).ravel()
        kept = allocate(
            [np.array(pairs) for pairs in zip(fewer, more, strict=True)],
            [np.array([change, 0.0]) for change in changes],
            max(budget, fewer.sum()),
        )
        places = np.ndindex(pattern.windows.shape)
        taken = {place: pattern if keep else below for place, keep in zip(places, kept, strict=True)}
        cuts = {place: each.cuts[place] for place, each in taken.items() if place in each.cuts}
        pattern = Pattern(pattern.windows, cuts)
    return pattern


def _below(cut: Cut) -> Cut | None:
    """The next lower level of a cut, at which fewer blocks see each other; None if each would see only itself."""
    levels = sorted({height for _, _, height, _ in cut.tree.linkage if height <= cut.height})
    return Cut(cut.tree, levels[-2]) if len(levels) > 1 else None
