"""The ultrametric tree over the blocks of a sequence: its construction, distances and clusters.

Source: SciPy's linkage matrix Z (`scipy.cluster.hierarchy`) and p-adic digit paths, DESIGN of topology.json version 1.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from surgeon.runtime.errors import TopologyError, short_repr

if TYPE_CHECKING:  # imported where a graph is made; reading and scheduling do without it
    import networkx as nx

Merge = tuple[int, int, float, int]
"""A row of a linkage: left node, right node, height, number of leaves below. Row r makes node `num_leaves + r`."""


@dataclass(frozen=True)
class Dendrogram:
    """A rooted binary tree over blocks 0..num_blocks-1 whose heights do not decrease toward the root."""

    num_blocks: int
    linkage: tuple[Merge, ...]

    @classmethod
    def from_linkage(cls, rows: Sequence[Sequence[object]], num_blocks: int, where: str) -> "Dendrogram":
        """Checks a linkage matrix of num_blocks−1 rows [left, right, height, count].

        Raises:
            TopologyError: the rows do not make one tree over the blocks; the text names `where` and the row.
        """
        if len(rows) != num_blocks - 1:
            raise TopologyError(
                where,
                f"{num_blocks - 1} merges for {num_blocks} blocks",
                str(len(rows)),
                "give one row for every merge, as scipy.cluster.hierarchy.linkage does",
            )
        heights = [0.0] * num_blocks
        counts = [1] * num_blocks
        merged = [False] * num_blocks
        linkage: list[Merge] = []
        for index, row in enumerate(rows):
            place = f"{where}[{index}]"
            left, right, height, count = _merge(row, place)
            for side, child in (("left", left), ("right", right)):
                if not 0 <= child < len(merged):
                    raise TopologyError(
                        place,
                        f"a {side} node in 0..{len(merged) - 1}",
                        short_repr(child),
                        "merge only blocks and nodes made by earlier rows",
                    )
                if merged[child]:
                    kind = "block" if child < num_blocks else "node"
                    raise TopologyError(
                        place, "nodes not merged before", f"{kind} {child} again", "merge every node exactly once"
                    )
                if height < heights[child]:
                    raise TopologyError(
                        place,
                        f"a height of at least {heights[child]!r}, its {side} child's",
                        repr(height),
                        "let heights grow toward the root (average, complete or single linkage do)",
                    )
                merged[child] = True
            if count != counts[left] + counts[right]:
                raise TopologyError(
                    place,
                    f"count {counts[left] + counts[right]}, the number of blocks below",
                    short_repr(count),
                    "correct the fourth column",
                )
            heights.append(height)
            counts.append(count)
            merged.append(False)
            linkage.append((left, right, height, count))
        return cls(num_blocks, tuple(linkage))

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]], arity: int, where: str) -> "Dendrogram":
        """Builds the tree in which d(i,j) is the depth minus the length of the common prefix of paths i and j.

        `paths` holds one row of digits per block, root digit first. A node with more than two children becomes a chain
        of merges at one height.

        Raises:
            TopologyError: the rows differ in length, or a digit is outside 0..arity-1.
        """
        depth = len(paths[0])
        for block, path in enumerate(paths):
            if len(path) != depth:
                raise TopologyError(
                    f"{where}[{block}]",
                    f"{depth} digits, as in the first path",
                    str(len(path)),
                    "give every block a path of the same length",
                )
        digits = np.array(paths, dtype=np.int64).reshape(len(paths), depth)
        if (wrong := np.argwhere((digits < 0) | (digits >= arity))).size:
            block, level = wrong[0].tolist()
            raise TopologyError(
                f"{where}[{block}][{level}]",
                f"a digit in 0..{arity - 1}",
                str(paths[block][level]),
                "raise arity or correct the digit",
            )
        return cls(len(paths), tuple(_merges_of(digits)))

    def leaf_order(self) -> tuple[int, ...]:
        """The blocks from left to right in the drawn tree, as `scipy.cluster.hierarchy.leaves_list` gives them."""
        import networkx as nx

        nodes = nx.dfs_preorder_nodes(self._arborescence, self._root)
        return tuple(node for node in nodes if node < self.num_blocks)

    def distances(self) -> npt.NDArray[np.float64]:
        """d(i,j) for all pairs, `[num_blocks, num_blocks]`: SciPy's cophenetic distances in square form."""
        table = np.zeros((self.num_blocks, self.num_blocks))
        members: list[npt.NDArray[np.intp]] = [np.array([block]) for block in range(self.num_blocks)]
        for left, right, height, _ in self.linkage:
            table[np.ix_(members[left], members[right])] = height
            table[np.ix_(members[right], members[left])] = height
            members.append(np.concatenate([members[left], members[right]]))
        return table

    def clusters(self, cut: float) -> tuple[tuple[int, ...], ...]:
        """The cut's clusters: blocks i and j are together iff d(i,j) ≤ cut.

        Each cluster is in ascending order; clusters are ordered by their first block.
        """
        members: dict[int, list[int]] = {}
        for block, label in enumerate(self.labels(cut).tolist()):
            members.setdefault(label, []).append(block)
        return tuple(tuple(blocks) for blocks in members.values())

    def labels(self, cut: float) -> npt.NDArray[np.int64]:
        """The number of each block's cluster under the cut, `[num_blocks]`."""
        # Without a graph or a loop over the merges: a model has one cut per head.
        children, heights = self._merges
        up = np.arange(self._root + 1)
        merged = np.flatnonzero(heights <= cut)
        up[children[merged]] = self.num_blocks + merged[:, None]
        while not np.array_equal(further := up[up], up):  # twice as far up the tree each time
            up = further
        return up[: self.num_blocks]

    @property
    def _root(self) -> int:
        return self.num_blocks + len(self.linkage) - 1

    @cached_property
    def _merges(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The nodes that each row merges, `[rows, 2]`, and their heights, `[rows]`."""
        children = np.array([row[:2] for row in self.linkage], dtype=np.int64).reshape(-1, 2)
        return children, np.array([row[2] for row in self.linkage], dtype=np.float64)

    @cached_property
    def _arborescence(self) -> "nx.DiGraph[int]":
        import networkx as nx

        tree: nx.DiGraph[int] = nx.DiGraph()
        tree.add_node(self._root)
        for parent, (left, right, _, _) in enumerate(self.linkage, start=self.num_blocks):
            tree.add_edges_from(((parent, left), (parent, right)))
        return tree


def _merges_of(digits: npt.NDArray[np.int64]) -> Iterator[Merge]:
    """The merges of the tree of paths `[blocks, depth]`, lowest first, without a loop over blocks that do not merge."""
    num_blocks, depth = digits.shape
    prefixes = [np.zeros(num_blocks, dtype=np.int64)]  # for each length, a number for each block's prefix
    for level in digits.T:
        prefixes.append(np.unique(prefixes[-1] * (int(digits.max()) + 1) + level, return_inverse=True)[1])
    counts = [1] * num_blocks
    nodes = first = np.arange(num_blocks)  # in order of each node's first block
    for height in range(depth + 1):  # blocks with equal paths merge at 0, those that differ only in the last digit at 1
        groups, number = np.unique(prefixes[depth - height][first], return_inverse=True)[1], len(nodes)
        order = np.argsort(groups, kind="stable")
        begins = np.flatnonzero(np.diff(groups[order], prepend=-1))
        sizes = np.diff(begins, append=number)
        kept = order[begins]
        nodes = nodes.copy()
        for begin, size in sorted(
            zip(begins[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True), key=lambda group: order[group[0]]
        ):
            members = nodes[order[begin : begin + size]].tolist()
            top = members[0]
            for other in members[1:]:
                counts.append(counts[top] + counts[other])
                yield top, other, float(height), counts[-1]
                top = len(counts) - 1
            nodes[order[begin]] = top
        kept.sort()
        nodes, first = nodes[kept], first[kept]


def _merge(row: Sequence[object], place: str) -> Merge:
    if not isinstance(row, list | tuple) or len(row) != 4:
        raise TopologyError(
            place, "[left, right, height, count]", short_repr(row), "give four numbers, as SciPy's linkage does"
        )
    height = row[2]
    if isinstance(height, bool) or not isinstance(height, int | float) or not 0 <= height <= sys.float_info.max:
        raise TopologyError(place, "a finite height of at least 0", short_repr(height), "correct the third column")
    return (
        _whole(row[0], "left", place),
        _whole(row[1], "right", place),
        abs(float(height)),  # −0.0 and 0.0 are one height
        _whole(row[3], "count", place),
    )


def _whole(value: object, name: str, place: str) -> int:
    # SciPy stores whole numbers as floats; anything else is a mistake.
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise TopologyError(place, f"a whole number for {name}", short_repr(value), "correct the entry")
    return int(value)
