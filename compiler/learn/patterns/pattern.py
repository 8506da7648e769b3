"""A pattern while it is being learned: a window for every head, and a cut for those that were admitted one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from surgeon.compiler.learn.patterns.windows import Windows, visible_pairs, window_patterns
from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.compiler.topology.pairs import cluster_pairs

_QUESTION = 128  # tokens at a prompt's end that see everything, as a patched model's do by default
_ANSWER = 256  # tokens that follow


@dataclass(frozen=True)
class Grid:
    """The grid of learning: tokens per block, blocks per sequence, sink blocks, and the density to reach.

    Under dense recall, the last `asking` rows of blocks see everything; `scored` is the number of tokens at the end
    whose distributions count, 0 for all.
    """

    block_size: int
    blocks: int
    sink: int
    density: float
    asking: int = 0
    scored: int = 0

    @classmethod
    def for_answers(cls, block_size: int, blocks: int, sink: int, density: float) -> "Grid":
        """The grid of a prompt, whose end asks, and of the tokens that follow it, which alone are scored."""
        length = block_size * blocks
        scored = min(_ANSWER, length // 8)
        asked = min(_QUESTION, length // 16)
        return cls(block_size, blocks, sink, density, blocks - (length - scored - asked) // block_size, scored)

    def with_asking(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks `[..., blocks, blocks]` whose last `asking` rows see every block up to their own."""
        rows = torch.arange(self.blocks)[:, None]
        return masks | ((rows >= self.blocks - self.asking) & (torch.arange(self.blocks) <= rows))


@dataclass(frozen=True)
class Cut:
    """A head's clusters: a tree, and the height up to which its blocks see each other."""

    tree: Dendrogram
    height: float

    def mask(self) -> torch.Tensor:
        """The pairs of blocks that share a cluster, up to the diagonal: bool `[blocks, blocks]`."""
        return torch.from_numpy(self.tree.distances() <= self.height).tril()


@dataclass(frozen=True)
class Pattern:
    """The windows of all heads, `[layers, heads]`, and the cuts of some, by layer and head."""

    windows: Windows
    cuts: Mapping[tuple[int, int], Cut] = field(default_factory=dict)

    def masks(self, grid: Grid) -> Sequence[torch.Tensor]:
        """Expands the pattern: bool `[heads, blocks, blocks]` for each layer."""
        windows = window_patterns(grid.blocks, grid.sink)
        masks = [windows[torch.from_numpy(layer) - 1] for layer in self.windows]
        for (layer, head), cut in self.cuts.items():
            masks[layer][head] |= cut.mask()
        return [grid.with_asking(mask) for mask in masks]

    def visible_pairs(self, grid: Grid) -> npt.NDArray[np.float64]:
        """Counts the pairs of blocks that each head sees, `[layers, heads]`."""
        pairs = visible_pairs(grid.blocks, grid.sink)[self.windows - 1]
        for place, cut in self.cuts.items():
            pairs[place] += cluster_pairs(grid.blocks, grid.sink, int(self.windows[place]), cut.tree, cut.height)
        return pairs

    def plain(self) -> Any:
        """The pattern as JSON values."""
        cuts = [
            [*place, self.cuts[place].height, [list(row) for row in self.cuts[place].tree.linkage]]
            for place in sorted(self.cuts)
        ]
        return {"windows": self.windows.tolist()} | ({"cuts": cuts} if cuts else {})
