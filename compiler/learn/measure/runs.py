"""Measures the frozen model over sequences, each step once: results are kept in the checkpoint store."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from surgeon.compiler.learn.measure.attending import Attend
from surgeon.compiler.learn.measure.checkpoint_store import CheckpointStore, Tensors
from surgeon.compiler.learn.measure.decoder import (
    Observation,
    Observer,
    attended_divergence,
    dense_states,
    observe_dense,
    observe_sparse,
    sparse_divergence,
)
from surgeon.compiler.learn.measure.responses import block_responses, missed_shares, output_errors, responses
from surgeon.compiler.learn.patterns.pattern import Cut, Grid, Pattern
from surgeon.compiler.learn.patterns.windows import window_patterns
from surgeon.compiler.system.terminal import Progress
from surgeon.runtime.evaluate.processes import processes_of
from surgeon.runtime.transformers.layers import find_attention
from surgeon.runtime.transformers.offload import fetched

Table = npt.NDArray[np.float64]
Quantities = Mapping[str, Callable[[Observation], torch.Tensor]]
"""Quantities computed from each layer's attention, by name; a step keeps one tensor of each, `[layers, ...]`."""


@dataclass(frozen=True)
class Costs:
    """The cost of each window for each head at the dense model, summed over the text: `[layers, heads, blocks]`.

    `fisher` is the expected squared response of the log-likelihood, `error` the squared error after W_o; entry w - 1
    is for a window of w blocks.
    """

    fisher: Table
    error: Table


@dataclass(frozen=True)
class CutChanges:
    """Linear changes of the divergence: for each window, `[layers, heads, blocks]`, and for each of a head's cuts.

    `cuts[l, h, c]` is for adding cut c of that head to what it sees.
    """

    windows: Table
    cuts: Table


