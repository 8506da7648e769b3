"""Counts of pairs of a row and a key block, computed without a mask: the basis of every density."""

import numpy as np
import numpy.typing as npt

from surgeon.compiler.topology.dendrogram import Dendrogram


def causal_pairs(blocks: int) -> int:
    """Counts the pairs of blocks that a dense head sees."""
    return blocks * (blocks + 1) // 2


def window_pairs(blocks: int, sink: int, window: int) -> int:
    """Counts the pairs that a sink and a window see: a row sees up to `sink + window` of the blocks up to its own."""
    reach = min(sink + window, blocks)
    return causal_pairs(reach) + (blocks - reach) * reach


def cluster_pairs(blocks: int, sink: int, window: int, tree: Dendrogram, cut: float) -> int:
    """Counts the pairs of the first `blocks` blocks that only a cut's clusters see; see `cluster_counts`."""
    return int(cluster_counts(blocks, sink, window, tree, cut).sum())


def cluster_counts(blocks: int, sink: int, window: int, tree: Dendrogram, cut: float) -> npt.NDArray[np.int64]:
    """Counts the blocks that each of the first rows sees only in its cluster, between sink and window: `[blocks]`.

    `blocks` is at most the tree's own number.
    """
    counts = np.zeros(blocks, dtype=np.int64)
    if sink + window >= blocks:
        return counts
    clusters = tree.labels(cut)[:blocks]
    members = np.argsort(clusters, kind="stable")
    first_keys = clusters[members] * blocks
    keys = first_keys + members  # ascending: the blocks of one cluster after those of the other
    before_window = np.searchsorted(keys, keys - window, side="right")
    in_sink = np.searchsorted(keys, first_keys + sink, side="left")
    counts[members] = np.maximum(before_window - in_sink, 0)
    return counts
