"""Runs of the frozen model over sequences: what is measured, each step kept in the journal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from surgeon.compiler.learn.pattern import Cut, Grid, Pattern
from surgeon.compiler.learn.responses import block_responses, missed_shares, output_errors, responses
from surgeon.compiler.learn.windows import window_patterns
from surgeon.compiler.progress import Progress

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """What each window costs each head at the dense model, summed over the calibration text: `[layers, heads, blocks]`.

    `fisher` is the expected squared response of the log-likelihood, `error` the squared error behind W_o; entry w - 1
    is for a window of w blocks.
    """

    fisher: Table
    error: Table


@dataclass(frozen=True)
class CutChanges:
    """Linear changes of the divergence: of each window, `[layers, heads, blocks]`, and of each of a head's cuts.

    `cuts[l, h, c]` is for adding cut c of that head to what it sees.
    """

    windows: Table
    cuts: Table


class Runs:
    """Runs a frozen model under the patterns of a grid; `identity` names the model, for the journal."""

    def __init__(
        self,
        model: PreTrainedModel,
        grid: Grid,
        journal: Journal,
        identity: dict[str, object],
        progress: Progress | None,
    ) -> None:
        self._model, self._grid, self._journal, self._progress = model, grid, journal, progress
        self._identity = identity
        self._patterns = window_patterns(grid.blocks, grid.sink)
        self._modules = attention_modules(model)
        self._shape = (len(self._modules), model.config.num_attention_heads, grid.blocks)

    def calibrate(self, sequences: Sequence[torch.Tensor], seed: int) -> Costs:
        """What every window costs at the dense model; next tokens are drawn with the seed."""
        fisher, error = np.zeros(self._shape), np.zeros(self._shape)
        for number, tokens in enumerate(sequences):
            self._report("measuring what each window costs", number, len(sequences))
            found = self._once("calibrate", tokens, partial(self._costs, tokens, seed), seed=seed)
            fisher += found["fisher"].numpy()
            error += found["error"].numpy()
        return Costs(fisher, error)

    def assess(self, tokens: torch.Tensor, seed: int) -> tuple[Costs, Table]:
        """The costs of every window on one sequence, and the share of the dense attention that it misses."""
        found = self._once("assess", tokens, partial(self._costs, tokens, seed, True), seed=seed)
        return Costs(found["fisher"].numpy(), found["error"].numpy()), found["missed"].numpy()

    def validate(self, pattern: Pattern, sequences: Sequence[torch.Tensor], what: str) -> float:
        """The mean divergence from the dense model under a pattern, in nats a token."""
        total = 0.0
        for number, tokens in enumerate(sequences):
            self._report(f"validating {what}", number, len(sequences))
            found = self._once(
                "validate", tokens, partial(self._divergence, pattern, tokens, self._dense(tokens)), **pattern.plain()
            )
            total += float(found["divergence"])
        return total / len(sequences)

    def changes(self, pattern: Pattern, sequences: Sequence[torch.Tensor], what: str) -> Table:
        """The linear change of the divergence, in nats, for each other window: `[layers, heads, blocks]`."""
        total = np.zeros(self._shape)
        for number, tokens in enumerate(sequences):
            self._report(f"refining {what}", number, len(sequences))
            found = self._once(
                "refine", tokens, partial(self._changes, pattern, tokens, self._dense(tokens)), **pattern.plain()
            )
            total += found["changes"].numpy()
        return total

    def block_changes(self, pattern: Pattern, sequences: Sequence[torch.Tensor]) -> Table:
        """The same for each pair of blocks that a head does not see: `[layers, heads, blocks, blocks]`."""
        total = np.zeros((*self._shape, self._grid.blocks))
        for number, tokens in enumerate(sequences):
            self._report("looking for clusters", number, len(sequences))
            found = self._once(
                "blocks", tokens, partial(self._block_changes, pattern, tokens, self._dense(tokens)), **pattern.plain()
            )
            total += found["changes"].numpy()
        return total

    def cut_changes(
        self, pattern: Pattern, cuts: Sequence[Sequence[Sequence[Cut]]], sequences: Sequence[torch.Tensor]
    ) -> CutChanges:
        """The same for windows and for cuts, `cuts[l][h]` as many for every head."""
        windows, added = np.zeros(self._shape), np.zeros((*self._shape[:2], len(cuts[0][0])))
        described = [[[(cut.height, cut.tree.linkage) for cut in head] for head in layer] for layer in cuts]
        for number, tokens in enumerate(sequences):
            self._report("comparing clusters with windows", number, len(sequences))
            compute = partial(self._cut_changes, pattern, cuts, tokens, self._dense(tokens))
            found = self._once("cuts", tokens, compute, candidates=described, **pattern.plain())
            windows += found["windows"].numpy()
            added += found["cuts"].numpy()
        return CutChanges(windows, added)

    def _report(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)

    def _once(
        self, step: str, tokens: torch.Tensor, compute: Callable[[], dict[str, torch.Tensor]], **more: object
    ) -> dict[str, torch.Tensor]:
        grid = self._grid
        described: dict[str, Any] = {"step": step, "tokens": tokens[0].tolist(), "block_size": grid.block_size}
        return self._journal.once(described | {"sink": grid.sink} | self._identity | more, compute)

    def _dense(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._once("dense", tokens, lambda: {"states": dense_states(self._model, tokens)})["states"]

    def _costs(self, tokens: torch.Tensor, seed: int, with_missed: bool = False) -> dict[str, torch.Tensor]:
        fisher, error, missed = (torch.zeros(self._shape, dtype=torch.float64) for _ in range(3))

        def observe(layer: Observation) -> None:
            fisher[layer.layer] = responses(layer, self._patterns)[1]
            error[layer.layer] = output_errors(layer, self._patterns, self._modules[layer.layer].o_proj.weight)
            if with_missed:
                missed[layer.layer] = missed_shares(layer, self._patterns)

        observe_dense(self._model, tokens, torch.Generator().manual_seed(seed), observe)
        return {"fisher": fisher, "error": error} | ({"missed": missed} if with_missed else {})

    def _divergence(self, pattern: Pattern, tokens: torch.Tensor, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        found = sparse_divergence(self._model, tokens, dense, pattern.masks(self._grid))
        return {"divergence": torch.tensor(found, dtype=torch.float64)}

    def _changes(self, pattern: Pattern, tokens: torch.Tensor, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        changes = torch.zeros(self._shape, dtype=torch.float64)

        def observe(layer: Observation) -> None:
            changes[layer.layer] = responses(layer, self._patterns)[0]

        observe_sparse(self._model, tokens, dense, pattern.masks(self._grid), observe)
        return {"changes": changes}

    def _block_changes(self, pattern: Pattern, tokens: torch.Tensor, dense: torch.Tensor) -> dict[str, torch.Tensor]:
        changes = torch.zeros((*self._shape, self._grid.blocks), dtype=torch.float64)
        masks = pattern.masks(self._grid)

        def observe(layer: Observation) -> None:
            changes[layer.layer] = block_responses(layer, masks[layer.layer])

        observe_sparse(self._model, tokens, dense, masks, observe)
        return {"changes": changes}

    def _cut_changes(
        self,
        pattern: Pattern,
        cuts: Sequence[Sequence[Sequence[Cut]]],
        tokens: torch.Tensor,
        dense: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        windows = torch.zeros(self._shape, dtype=torch.float64)
        added = torch.zeros((*self._shape[:2], len(cuts[0][0])), dtype=torch.float64)
        masks = pattern.masks(self._grid)

        def observe(layer: Observation) -> None:
            clusters = [torch.stack([cut.mask() for cut in head]) for head in cuts[layer.layer]]
            candidates = torch.stack(clusters) | masks[layer.layer][:, None]
            windows[layer.layer] = responses(layer, self._patterns)[0]
            added[layer.layer] = responses(layer, candidates)[0]

        observe_sparse(self._model, tokens, dense, masks, observe)
        return {"windows": windows, "cuts": added}
