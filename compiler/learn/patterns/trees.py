"""Dendrograms that a head's clusters may come from: learned from gains, intervals, and residues."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from surgeon.compiler.topology.dendrogram import Dendrogram, Merge
from surgeon.runtime.errors import ModelError
from surgeon.runtime.installation import required

Gains = npt.NDArray[np.float64]


def interval_tree(blocks: int) -> Dendrogram:
    """The tree over equal contiguous halves: neighbours merge at height 1, pairs at 2, and so on."""
    nodes = [(block, 1) for block in range(blocks)]
    linkage: list[Merge] = []
    height = 0.0
    while len(nodes) > 1:
        height += 1.0
        above = []
        for (left, left_count), (right, right_count) in zip(nodes[::2], nodes[1::2], strict=False):
            linkage.append((left, right, height, left_count + right_count))
            above.append((blocks + len(linkage) - 1, left_count + right_count))
        nodes = above + nodes[2 * len(above) :]
    return Dendrogram(blocks, tuple(linkage))


def residue_tree(blocks: int, prime: int) -> Dendrogram:
    """The p-adic tree: the higher the power of `prime` that divides their difference, the closer two blocks are."""
    depth = 1
    while prime**depth < blocks:
        depth += 1
    paths = [[block // prime**place % prime for place in range(depth)] for block in range(blocks)]
    return Dendrogram.from_paths(paths, prime, f"residues of {prime}")


def learned_tree(gains: Gains) -> Dendrogram:
    """The average linkage of blocks by a query block's gain from seeing a key block, `[blocks, blocks]`.

    Only the lower triangle counts, where the query comes after the key. A height is the distance of a pair's mean gain
    below the greatest gain, in units of the range of gains.

    Raises:
        ModelError: SciPy is not installed.
    """
    required("scipy", ModelError, "--cuts")
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    blocks = len(gains)
    lower = np.tril(gains, -1)
    pairs = squareform(lower + lower.T, checks=False)
    reach = float(np.ptp(pairs)) or 1.0
    rows = linkage((pairs.max() - pairs) / reach + 1e-3, method="average")
    merges: list[Merge] = []
    for left, right, height, count in rows.tolist():
        merges.append((int(left), int(right), round(height, 6), int(count)))
    return Dendrogram(blocks, tuple(merges))


def cuts_of(tree: Dendrogram, most: int) -> Iterator[float]:
    """Yields up to `most` heights at which cuts make different clusters, from fine to coarse, without the root's."""
    heights = sorted({height for _, _, height, _ in tree.linkage})[:-1]
    if heights:
        places = np.unique(np.linspace(0, len(heights) - 1, most).round().astype(int))
        yield from (heights[place] for place in places)
