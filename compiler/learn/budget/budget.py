"""Learns how many blocks each head gets: text ─▶ costs ─▶ windows ─▶ refined windows, with the model frozen.

On text that it was not learned on, a static pattern gains from the length of each head's window. The costs of all
windows are measured once at the dense model, a knapsack shares the budget, and rounds at the sparse model correct for
what separate costs miss: heads compensate for each other.
"""

from dataclasses import dataclass, field

import numpy as np

from surgeon.compiler.learn.budget.cuts import proposed_cuts, with_cuts
from surgeon.compiler.learn.budget.knapsack import allocate
from surgeon.compiler.learn.budget.refine import Trust, refined_windows
from surgeon.compiler.learn.measure.runs import Costs, Runs, Table
from surgeon.compiler.learn.patterns.pattern import Grid, Pattern
from surgeon.compiler.learn.patterns.windows import Windows, uniform_windows, visible_pairs, window_floor
from surgeon.compiler.learn.texts.text import Sequences
from surgeon.compiler.topology.pairs import causal_pairs

_LEAST_REACH = 0.25


@dataclass(frozen=True)
class Round:
    """A step of the refinement: its reach, the resulting divergence (nats per token), and whether it was kept.

    `cuts` is the number of heads that it gave a cut.
    """

    reach: float
    divergence: float
    kept: bool
    cuts: int = 0


@dataclass(frozen=True)
class Learned:
    """The pattern, and its divergence on the validation text (nats per token) beside that of equal windows.

    `rounds` refined the windows; `cut_rounds` added cuts, if those were requested.
    """

    pattern: Pattern
    divergence: float
    uniform_divergence: float
    rounds: tuple[Round, ...]
    cut_rounds: tuple[Round, ...] = field(default=())


def learn_pattern(runs: Runs, sequences: Sequences, grid: Grid, shape: tuple[int, int], seed: int) -> Learned:
    """Learns the pattern of each head of a model of `shape` (layers, heads).

    Raises:
        TopologyError: the density is out of reach.
    """
    pairs = visible_pairs(grid.blocks, grid.sink)
    # Rows that ask see everything, so that no head has to remember for them by itself.
    floor = 1 if grid.asking else window_floor(grid.blocks, grid.sink, grid.density)
    uniform = uniform_windows(*shape, grid.blocks, grid.sink, grid.density)
    budget = grid.density * causal_pairs(grid.blocks) * uniform.size

    costs = runs.calibrate(sequences.calibrate, seed)
    pattern = Pattern(cheapest_windows(objective(costs, uniform), pairs, budget, floor))
    uniform_divergence = runs.validate(Pattern(uniform), sequences.validate, "equal windows")
    best = runs.validate(pattern, sequences.validate, "allocated windows")
    rounds: list[Round] = []
    trust, changes = Trust(1.0), None
    for number, text in enumerate(sequences.refine, start=1):
        # A round that finds nothing better keeps the pattern, so the next one has more text for the same point.
        fresh = runs.changes(pattern, text, f"windows, round {number}, from a KL divergence of {best:.4f}")
        changes = fresh if changes is None else changes + fresh
        trust = Trust(max(trust.reach, _LEAST_REACH))
        while trust.reach >= _LEAST_REACH:
            proposed = Pattern(refined_windows(pattern.windows, changes, grid.sink, budget, floor, trust))
            found = runs.validate(proposed, sequences.validate, f"round {number}, KL divergence to beat {best:.4f}")
            rounds.append(Round(trust.reach, found, found < best))
            if found < best:
                pattern, best, changes = proposed, found, None
                break
            trust = trust.narrower()
    if not sequences.cuts:
        return Learned(pattern, best, uniform_divergence, tuple(rounds))

    proposing, admitting = sequences.cuts
    cuts = proposed_cuts(runs.block_changes(pattern, proposing), grid)
    compared = runs.cut_changes(pattern, cuts, admitting)
    trust, cut_rounds = Trust(0.5), []
    while trust.reach >= _LEAST_REACH:
        proposed = with_cuts(pattern, cuts, compared, grid, budget, floor, trust)
        found = runs.validate(proposed, sequences.validate, f"cuts, KL divergence to beat {best:.4f}")
        cut_rounds.append(Round(trust.reach, found, found < best, len(proposed.cuts)))
        if found < best:
            pattern, best = proposed, found
            break
        trust = trust.narrower()
    return Learned(pattern, best, uniform_divergence, tuple(rounds), tuple(cut_rounds))


def objective(costs: Costs, uniform: Windows) -> Table:
    """Fisher cost plus output error, each relative to the cost of equal windows: `[layers, heads, blocks]`.

    Within a layer, the output error is weighted like the layer's Fisher cost. The Fisher cost, one draw per token,
    tells how much a layer matters; the error, which has no noise, ranks the heads within it.
    """
    at = uniform[..., None] - 1
    fisher, error = (np.take_along_axis(table, at, axis=2).sum(axis=(1, 2)) for table in (costs.fisher, costs.error))
    weight = np.divide(fisher, error, out=np.zeros_like(fisher), where=error > 0)
    total = float(fisher.sum()) or 1.0
    table: Table = (costs.fisher + costs.error * weight[:, None, None]) / total
    return table


def cheapest_windows(cost: Table, pairs: Table, budget: float, floor: int) -> Windows:
    """The cheapest windows of at least `floor` blocks within the budget: `[layers, heads]`."""
    rows = cost.reshape(-1, cost.shape[2])
    chosen = allocate([pairs[floor - 1 :]] * len(rows), [row[floor - 1 :] for row in rows], budget)
    return np.array(chosen, dtype=np.int64).reshape(cost.shape[:2]) + floor
