"""Learns how many blocks each head gets: text ─▶ costs ─▶ windows ─▶ refined windows, the model frozen throughout.

What a static pattern gains on text that it was not learned on lies in how long each head's window is. The costs of all
windows are measured once at the dense model, a knapsack shares the budget, and rounds at the sparse model correct what
separate costs cannot know: that heads make up for each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from surgeon.compiler.learn.decoder import (
    Observation,
    attention_modules,
    dense_states,
    observe_dense,
    observe_sparse,
    sparse_divergence,
)
from surgeon.compiler.learn.journal import Journal
from surgeon.compiler.learn.knapsack import allocate
from surgeon.compiler.learn.refine import Trust, refined_windows
from surgeon.compiler.learn.responses import output_errors, responses
from surgeon.compiler.learn.text import Sequences
from surgeon.compiler.learn.windows import (
    Windows,
    causal_pairs,
    uniform_windows,
    visible_pairs,
    window_floor,
    window_masks,
    window_patterns,
)
from surgeon.compiler.progress import Progress

Table = npt.NDArray[np.float64]
_SMALLEST_REACH = 0.2


@dataclass(frozen=True)
class Grid:
    """What is learned for: tokens a block, blocks a sequence, blocks of sink, and the share of pairs to be visible."""

    block_size: int
    blocks: int
    sink: int
    density: float


@dataclass(frozen=True)
class Costs:
    """What each window costs each head at the dense model, summed over the calibration text: `[layers, heads, blocks]`.

    `fisher` is the expected squared response of the log-likelihood, `error` the squared error behind W_o; entry w - 1
    is for a window of w blocks.
    """

    fisher: Table
    error: Table


@dataclass(frozen=True)
class Round:
    """A step of the refinement: how far it reached, the divergence it led to (nats a token), and if it was kept."""

    reach: float
    divergence: float
    kept: bool


@dataclass(frozen=True)
class Learned:
    """The windows, and the divergence on the validation text (nats a token): theirs, and equal windows' beside it."""

    windows: Windows
    divergence: float
    uniform_divergence: float
    rounds: tuple[Round, ...] = field(default=())


def learn_windows(
    model: PreTrainedModel,
    sequences: Sequences,
    grid: Grid,
    seed: int,
    journal: Journal,
    identity: dict[str, object],
    progress: Progress | None = None,
) -> Learned:
    """Learns the windows of a frozen model.

    `identity` names the model and text, for the journal.

    Raises:
        TopologyError: the density is out of reach.
    """
    meter = _Meter(progress)
    runs = _Runs(model, grid, journal, identity, meter)
    pairs = visible_pairs(grid.blocks, grid.sink)
    floor = window_floor(grid.blocks, grid.sink, grid.density)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    uniform = uniform_windows(layers, heads, grid.blocks, grid.sink, grid.density)
    budget = grid.density * causal_pairs(grid.blocks) * uniform.size

    costs = runs.calibrate(sequences.calibrate, seed)
    windows = cheapest_windows(objective(costs, uniform), pairs, budget, floor)
    uniform_divergence = runs.validate(uniform, sequences.validate, "equal windows")
    best = runs.validate(windows, sequences.validate, "allocated windows")
    rounds: list[Round] = []
    trust = Trust(1.0)
    for number, fresh in enumerate(sequences.refine):
        changes = runs.changes(windows, fresh, f"round {number + 1} from KL {best:.4f}")
        while trust.reach > _SMALLEST_REACH:
            proposed = refined_windows(windows, changes, grid.sink, budget, floor, trust)
            found = runs.validate(proposed, sequences.validate, f"round {number + 1}, KL to beat {best:.4f}")
            kept = found < best
            rounds.append(Round(trust.reach, found, kept))
            if kept:
                windows, best = proposed, found
                break
            trust = trust.narrower()
    return Learned(windows, best, uniform_divergence, tuple(rounds))


def objective(costs: Costs, uniform: Windows) -> Table:
    """Fisher cost plus output error, each relative to what equal windows cost: `[layers, heads, blocks]`.

    An output error counts as much in a layer as the layer's Fisher cost does: the Fisher cost, one draw a token, knows
    what a layer matters; the error, without noise, knows the heads within it.
    """
    at = uniform[..., None] - 1
    fisher, error = (np.take_along_axis(table, at, axis=2).sum(axis=(1, 2)) for table in (costs.fisher, costs.error))
    weight = np.divide(fisher, error, out=np.zeros_like(fisher), where=error > 0)
    total = float(fisher.sum()) or 1.0
    table: Table = (costs.fisher + costs.error * weight[:, None, None]) / total
    return table


