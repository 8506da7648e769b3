"""The learned topology: the definition of the blocks that each attention head sees.

Source: topology.json versions 1 and 2 (`topology.schema.json` beside this file).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.compiler.topology.pairs import causal_pairs, cluster_counts, cluster_pairs, window_pairs
from surgeon.compiler.topology.router import Router
from surgeon.runtime.errors import TopologyError
from surgeon.runtime.package.manifest import ModelShape
from surgeon.runtime.package.schedule import NODE, TILE


@dataclass(frozen=True)
class DenseHead:
    """A head that sees every block up to its own."""


@dataclass(frozen=True)
class WindowHead:
    """A head that sees the first `sink` blocks and the last `window` blocks, and so needs no tree.

    It may choose up to `route` more blocks by their content.
    """

    sink: int
    window: int
    route: int = 0


@dataclass(frozen=True)
class SparseHead:
    """A head that sees the first `sink` blocks, the last `window` blocks, and its own cluster under `cut`.

    `dendrogram` is an index into the topology's dendrograms; sink and window are in blocks, and cut is a tree height.
    It may choose up to `route` more blocks by their content.
    """

    dendrogram: int
    cut: float
    sink: int
    window: int
    route: int = 0


Head = DenseHead | WindowHead | SparseHead


@dataclass(frozen=True)
class Topology:
    """The heads of every layer, and the trees that their clusters come from, as checked by `read_topology`.

    `layers[l][h]` is query head h of layer l; a layer without heads, null in the file, is not covered: it has no kernel
    and keeps the model's own attention. `block_size` is in tokens; `beyond` says what rows from `num_blocks` on see
    besides sink and window: "window" nothing, "dense" everything, and "error" refuses such rows. `router` is None
    where no head is routed.
    """

    model: ModelShape
    block_size: int
    num_blocks: int
    dendrograms: tuple[Dendrogram, ...]
    layers: tuple[tuple[Head, ...], ...]
    beyond: str
    provenance: Mapping[str, Any]
    router: Router | None = None

    def block_mask(self, layer: int, num_blocks: int) -> npt.NDArray[np.bool_]:
        """The blocks that each head sees, straight from the definition: bool `[heads, num_blocks, num_blocks]`.

        visible(i, j) ⇔ j ≤ i and (j < sink or i − j < window or d(i,j) ≤ cut). `num_blocks` may be any length. What
        routed heads choose besides depends on the text.

        Raises:
            TopologyError: the length is beyond the topology's own and `beyond` is "error".
        """
        self._check_length(num_blocks, "block_mask")
        row = np.arange(num_blocks)[:, None]
        column = np.arange(num_blocks)[None, :]
        causal = column <= row
        used = {head.dendrogram for head in self.layers[layer] if isinstance(head, SparseHead)}
        distances = {index: self.dendrograms[index].distances() for index in used}
        mask = np.zeros((len(self.layers[layer]), num_blocks, num_blocks), dtype=np.bool_)
        for index, head in enumerate(self.layers[layer]):
            if isinstance(head, DenseHead):
                mask[index] = causal
                continue
            near = np.zeros((num_blocks, num_blocks), dtype=np.bool_)
            if isinstance(head, SparseHead):
                known = min(num_blocks, self.num_blocks)
                near[:known, :known] = distances[head.dendrogram][:known, :known] <= head.cut
            if self.beyond == "dense":
                near[self.num_blocks :, :] = True
            mask[index] = causal & ((column < head.sink) | (row - column < head.window) | near)
        return mask

    @property
    def covered(self) -> tuple[int, ...]:
        """The layers that are covered, ascending."""
        return tuple(layer for layer, heads in enumerate(self.layers) if heads)

    def visible_pairs(self, head: Head, num_blocks: int | None = None) -> int:
        """Counts the pairs of blocks that one of its heads sees, at `num_blocks` or its own length.

        They are those of the mask and, in every row, as many more as a routed head may choose.

        Raises:
            TopologyError: as in `block_mask`.
        """
        length = self.num_blocks if num_blocks is None else num_blocks
        self._check_length(length, "density")
        if isinstance(head, DenseHead):
            return causal_pairs(length)
        known = min(length, self.num_blocks)
        sparse = known if self.beyond == "dense" else length
        pairs = window_pairs(sparse, head.sink, head.window) + causal_pairs(length) - causal_pairs(sparse)
        if isinstance(head, SparseHead):
            pairs += cluster_pairs(known, head.sink, head.window, self.dendrograms[head.dendrogram], head.cut)
        return pairs + (self._chosen_pairs(head, known, sparse) if head.route else 0)

    def _chosen_pairs(self, head: WindowHead | SparseHead, known: int, sparse: int) -> int:
        """Counts the pairs that a routed head chooses in its first `sparse` rows; trees are over the first `known`."""
        hidden = np.maximum(np.arange(1, sparse + 1) - head.sink - head.window, 0)
        if isinstance(head, SparseHead):
            tree = self.dendrograms[head.dendrogram]
            hidden[:known] -= cluster_counts(known, head.sink, head.window, tree, head.cut)
        return int(np.minimum(hidden, head.route).sum())

    def density(self, layer: int, num_blocks: int | None = None) -> npt.NDArray[np.float64]:
        """Visible pairs over causal pairs of blocks, per head: `[num_attention_heads]`.

        Raises:
            TopologyError: as in `block_mask`.
        """
        pairs = {head: self.visible_pairs(head, num_blocks) for head in set(self.layers[layer])}
        causal = causal_pairs(self.num_blocks if num_blocks is None else num_blocks)
        return np.array([pairs[head] / causal for head in self.layers[layer]], dtype=np.float64)

    def _check_length(self, num_blocks: int, where: str) -> None:
        if num_blocks > self.num_blocks and self.beyond == "error":
            raise TopologyError(
                where,
                f"at most {self.num_blocks} blocks, which the topology covers (beyond: error)",
                str(num_blocks),
                'shorten the sequence, or set "beyond" to "window" or "dense"',
            )

    def canonical(self) -> str:
        """The topology as JSON in one canonical form: keys sorted, trees as linkages, no provenance.

        It is of version 2 only if a head is routed.
        """
        return json.dumps(
            {
                "format": "surgeon.topology",
                "version": 1 if self.router is None else 2,
                "model": asdict(self.model),
                "block_size": self.block_size,
                "num_blocks": self.num_blocks,
                "dendrograms": [{"linkage": tree.linkage} for tree in self.dendrograms],
                "layers": [_layer_json(heads) for heads in self.layers],
                "beyond": self.beyond,
            }
            | ({} if self.router is None else {"router": _router_json(self.router)}),
            sort_keys=True,
            separators=(",", ":"),
        )

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the canonical JSON: equal for files that mean the same kernels."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def mean_density(topology: Topology, num_blocks: int | None = None) -> float:
    """Visible pairs over causal pairs of blocks, over the heads of all covered layers.

    Raises:
        TopologyError: as in `Topology.block_mask`.
    """
    heads = Counter(head for layer in topology.layers for head in layer)
    pairs = sum(topology.visible_pairs(head, num_blocks) * count for head, count in heads.items())
    return pairs / (causal_pairs(topology.num_blocks if num_blocks is None else num_blocks) * heads.total())


def _layer_json(heads: tuple[Head, ...]) -> dict[str, Any] | None:
    return {"heads": [_head_json(head) for head in heads]} if heads else None


def _head_json(head: Head) -> dict[str, Any]:
    if isinstance(head, DenseHead):
        return {"dense": True}
    return {name: value for name, value in asdict(head).items() if name != "route" or value}


def _router_json(router: Router) -> dict[str, Any]:
    return {"node": NODE, "tile": TILE, "layers": [layer and asdict(layer) for layer in router.layers]}
