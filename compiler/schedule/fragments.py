"""Fragments: the ranges of rows that a head's clusters cut its blocks into, found without a loop over blocks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.compiler.topology.topology import Head, SparseHead, Topology, WindowHead

Ints = npt.NDArray[np.int64]

HIDDEN = -1
"""The label of blocks whose whole cluster lies within the window: they read what a head without clusters reads."""


@dataclass(frozen=True, eq=False)
class CutBlocks:
    """The clusters of one cut, `[blocks]` each: a block's cluster, the first and the last block of that cluster."""

    labels: Ints
    first: Ints
    last: Ints

    @classmethod
    def of(cls, tree: Dendrogram, cut: float) -> "CutBlocks":
        """Cuts a tree."""
        labels = tree.labels(cut)
        blocks = np.arange(len(labels))
        ends = np.empty((2, int(labels.max()) + 1), dtype=np.int64)
        ends[0, labels[::-1]] = blocks[::-1]  # of equal indices the last one stays
        ends[1, labels] = blocks
        return cls(labels, ends[0, labels], ends[1, labels])

    @classmethod
    def alone(cls, num_blocks: int) -> "CutBlocks":
        """Every block a cluster of its own, as in a head without a tree."""
        blocks = np.arange(num_blocks)
        return cls(blocks, blocks, blocks)

    def hidden(self, window: int) -> npt.NDArray[np.bool_]:
        """True for blocks whose cluster no row sees beyond its window, `[blocks]`."""
        return self.last - self.first < window

    def fragments(self, window: int) -> tuple[Ints, Ints]:
        """The first rows of the ranges of one label, and their labels: of clusters, or `HIDDEN`."""
        labels = np.where(self.hidden(window), HIDDEN, self.labels)
        begins = np.flatnonzero(np.diff(labels, prepend=HIDDEN - 1))
        return begins, labels[begins]


def by_cut(
    topology: Topology, heads: Iterable[Head]
) -> Iterator[tuple[CutBlocks, tuple[WindowHead | SparseHead, ...]]]:
    """Yields every cut that heads share, and these heads, but no dense ones; only one cut is held at a time."""
    given = tuple(heads)
    windows = tuple(head for head in given if isinstance(head, WindowHead))
    if windows:
        yield CutBlocks.alone(topology.num_blocks), windows
    ordered = sorted(
        (head for head in given if isinstance(head, SparseHead)), key=lambda head: (head.dendrogram, head.cut)
    )
    for (index, cut), sharers in groupby(ordered, key=lambda head: (head.dendrogram, head.cut)):
        yield CutBlocks.of(topology.dendrograms[index], cut), tuple(sharers)
