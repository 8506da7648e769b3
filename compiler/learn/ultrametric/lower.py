"""Lowers the cuts of a pattern that sees too much, where the divergence from the dense model loses least by it."""

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
    """The pattern with cuts lowered as far as the grid's density needs it; its windows stay, and are to fit into that.

    In a round every cut falls by one level of its tree at most, because a linear change holds for small steps, and
    those fall that cost least for each pair of blocks. A cut below the last level is no cut.
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
    """The next lower level of a cut, at which fewer blocks see each other; None where only each itself would."""
    levels = sorted({height for _, _, height, _ in cut.tree.linkage if height <= cut.height})
    return Cut(cut.tree, levels[-2]) if len(levels) > 1 else None
