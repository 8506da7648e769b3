"""The blocks that routed heads choose, computed in PyTorch: the same as those of the kernels, bit for bit.

Nodes and questions are whole numbers, so that their products have no rounding.

Source: topology.json version 2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from surgeon.runtime.package.schedule import NODE, TILE, HeadSchedule

_STEPS = 127  # on either side of 0


@dataclass(frozen=True)
class Choice:
    """Consecutive queries, counted from the first valid key, which choose together, and the blocks that they chose."""

    queries: range
    blocks: tuple[int, ...]


def nodes_of(keys: torch.Tensor, centre: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """The nodes of a KV head's keys `[tokens, head_dim]`, from the first valid one on: fp64 `[tokens // 8, head_dim]`.

    `centre` and `width` are the router's, fp32 `[head_dim]`; a node is the mean of 8 quantised keys.
    """
    whole = len(keys) // NODE * NODE
    steps = torch.round((keys[:whole].float() - centre) / width * _STEPS).clamp_(-_STEPS, _STEPS).double()
    return torch.floor((steps.unflatten(0, (-1, NODE)).sum(1) + NODE // 2) / NODE)


def units_of(queries: range) -> Iterator[range]:
    """Divides the queries of a call, counted from the first valid key, into those that choose together.

    They are whole tiles, which begin at multiples of their size, and single queries before and behind them.
    """
    begin = queries.start
    while begin < queries.stop:
        end = begin + (TILE if begin % TILE == 0 and begin + TILE <= queries.stop else 1)
        yield range(begin, end)
        begin = end


def choose(
    schedule: HeadSchedule,
    block_size: int,
    first_query: int,
    q: torch.Tensor,
    nodes: torch.Tensor,
    width: torch.Tensor,
    first_dense_row: int | None,
) -> dict[int, list[Choice]]:
    """The choices of a routed head's queries `[queries, head_dim]` by row of blocks, but for rows that read everything.

    Query 0 is token `first_query`, counted from the first valid key, as are the nodes of `nodes_of`. Each row's choices
    are in the order of their queries.
    """
    units = [
        unit
        for unit in units_of(range(first_query, first_query + len(q)))
        if first_dense_row is None or unit.start // block_size < first_dense_row
    ]
    if not units:
        return {}
    complete = units[-1].start // block_size  # blocks before the last row's own
    scores = _questions(q, units, first_query, width) @ nodes[: complete * block_size // NODE].T
    best = scores.unflatten(1, (complete, block_size // NODE)).amax(2)
    found = {}
    for row, own in groupby(zip(units, best, strict=True), lambda pair: pair[0].start // block_size):
        hidden = torch.ones(row, dtype=torch.bool)
        for run in schedule.row(row):
            hidden[run.begin : run.end] = False
        candidates = hidden.nonzero().flatten()
        found[row] = [
            Choice(unit, tuple(sorted(candidates[_highest(score[candidates], schedule.route)].tolist())))
            for unit, score in own
        ]
    return found


def _questions(q: torch.Tensor, units: Sequence[range], first_query: int, width: torch.Tensor) -> torch.Tensor:
    """The questions that the queries of each unit ask together: whole numbers, fp64 `[units, head_dim]`."""
    scaled, sums = q.float() * width, q.new_empty((len(units), q.shape[1]), dtype=torch.float32)
    for size in (1, TILE):
        own = [index for index, unit in enumerate(units) if len(unit) == size]
        rows = torch.tensor([units[index].start - first_query for index in own], dtype=torch.int64)
        total = scaled[rows]
        for step in range(1, size):  # in this order, in which the kernels add
            total = total + scaled[rows + step]
        sums[own] = total
    most = sums.abs().amax(1, keepdim=True)
    return torch.where(most > 0, torch.round(sums / most * _STEPS), 0).double()


def _highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The places of the highest scores, of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:count]
