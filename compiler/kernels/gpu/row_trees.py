"""A layer's schedule as decision trees over heads and rows of blocks.

Three trees describe it completely: the pattern of each head, the plan that each row of a pattern follows, and the
positions in the sequence of the constant lists' entries.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from surgeon.compiler.kernels.gpu.decision_tree import Leaf, Tree, search
from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.runtime.package.schedule import HeadSchedule, Piece, Run


@dataclass(frozen=True)
class RowPlan:
    """The keys that a row reads, in tokens: a slice of the listed keys, then one last run up to the diagonal.

    The slice has `listed_keys` entries, starting at `first_entry`. The last run begins at `last_run` or, if
    `follows_row`, that many tokens before the row's first token.
    """

    first_entry: int
    listed_keys: int
    last_run: int
    follows_row: bool


@dataclass(frozen=True)
class ScheduleTrees:
    """A layer's schedule as decision trees.

    `pattern` branches on "head", `plan` on "pattern" and "row" (in blocks), `shift` on "entry". The constant runs of
    all patterns, one after the other, make up the list of keys: its entry e is the key e + shift. `shift` is None if
    no pattern has a constant run; `num_entries` is the list's length in tokens.
    """

    pattern: Tree[int]
    plan: Tree[RowPlan]
    shift: Tree[int] | None
    num_patterns: int
    num_entries: int


def num_leaves(head: HeadSchedule) -> int:
    """The approximate number of leaves in a head's own part of the trees."""
    return len(head.pieces) + len(head.runs)


def schedule_trees(layer: LayerSchedule, heads: range | None = None) -> ScheduleTrees:
    """Converts the schedule of a layer, or of some of its heads, into decision trees.

    Equal heads share a pattern, equal lists of runs their entries.
    """
    heads = range(len(layer.heads)) if heads is None else heads
    patterns = list(dict.fromkeys(layer.heads[head] for head in heads))
    entries = _KeyList(layer.block_size)
    plans = [_plan_tree(head, entries, layer.block_size, layer.num_rows) for head in patterns]
    return ScheduleTrees(
        pattern=search("head", [(head, Leaf(patterns.index(layer.heads[head]))) for head in heads]),
        plan=search("pattern", list(enumerate(plans))),
        shift=entries.shift_tree(),
        num_patterns=len(patterns),
        num_entries=entries.length,
    )


class _KeyList:
    """The constant runs of all patterns, one after the other, each distinct list of runs once."""

    def __init__(self, block_size: int) -> None:
        self.length = 0
        self._block_size = block_size
        self._first_entries: dict[tuple[Run, ...], int] = {}
        self._shifts: list[tuple[int, Tree[int]]] = []

    def add(self, runs: tuple[Run, ...]) -> int:
        """Adds the runs if they are new, and returns the entry at which they begin."""
        if runs not in self._first_entries:
            self._first_entries[runs] = self.length
            for run in runs:
                self._shifts.append((self.length, Leaf(run.begin * self._block_size - self.length)))
                self.length += (run.end - run.begin) * self._block_size
        return self._first_entries[runs]

    def shift_tree(self) -> Tree[int] | None:
        return search("entry", self._shifts) if self._shifts else None


def _plan_tree(head: HeadSchedule, entries: _KeyList, block_size: int, num_rows: int) -> Tree[RowPlan]:
    first_entry = entries.add(head.runs)
    pieces = [piece for piece in head.pieces if piece.first_row < num_rows]
    return search(
        "row", [(piece.first_row, Leaf(_row_plan(piece, head.runs, first_entry, block_size))) for piece in pieces]
    )


def _row_plan(piece: Piece, runs: Sequence[Run], first_entry: int, block_size: int) -> RowPlan:
    listed_keys = _length(runs[piece.first_run : piece.end_run]) * block_size
    last_run = -piece.last_begin if piece.follows_row else piece.last_begin
    return RowPlan(
        first_entry=first_entry + _length(runs[: piece.first_run]) * block_size if listed_keys else 0,
        listed_keys=listed_keys,
        last_run=last_run * block_size,
        follows_row=piece.follows_row,
    )


def _length(runs: Iterable[Run]) -> int:
    return sum(run.end - run.begin for run in runs)
