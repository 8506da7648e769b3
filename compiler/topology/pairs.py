"""Counts of pairs of a row and a key block, computed without a mask: the basis of every density."""

import numpy as np

from surgeon.compiler.topology.dendrogram import Dendrogram


def causal_pairs(blocks: int) -> int:
    """Counts the pairs of blocks that a dense head sees."""
    return blocks * (blocks + 1) // 2


def window_pairs(blocks: int, sink: int, window: int) -> int:
    """Counts the pairs that a sink and a window see: a row sees up to `sink + window` of the blocks up to its own."""
    reach = min(sink + window, blocks)
    return causal_pairs(reach) + (blocks - reach) * reach


def cluster_pairs(blocks: int, sink: int, window: int, tree: Dendrogram, cut: float) -> int:
    """Counts the pairs of the first `blocks` blocks that only a cut's clusters see: between the sink and the window.

    `blocks` is at most the tree's own number.
    """
    if sink + window >= blocks:
        return 0
    clusters = tree.labels(cut)[:blocks]
    members = np.argsort(clusters, kind="stable")
    cache_leftpad = clusters[members] * blocks
    keys = cache_leftpad + members  # ascending: the blocks of one cluster after those of the other
    before_window = np.searchsorted(keys, keys - window, side="right")
    in_sink = np.searchsorted(keys, cache_leftpad + sink, side="left")
    return int(np.maximum(before_window - in_sink, 0).sum())