def cheapest_windows(cost: Table, pairs: Table, budget: float, floor: int) -> Windows:
    """The windows of at least `floor` blocks that cost least within the budget: `[layers, heads]`."""
    rows = cost.reshape(-1, cost.shape[2])
    chosen = allocate([pairs[floor - 1 :]] * len(rows), [row[floor - 1 :] for row in rows], budget)
    return np.array(chosen, dtype=np.int64).reshape(cost.shape[:2]) + floor


class _Meter:
    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)


class _Runs:
    """Runs of the model, each kept in the journal."""

    def __init__(
        self,
        model: PreTrainedModel,
        grid: Grid,
        journal: Journal,
        identity: dict[str, object],
        meter: Callable[[str, int, int], None],
    ) -> None:
        self._model, self._grid, self._journal, self._meter = model, grid, journal, meter
        self._identity = identity
        self._patterns = window_patterns(grid.blocks, grid.sink)
        self._modules = attention_modules(model)
        self._shape = (len(self._modules), model.config.num_attention_heads, grid.blocks)

    def calibrate(self, sequences: Sequence[torch.Tensor], seed: int) -> Costs:
        fisher, error = np.zeros(self._shape), np.zeros(self._shape)
        for number, tokens in enumerate(sequences):
            self._meter("measuring what each window costs", number, len(sequences))
            found = self._once("calibrate", tokens, partial(self._costs, tokens, seed), seed=seed)
            fisher += found["fisher"].numpy()
            error += found["error"].numpy()
        return Costs(fisher, error)

    def validate(self, windows: Windows, sequences: Sequence[torch.Tensor], what: str) -> float:
        total = 0.0
        for number, tokens in enumerate(sequences):
            self._meter(f"validating {what}", number, len(sequences))
            found = self._once("validate", tokens, partial(self._divergence, windows, tokens), windows=windows.tolist())
            total += float(found["divergence"])
        return total / len(sequences)

    def changes(self, windows: Windows, sequences: Sequence[torch.Tensor], what: str) -> Table:
        total = np.zeros(self._shape)
        for number, tokens in enumerate(sequences):
            self._meter(f"refining, {what}", number, len(sequences))
            found = self._once("refine", tokens, partial(self._changes, windows, tokens), windows=windows.tolist())
            total += found["changes"].numpy()
        return total

    def _once(
        self, step: str, tokens: torch.Tensor, compute: Callable[[], dict[str, torch.Tensor]], **more: object
    ) -> dict[str, torch.Tensor]:
        grid = self._grid
        described: dict[str, Any] = {"step": step, "tokens": tokens[0].tolist(), "block_size": grid.block_size}
        return self._journal.once(described | {"sink": grid.sink} | self._identity | more, compute)

    def _costs(self, tokens: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
        fisher, error = (torch.zeros(self._shape, dtype=torch.float64) for _ in range(2))

        def observe(layer: Observation) -> None:
            projection = self._modules[layer.layer].o_proj.weight
            fisher[layer.layer] = responses(layer, self._patterns)[1]
            error[layer.layer] = output_errors(layer, self._patterns, projection)

        observe_dense(self._model, tokens, torch.Generator().manual_seed(seed), observe)
        return {"fisher": fisher, "error": error}

    def _dense(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._once("dense", tokens, lambda: {"states": dense_states(self._model, tokens)})["states"]

    def _divergence(self, windows: Windows, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        masks = window_masks(windows, self._grid.blocks, self._grid.sink)
        found = sparse_divergence(self._model, tokens, self._dense(tokens), masks)
        return {"divergence": torch.tensor(found, dtype=torch.float64)}

    def _changes(self, windows: Windows, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        changes = torch.zeros(self._shape, dtype=torch.float64)

        def observe(layer: Observation) -> None:
            changes[layer.layer] = responses(layer, self._patterns)[0]

        masks = window_masks(windows, self._grid.blocks, self._grid.sink)
        observe_sparse(self._model, tokens, self._dense(tokens), masks, observe)
        return {"changes": changes}