class Runs:
    """Runs a frozen model under the patterns of a grid; `identity` names the model, for the checkpoint store.

    `what` is the text that a progress display shows meanwhile. If torch.distributed has several processes, they share
    the sequences; each must make all the calls.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        grid: Grid,
        store: CheckpointStore,
        identity: dict[str, object],
        progress: Progress | None,
    ) -> None:
        self._model, self._grid, self._store, self._progress = model, grid, store, progress
        self._identity, self._processes = identity, processes_of(model)
        windows = grid.with_asking(window_patterns(grid.blocks, grid.sink))
        projections = [module.get_submodule("o_proj") for _, module in find_attention(model)]
        self._window_changes: Quantities = {"changes": lambda layer: responses(layer, windows)[0]}
        self._window_costs: Quantities = {
            "fisher": lambda layer: responses(layer, windows)[1],
            "error": lambda layer: output_errors(layer, windows, fetched(projections[layer.layer], "weight")),
        }
        self._missed: Quantities = {"missed": lambda layer: missed_shares(layer, windows)}

    def calibrate(self, sequences: Sequence[torch.Tensor], seed: int) -> Costs:
        """Measures the cost of every window at the dense model; next tokens are drawn with the seed."""
        total = _total(self._at_dense("calibrate", sequences, self._window_costs, seed))
        return Costs(total["fisher"], total["error"])

    def assess(self, sequences: Sequence[torch.Tensor], seed: int) -> list[tuple[Costs, Table]]:
        """Measures, for each sequence, every window's costs and the share of the dense attention that it misses."""
        each = self._at_dense("assess", sequences, {**self._window_costs, **self._missed}, seed)
        return [(Costs(found["fisher"].numpy(), found["error"].numpy()), found["missed"].numpy()) for found in each]

    def validate(self, pattern: Pattern, sequences: Sequence[torch.Tensor], what: str) -> float:
        """The mean divergence from the dense model under a pattern, in nats per token."""
        masks = pattern.masks(self._grid)

        def compute(tokens: torch.Tensor, dense: torch.Tensor) -> Tensors:
            found = sparse_divergence(self._model, tokens, dense, masks, self._grid.scored)
            return {"divergence": torch.tensor(found, dtype=torch.float64)}

        each = self._measure("validate", sequences, f"validating {what}", compute, **pattern.plain())
        return _mean_divergence(each)

    def validate_attention(
        self, attend: Attend, identity: Mapping[str, object], sequences: Sequence[torch.Tensor], what: str
    ) -> float:
        """The same under any attention; `identity` is all that makes it what it is, as JSON values."""

        def compute(tokens: torch.Tensor, dense: torch.Tensor) -> Tensors:
            found = attended_divergence(self._model, tokens, dense, attend, self._grid.scored)
            return {"divergence": torch.tensor(found, dtype=torch.float64)}

        return _mean_divergence(
            self._measure("validate attention", sequences, f"validating {what}", compute, **identity)
        )

    def changes(self, pattern: Pattern, sequences: Sequence[torch.Tensor], what: str) -> Table:
        """The linear change of the divergence, in nats, for each other window: `[layers, heads, blocks]`."""
        return self._at("refine", pattern, sequences, f"refining {what}", self._window_changes)["changes"]

    def block_changes(self, pattern: Pattern, sequences: Sequence[torch.Tensor]) -> Table:
        """The same for each pair of blocks that a head does not see: `[layers, heads, blocks, blocks]`."""
        masks = pattern.masks(self._grid)
        quantities: Quantities = {"changes": lambda layer: block_responses(layer, masks[layer.layer])}
        return self._at("blocks", pattern, sequences, "looking for clusters", quantities)["changes"]

    def cut_changes(
        self, pattern: Pattern, cuts: Sequence[Sequence[Sequence[Cut]]], sequences: Sequence[torch.Tensor]
    ) -> CutChanges:
        """The same for windows and for cuts, with equally many `cuts[l][h]` for every head."""
        masks = pattern.masks(self._grid)

        def added(layer: Observation) -> torch.Tensor:
            clusters = torch.stack([torch.stack([cut.mask() for cut in head]) for head in cuts[layer.layer]])
            return responses(layer, clusters | masks[layer.layer][:, None])[0]

        described = [[[(cut.height, cut.tree.linkage) for cut in head] for head in layer] for layer in cuts]
        quantities: Quantities = {"windows": self._window_changes["changes"], "cuts": added}
        what = "comparing clusters with windows"
        total = self._at("cuts", pattern, sequences, what, quantities, candidates=described)
        return CutChanges(total["windows"], total["cuts"])

    def mask_changes(
        self, pattern: Pattern, candidates: torch.Tensor, sequences: Sequence[torch.Tensor], what: str
    ) -> Table:
        """The same for whole masks in place of the pattern's, equally many per head: `[layers, heads, candidates]`.

        `candidates` is bool `[layers, heads, candidates, blocks, blocks]`.
        """
        digest = hashlib.sha256(candidates.numpy().tobytes()).hexdigest()
        quantities: Quantities = {"changes": lambda layer: responses(layer, candidates[layer.layer])[0]}
        return self._at("masks", pattern, sequences, what, quantities, candidates=digest)["changes"]

    def _at_dense(
        self, step: str, sequences: Sequence[torch.Tensor], quantities: Quantities, seed: int
    ) -> list[Tensors]:
        """Measures quantities at the dense model, for each sequence."""

        def compute(tokens: torch.Tensor) -> Tensors:
            generator = torch.Generator().manual_seed(seed)
            return _by_layer(
                quantities, partial(observe_dense, self._model, tokens, generator, scored=self._grid.scored)
            )

        def find(tokens: torch.Tensor) -> Tensors:
            return self._once(step, tokens, partial(compute, tokens), seed=seed)

        return self._each("measuring what each window costs", sequences, find)

    def _at(
        self,
        step: str,
        pattern: Pattern,
        sequences: Sequence[torch.Tensor],
        what: str,
        quantities: Quantities,
        **key: object,
    ) -> dict[str, Table]:
        """Measures quantities at the sparse model and sums them over the sequences."""
        masks = pattern.masks(self._grid)

        def compute(tokens: torch.Tensor, dense: torch.Tensor) -> Tensors:
            return _by_layer(
                quantities, partial(observe_sparse, self._model, tokens, dense, masks, scored=self._grid.scored)
            )

        return _total(self._measure(step, sequences, what, compute, **key, **pattern.plain()))

    def _measure(
        self,
        step: str,
        sequences: Sequence[torch.Tensor],
        what: str,
        compute: Callable[[torch.Tensor, torch.Tensor], Tensors],
        **key: object,
    ) -> list[Tensors]:
        """Measures a step at a sparse model; `compute` gets a sequence and the dense model's last hidden states."""

        def find(tokens: torch.Tensor) -> Tensors:
            dense = self._once("dense", tokens, lambda: {"states": dense_states(self._model, tokens)})["states"]
            return self._once(step, tokens, partial(compute, tokens, dense), **key)

        return self._each(what, sequences, find)

    def _each(
        self, what: str, sequences: Sequence[torch.Tensor], find: Callable[[torch.Tensor], Tensors]
    ) -> list[Tensors]:
        """Collects the results of all sequences in order, whichever process finds them, so that all sums are equal."""

        def find_own(number: int) -> Tensors:
            if self._progress is not None:
                self._progress(what, number, len(sequences))
            return find(sequences[number])

        return list(self._processes.share(len(sequences), find_own))

    def _once(self, step: str, tokens: torch.Tensor, compute: Callable[[], Tensors], **key: object) -> Tensors:
        grid = self._grid
        described: dict[str, Any] = {"step": step, "tokens": tokens[0].tolist(), "block_size": grid.block_size}
        if grid.asking:  # left out otherwise, so that what was kept before there was dense recall is found
            described |= {"asking": grid.asking, "scored": grid.scored}
        return self._store.once(described | {"sink": grid.sink} | self._identity | key, compute)


def _by_layer(quantities: Quantities, run: Callable[[Observer], object]) -> Tensors:
    """The quantities of all layers that a run of the model shows to its observer, `[layers, ...]` each."""
    rows: dict[str, dict[int, torch.Tensor]] = {name: {} for name in quantities}

    def observe(layer: Observation) -> None:
        for name, quantity in quantities.items():
            rows[name][layer.layer] = quantity(layer).cpu()

    run(observe)
    return {name: torch.stack([found[layer] for layer in sorted(found)]) for name, found in rows.items()}


def _mean_divergence(each: Sequence[Tensors]) -> float:
    return sum(float(found["divergence"]) for found in each) / len(each)


def _total(each: Sequence[Tensors]) -> dict[str, Table]:
    """The sums over the sequences."""
    return {name: reduce(torch.add, [found[name] for found in each]).numpy() for name in each[0]}
