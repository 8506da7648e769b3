"""Shares a budget of blocks among heads, each of which takes one of its choices."""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from surgeon.runtime.errors import TopologyError

Numbers = npt.NDArray[np.float64]


def allocate(blocks: Sequence[Numbers], costs: Sequence[Numbers], budget: float) -> tuple[int, ...]:
    """The choice of every head, `choices[h]` an index into `blocks[h]` and `costs[h]`, with sum of blocks ≤ budget.

    Every head starts at its fewest blocks and moves along its lower convex hull; the steps with the greatest saving per
    block are taken first. If the budget ends on a step, no choice within it costs less. Otherwise less than one step is
    left over, and goes to the best steps that still fit.

    Raises:
        TopologyError: even the smallest choices exceed the budget.
    """
    hulls = [_hull(size, cost) for size, cost in zip(blocks, costs, strict=True)]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(float(size[choice]) for size, choice in zip(blocks, chosen, strict=True))
    if left < 0:
        raise TopologyError(
            "density",
            f"a budget of at least {budget - left:.0f} visible pairs of blocks, the smallest windows'",
            f"{budget:.0f}",
            "raise the density, or use smaller blocks",
        )
    places = [0] * len(hulls)

    def step(head: int) -> tuple[float, int, float]:
        here, there = hulls[head][places[head]], hulls[head][places[head] + 1]
        more = float(blocks[head][there] - blocks[head][here])
        return float(costs[head][there] - costs[head][here]) / more, head, more

    waiting = [step(head) for head in range(len(hulls)) if len(hulls[head]) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, head, more = heapq.heappop(waiting)
        if more > left:
            continue  # its later steps start from this one
        left -= more
        places[head] += 1
        chosen[head] = hulls[head][places[head]]
        if places[head] + 1 < len(hulls[head]):
            heapq.heappush(waiting, step(head))
    return tuple(chosen)


def _hull(blocks: Numbers, costs: Numbers) -> list[int]:
    """The choices on the falling part of the lower convex hull of (blocks, cost), from few blocks to many."""
    order = np.lexsort((costs, blocks))
    hull: list[int] = []
    for index in map(int, order):
        if hull and costs[index] >= costs[hull[-1]]:
            continue  # more blocks at no lower cost
        while len(hull) > 1 and _slope(blocks, costs, hull[-2], hull[-1]) >= _slope(blocks, costs, hull[-1], index):
            hull.pop()
        hull.append(index)
    return hull


def _slope(blocks: Numbers, costs: Numbers, first: int, second: int) -> float:
    return float((costs[second] - costs[first]) / (blocks[second] - blocks[first]))
