"""Assesses a frozen model before learning: the heads that can be thinned, and the loss to expect at each density."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from surgeon.compiler.forecast.learning import Counts, assessing_stages, forecast, seconds_of_prompt
from surgeon.compiler.learn.budget.budget import cheapest_windows, objective
from surgeon.compiler.learn.measure.checkpoint import check_decoder, frozen, model_shape
from surgeon.compiler.learn.measure.checkpoint_store import CheckpointStore
from surgeon.compiler.learn.measure.runs import Costs, Runs, Table
from surgeon.compiler.learn.patterns.pattern import Grid, Pattern
from surgeon.compiler.learn.patterns.windows import Windows, uniform_windows, visible_pairs, window_floor
from surgeon.compiler.learn.texts.text import Sequences, TokenText, divide
from surgeon.compiler.system.stages import Forecast, expect
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.pairs import causal_pairs
from surgeon.runtime.transformers.fingerprint import fingerprint

_DENSITIES = (0.15, 0.2, 0.25, 0.35, 0.5, 0.75)


@dataclass(frozen=True)
class Expected:
    """KL divergences to expect at a density, in nats per token: with windows by cost, and with equal windows."""

    density: float
    allocated: float
    equal: float


@dataclass(frozen=True)
class Assessment:
    """The cost of thinning each head; tables are `[layers][heads]`.

    `missed` is the share of the dense attention outside the sink and a window of `window` blocks, the size that equal
    windows have; `cost` is each head's share of the cost of that window in all heads, and `stability` the rank
    correlation of the costs between texts, a mean over the pairs, or None with one text. `measured` is the divergence
    of equal windows; `curve`, computed from the costs of single heads, is scaled to it.
    """

    grid: Grid
    window: int
    missed: tuple[tuple[float, ...], ...]
    cost: tuple[tuple[float, ...], ...]
    stability: float | None
    measured: float
    curve: tuple[Expected, ...]


def assess(
    model: PreTrainedModel,
    texts: Sequence[TokenText],
    grid: Grid,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Assessment:
    """Assesses a frozen model on two sequences of each text, one to measure on and one to scale by.

    Raises:
        ModelError: the model is not a decoder with full attention, or a text holds too few sequences.
        TopologyError: the density is out of reach.
    """
    check_decoder(model)
    shape = model_shape(model)
    size = (shape.num_hidden_layers, shape.num_attention_heads)
    equal = uniform_windows(*size, grid.blocks, grid.sink, grid.density)
    sequences = divided(texts, grid, seed)
    with frozen(model):
        runs = Runs(model, grid, CheckpointStore(work), {"weights": fingerprint(model)}, progress)
        expect(progress, partial(_forecast, model, sequences))
        each = runs.assess(sequences.calibrate, seed)
        measured = runs.validate(Pattern(equal), sequences.validate, "equal windows")
    return summarize([costs for costs, _ in each], [missed for _, missed in each], grid, equal, measured)


def divided(texts: Sequence[TokenText], grid: Grid, seed: int) -> Sequences:
    """The sequences that an assessment reads of texts: one of each to measure on, and one to scale by.

    Raises:
        ModelError: a text holds too few.
    """
    return divide(texts, grid.block_size * grid.blocks, calibrate=1, validate=1, refine=(), seed=seed)


def _forecast(model: PreTrainedModel, sequences: Sequences) -> Forecast:
    counts = Counts(len(sequences.calibrate), len(sequences.validate), ())
    prompt = sequences.validate[0]
    return forecast(assessing_stages(counts, seconds_of_prompt(model, prompt)), model, prompt.shape[1])


def summarize(
    costs: Sequence[Costs], missed: Sequence[Table], grid: Grid, equal: Windows, measured: float
) -> Assessment:
    """Combines the costs and the missed shares of all texts, `[layers, heads, blocks]` each."""
    fisher, error = (np.sum(tables, axis=0) for tables in ([c.fisher for c in costs], [c.error for c in costs]))
    total = Costs(fisher, error)
    window = int(equal.min())
    heads = [objective(found, equal)[..., window - 1] for found in costs]
    mean = objective(total, equal)[..., window - 1]
    return Assessment(
        grid=grid,
        window=window,
        missed=_rows(np.mean([share[..., window - 1] for share in missed], axis=0)),
        cost=_rows(mean / (mean.sum() or 1.0)),
        stability=stability(heads),
        measured=measured,
        curve=expected_curve(total, grid, equal, measured),
    )


def stability(heads: Sequence[Table]) -> float | None:
    """Spearman's rank correlation of the heads' costs, `[layers, heads]` each, a mean over the pairs of texts."""
    ranks = [found.ravel().argsort().argsort() for found in heads]
    pairs = [float(np.corrcoef(one, other)[0, 1]) for one, other in combinations(ranks, 2)]
    return float(np.mean(pairs)) if pairs else None


def expected_curve(costs: Costs, grid: Grid, equal: Windows, measured: float) -> tuple[Expected, ...]:
    """The divergence to expect at several densities, from the Fisher costs of single heads and one measurement.

    Costs of single heads ignore how heads compensate for each other or add up. The measured divergence of equal windows
    at the grid's density corrects the scale of the curve, but not its shape.
    """
    pairs = visible_pairs(grid.blocks, grid.sink)
    cost = objective(costs, equal)
    scale = measured / (float(_at(costs.fisher, equal).sum()) or 1.0)
    points = []
    for density in _DENSITIES:
        if density * causal_pairs(grid.blocks) < pairs[0]:
            continue
        budget = density * causal_pairs(grid.blocks) * equal.size
        floor = window_floor(grid.blocks, grid.sink, density)
        by_cost = cheapest_windows(cost, pairs, budget, floor)
        same = uniform_windows(equal.shape[0], equal.shape[1], grid.blocks, grid.sink, density)
        allocated, uniform = (float(_at(costs.fisher, windows).sum()) * scale for windows in (by_cost, same))
        points.append(Expected(density, allocated, uniform))
    return tuple(points)


def _at(table: Table, windows: Windows) -> Table:
    return np.take_along_axis(table, windows[..., None] - 1, axis=2)[..., 0]


def _rows(table: Table) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())
