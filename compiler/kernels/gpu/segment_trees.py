"""Segment tables as decision trees, for kernels that hold them as code."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from surgeon.compiler.kernels.gpu.decision_tree import Leaf, Tree, search
from surgeon.runtime.package.segment_table import SegmentTable


class Place(NamedTuple):
    """A position that depends on the row: `offset` + `times` · the row's own position."""

    offset: int
    times: int


class SegmentPlan(NamedTuple):
    """The segments that a row reads: the first one, the length of those every reader sees, and that of the rest."""

    first_segment: int
    shared: Place
    masked: Place


class SegmentLeaf(NamedTuple):
    """A segment: begin, end, and the readers that see it, as the bits of an int32."""

    begin: Place
    end: Place
    readers: int


@dataclass(frozen=True)
class SegmentTrees:
    """The rows of some heads: `pattern` branches on "head", `plan` on "pattern" and "row", `segment` on "segment".

    The segments of a plan are numbered one after the other.
    """

    pattern: Tree[int]
    plan: Tree[SegmentPlan]
    segment: Tree[SegmentLeaf]
    num_patterns: int
    num_segments: int


def num_leaves(table: SegmentTable, head: int) -> int:
    """The approximate number of leaves in a head's own part of the trees."""
    rows = table.rows[head]
    plans = np.unique(rows)
    return len(_changes(rows)) + int((table.plans[plans, 2] - table.plans[plans, 0]).sum())


def segment_trees(table: SegmentTable, heads: range) -> SegmentTrees:
    """Converts some heads' part of a prefill table into decision trees; equal heads share a pattern."""
    keys = [table.rows[head].tobytes() for head in heads]
    patterns = {key: table.rows[head] for key, head in zip(keys, heads, strict=True)}
    numbers = {key: number for number, key in enumerate(patterns)}
    plans: dict[int, SegmentPlan] = {}
    segments: list[tuple[int, Leaf[SegmentLeaf]]] = []
    for rows in patterns.values():
        for plan in rows[_changes(rows)].tolist():
            if plan not in plans:
                first, middle, end = table.plans[plan].tolist()
                plans[plan] = SegmentPlan(
                    len(segments), _length(table.segments[first:middle]), _length(table.segments[middle:end])
                )
                leaves = map(_leaf, table.segments[first:end].tolist())
                segments += [(len(segments) + number, Leaf(leaf)) for number, leaf in enumerate(leaves)]
    return SegmentTrees(
        pattern=search("head", [(head, Leaf(numbers[key])) for key, head in zip(keys, heads, strict=True)]),
        plan=search(
            "pattern",
            [
                (number, search("row", [(int(row), Leaf(plans[int(rows[row])])) for row in _changes(rows)]))
                for number, rows in enumerate(patterns.values())
            ],
        ),
        segment=search("segment", segments),
        num_patterns=len(patterns),
        num_segments=len(segments),
    )


def _changes(rows: npt.NDArray[np.int32]) -> npt.NDArray[np.intp]:
    """The rows at which a new plan begins."""
    return np.flatnonzero(np.diff(rows, prepend=-1))


def _length(segments: npt.NDArray[np.int32]) -> Place:
    begins, ends, follows, _ = segments.T
    return Place(int((ends - begins).sum()), int((follows >> 1).sum() - (follows & 1).sum()))


def _leaf(segment: list[int]) -> SegmentLeaf:
    begin, end, follows, readers = segment
    return SegmentLeaf(Place(begin, follows & 1), Place(end, follows >> 1), readers)
