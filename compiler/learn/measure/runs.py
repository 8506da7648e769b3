"""Runs of the frozen model over sequences: what is measured, each step kept in the journal."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from surgeon.compiler.learn.measure.decoder import (
    Observation,
    attention_modules,
    dense_states,
    observe_dense,
    observe_sparse,
    sparse_divergence,
)
from surgeon.compiler.learn.measure.journal import Journal, Tensors
from surgeon.compiler.learn.measure.responses import block_responses, missed_shares, output_errors, responses
from surgeon.compiler.learn.patterns.pattern import Cut, Grid, Pattern
from surgeon.compiler.learn.patterns.windows import window_patterns
from surgeon.compiler.system.terminal import Progress
from surgeon.runtime.evaluate.processes import processes_of
from surgeon.runtime.transformers.offload import fetched

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
    """Runs a frozen model under the patterns of a grid; `identity` names the model, for the journal.

    Where torch.distributed has several processes, they share the sequences; each must make all the calls.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        grid: Grid,
        journal: Journal,
        identity: dict[str, object],
        progress: Progress | None,
    ) -> None:
        self._model, self._grid, self._journal, self._progress = model, grid, journal, progress
        self._identity, self._processes = identity, processes_of(model)
        self._patterns = window_patterns(grid.blocks, grid.sink)
        self._modules = attention_modules(model)
        self._shape = (len(self._modules), model.config.num_attention_heads, grid.blocks)

    def calibrate(self, sequences: Sequence[torch.Tensor], seed: int) -> Costs:
        """What every window costs at the dense model; next tokens are drawn with the seed."""
        fisher, error = np.zeros(self._shape), np.zeros(self._shape)

        def find(tokens: torch.Tensor) -> Tensors:
            return self._once("calibrate", tokens, partial(self._costs, tokens, seed), seed=seed)

        for found in self._each("measuring what each window costs", sequences, find):
            fisher += found["fisher"].numpy()
            error += found["error"].numpy()
        return Costs(fisher, error)

    def assess(self, sequences: Sequence[torch.Tensor], seed: int) -> list[tuple[Costs, Table]]:
        """Of each sequence, the costs of every window, and the share of the dense attention that it misses."""

        def find(tokens: torch.Tensor) -> Tensors:
            return self._once("assess", tokens, partial(self._costs, tokens, seed, True), seed=seed)

        return [
            (Costs(found["fisher"].numpy(), found["error"].numpy()), found["missed"].numpy())
            for found in self._each("measuring what each window costs", sequences, find)
        ]

    def validate(self, pattern: Pattern, sequences: Sequence[torch.Tensor], what: str) -> float:
        """The mean divergence from the dense model under a pattern, in nats a token."""
        find = self._under(pattern, "validate", self._divergence)
        total = 0.0
        for found in self._each(f"validating {what}", sequences, find):
            total += float(found["divergence"])
        return total / len(sequences)

    def changes(self, pattern: Pattern, sequences: Sequence[torch.Tensor], what: str) -> Table:
        """The linear change of the divergence, in nats, for each other window: `[layers, heads, blocks]`."""
        find = self._under(pattern, "refine", self._changes)
        total = np.zeros(self._shape)
        for found in self._each(f"refining {what}", sequences, find):
            total += found["changes"].numpy()
        return total

    def block_changes(self, pattern: Pattern, sequences: Sequence[torch.Tensor]) -> Table:
        """The same for each pair of blocks that a head does not see: `[layers, heads, blocks, blocks]`."""
        find = self._under(pattern, "blocks", self._block_changes)
        total = np.zeros((*self._shape, self._grid.blocks))
        for found in self._each("looking for clusters", sequences, find):
            total += found["changes"].numpy()
        return total

    def cut_changes(
        self, pattern: Pattern, cuts: Sequence[Sequence[Sequence[Cut]]], sequences: Sequence[torch.Tensor]
    ) -> CutChanges:
        """The same for windows and for cuts, `cuts[l][h]` as many for every head."""
        windows, added = np.zeros(self._shape), np.zeros((*self._shape[:2], len(cuts[0][0])))
        described = [[[(cut.height, cut.tree.linkage) for cut in head] for head in layer] for layer in cuts]
        find = self._under(pattern, "cuts", partial(self._cut_changes, cuts), candidates=described)
        for found in self._each("comparing clusters with windows", sequences, find):
            windows += found["windows"].numpy()
            added += found["cuts"].numpy()
        return CutChanges(windows, added)

    def mask_changes(
        self, pattern: Pattern, candidates: torch.Tensor, sequences: Sequence[torch.Tensor], what: str
    ) -> Table:
        """The same for whole masks in place of the pattern's, as many for every head: `[layers, heads, candidates]`.

        `candidates` is bool `[layers, heads, candidates, blocks, blocks]`.
        """
        digest = hashlib.sha256(candidates.numpy().tobytes()).hexdigest()
        find = self._under(pattern, "masks", partial(self._mask_changes, candidates), candidates=digest)
        total = np.zeros(candidates.shape[:3])
        for found in self._each(what, sequences, find):
            total += found["changes"].numpy()
        return total

    def _each(
        self, what: str, sequences: Sequence[torch.Tensor], find: Callable[[torch.Tensor], Tensors]
    ) -> Iterator[Tensors]:
        """What is found on each sequence, in their order whatever process finds it, so that sums are equal in all."""

        def find_own(number: int) -> Tensors:
            if self._progress is not None:
                self._progress(what, number, len(sequences))
            return find(sequences[number])

        return self._processes.share(len(sequences), find_own)

    def _under(
        self,
        pattern: Pattern,
        step: str,
        compute: Callable[[Pattern, torch.Tensor, torch.Tensor], Tensors],
        **more: object,
    ) -> Callable[[torch.Tensor], Tensors]:
        """A step under a pattern, for which `compute` also gets the dense model's states of the sequence."""

        def find(tokens: torch.Tensor) -> Tensors:
            return self._once(
                step, tokens, partial(compute, pattern, tokens, self._dense(tokens)), **more, **pattern.plain()
            )

        return find

    def _once(self, step: str, tokens: torch.Tensor, compute: Callable[[], Tensors], **more: object) -> Tensors:
        grid = self._grid
        described: dict[str, Any] = {"step": step, "tokens": tokens[0].tolist(), "block_size": grid.block_size}
        return self._journal.once(described | {"sink": grid.sink} | self._identity | more, compute)

    def _dense(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._once("dense", tokens, lambda: {"states": dense_states(self._model, tokens)})["states"]

    def _costs(self, tokens: torch.Tensor, seed: int, with_missed: bool = False) -> Tensors:
        fisher, error, missed = (torch.zeros(self._shape, dtype=torch.float64) for _ in range(3))

        def observe(layer: Observation) -> None:
            fisher[layer.layer] = responses(layer, self._patterns)[1]
            error[layer.layer] = output_errors(
                layer, self._patterns, fetched(self._modules[layer.layer].o_proj, "weight")
            )
            if with_missed:
                missed[layer.layer] = missed_shares(layer, self._patterns)

        observe_dense(self._model, tokens, torch.Generator().manual_seed(seed), observe)
        return {"fisher": fisher, "error": error} | ({"missed": missed} if with_missed else {})

    def _divergence(self, pattern: Pattern, tokens: torch.Tensor, dense: torch.Tensor) -> Tensors:
        found = sparse_divergence(self._model, tokens, dense, pattern.masks(self._grid))
        return {"divergence": torch.tensor(found, dtype=torch.float64)}

    def _changes(self, pattern: Pattern, tokens: torch.Tensor, dense: torch.Tensor) -> Tensors:
        changes = torch.zeros(self._shape, dtype=torch.float64)

        def observe(layer: Observation) -> None:
            changes[layer.layer] = responses(layer, self._patterns)[0]

        observe_sparse(self._model, tokens, dense, pattern.masks(self._grid), observe)
        return {"changes": changes}

    def _block_changes(self, pattern: Pattern, tokens: torch.Tensor, dense: torch.Tensor) -> Tensors:
        changes = torch.zeros((*self._shape, self._grid.blocks), dtype=torch.float64)
        masks = pattern.masks(self._grid)

        def observe(layer: Observation) -> None:
            changes[layer.layer] = block_responses(layer, masks[layer.layer])

        observe_sparse(self._model, tokens, dense, masks, observe)
        return {"changes": changes}

    def _mask_changes(
        self, candidates: torch.Tensor, pattern: Pattern, tokens: torch.Tensor, dense: torch.Tensor
    ) -> Tensors:
        changes = torch.zeros(candidates.shape[:3], dtype=torch.float64)

        def observe(layer: Observation) -> None:
            changes[layer.layer] = responses(layer, candidates[layer.layer])[0]

        observe_sparse(self._model, tokens, dense, pattern.masks(self._grid), observe)
        return {"changes": changes}

    def _cut_changes(
        self,
        cuts: Sequence[Sequence[Sequence[Cut]]],
        pattern: Pattern,
        tokens: torch.Tensor,
        dense: torch.Tensor,
    ) -> Tensors:
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
