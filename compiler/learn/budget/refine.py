"""Refinement at the sparse model, where the divergence itself tells which heads should see more, and which less."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from surgeon.compiler.learn.budget.knapsack import allocate
from surgeon.compiler.learn.patterns.windows import Windows, visible_pairs


@dataclass(frozen=True)
class Trust:
    """The range of one round's moves: from a window w to at least w / (1 + reach) and at most w + reach · (w + 2).

    The gains are linear, so they hold only near the present windows: given the whole range, a round moves blocks to
    wherever a gradient was large and makes the divergence worse.
    """

    reach: float

    def bounds(self, window: int, floor: int, blocks: int) -> range:
        """The windows that a head may get."""
        low = max(floor, int(np.ceil(window / (1 + self.reach))))
        high = min(blocks, int(window + self.reach * (window + 2)))
        return range(min(low, window), max(high, window) + 1)

    def narrower(self) -> "Trust":
        """Half the reach."""
        return Trust(self.reach / 2)


def refined_windows(
    windows: Windows, changes: npt.NDArray[np.float64], sink: int, budget: float, floor: int, trust: Trust
) -> Windows:
    """The windows within the trust region with the least total change, within the budget.

    `changes[l, h, w - 1]` is the linear change of the loss if head h of layer l had window w; `budget` is in visible
    pairs of blocks over all heads.
    """
    blocks = changes.shape[2]
    pairs = visible_pairs(blocks, sink)
    ranges = [trust.bounds(int(window), floor, blocks) for window in windows.flat]
    rows = changes.reshape(-1, blocks)
    places = [np.array(choices) - 1 for choices in ranges]
    chosen = allocate(
        [pairs[place] for place in places], [row[place] for row, place in zip(rows, places, strict=True)], budget
    )
    found: Sequence[int] = [choices[index] for choices, index in zip(ranges, chosen, strict=True)]
    return np.array(found, dtype=np.int64).reshape(windows.shape)
