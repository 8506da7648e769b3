"""Clusters for the heads that benefit from them: proposed on one part of the text, admitted on another.

Clusters fitted to positions overfit the text that they were fitted on. So a tree is made from one part of the text, and
a head may have a cut of it only if, on another part, the cut does better than the same number of blocks spent on its
window. Trees of intervals and of residues, which are not fitted to anything, compete in the same way.
"""

from collections.abc import Sequence

import numpy as np

from surgeon.compiler.learn.budget.knapsack import allocate
from surgeon.compiler.learn.budget.refine import Trust
from surgeon.compiler.learn.measure.runs import CutChanges, Table
from surgeon.compiler.learn.patterns.pattern import Cut, Grid, Pattern
from surgeon.compiler.learn.patterns.trees import cuts_of, interval_tree, learned_tree, residue_tree
from surgeon.compiler.learn.patterns.windows import visible_pairs
from surgeon.compiler.topology.pairs import cluster_pairs

_PRIMES = (2, 3)
_LEARNED = 4


def proposed_cuts(changes: Table, grid: Grid) -> tuple[tuple[tuple[Cut, ...], ...], ...]:
    """Each head's candidates, the same number for every head: cuts of its own tree, and of the fixed trees.

    `changes` holds the linear change of the divergence for each pair of blocks, `[layers, heads, blocks, blocks]`.
    """
    trees = [interval_tree(grid.blocks), *(residue_tree(grid.blocks, prime) for prime in _PRIMES)]
    fixed = tuple(Cut(tree, height) for tree in trees for height in cuts_of(tree, grid.blocks))

    def own(gains: Table) -> tuple[Cut, ...]:
        tree = learned_tree(gains)
        cuts = [Cut(tree, height) for height in cuts_of(tree, _LEARNED)]
        return tuple(cuts + [Cut(tree, 0.0)] * (_LEARNED - len(cuts)))

    return tuple(tuple(own(-head) + fixed for head in layer) for layer in changes)


def with_cuts(
    pattern: Pattern,
    cuts: Sequence[Sequence[Sequence[Cut]]],
    changes: CutChanges,
    grid: Grid,
    budget: float,
    floor: int,
    trust: Trust,
) -> Pattern:
    """The windows within the trust region and the admitted cuts with the least total change, within the budget.

    A cut is added to its head's present window. It is admitted if it lowers the divergence more than a window that sees
    the same number of pairs, interpolated linearly between windows.
    """
    pairs = visible_pairs(grid.blocks, grid.sink)
    places = [(layer, head) for layer in range(len(cuts)) for head in range(len(cuts[0]))]
    blocks: list[Table] = []
    costs: list[Table] = []
    choices: list[list[tuple[int, Cut | None]]] = []
    for layer, head in places:
        window, row = int(pattern.windows[layer, head]), changes.windows[layer, head]
        options: list[tuple[int, Cut | None]] = [(w, None) for w in trust.bounds(window, floor, grid.blocks)]
        sizes = [float(pairs[w - 1]) for w, _ in options]
        values = [float(row[w - 1]) for w, _ in options]
        for index, cut in enumerate(cuts[layer][head]):
            size = float(pairs[window - 1]) + cluster_pairs(grid.blocks, grid.sink, window, cut.tree, cut.height)
            value = float(changes.cuts[layer, head, index])
            if size > pairs[window - 1] and value < min(0.0, float(np.interp(size, pairs, row))):
                options.append((window, cut))
                sizes.append(size)
                values.append(value)
        choices.append(options)
        blocks.append(np.array(sizes))
        costs.append(np.array(values))
    chosen = [options[index] for options, index in zip(choices, allocate(blocks, costs, budget), strict=True)]
    windows = np.array([window for window, _ in chosen], dtype=np.int64).reshape(pattern.windows.shape)
    admitted = {place: cut for place, (_, cut) in zip(places, chosen, strict=True) if cut is not None}
    return Pattern(windows, admitted)
