"""Pairs of a row and a key block, counted without a mask: what every density is made of."""

import numpy as np

from surgeon.compiler.topology.dendrogram import Dendrogram


def causal_pairs(blocks: int) -> int:
    """Pairs of blocks that a dense head sees."""
    return blocks * (blocks + 1) // 2


def window_pairs(blocks: int, sink: int, window: int) -> int:
    """Pairs of blocks that a sink and a window see: a row sees all before it, but at most so many as both together."""
    reach = min(sink + window, blocks)
    return causal_pairs(reach) + (blocks - reach) * reach


def cluster_pairs(blocks: int, sink: int, window: int, tree: Dendrogram, cut: float) -> int:
    """Pairs of the first `blocks` blocks that only a cut's clusters see: behind the sink and before the window.

    `blocks` is at most the tree's own number.
    """
    if sink + window >= blocks:
        return 0
    clusters = tree.labels(cut)[:blocks]
    members = np.argsort(clusters, kind="stable")
    cache_leftpad = clusters[members] * blocks
    keys = cache_leftpad + members  # ascending: the blocks of one cluster after those of another
    before_window = np.searchsorted(keys, keys - window, side="right")
    in_sink = np.searchsorted(keys, cache_leftpad + sink, side="left")
    return int(np.maximum(before_window - in_sink, 0).sum())
