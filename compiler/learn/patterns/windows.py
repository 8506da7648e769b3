"""Patterns of a sink and a window: the pairs that they see, and the uniform pattern that uses up a density."""

import numpy as np
import numpy.typing as npt
import torch

from surgeon.compiler.learn.patterns.reach import check_reachable
from surgeon.compiler.topology.pairs import causal_pairs, window_pairs

Windows = npt.NDArray[np.int64]
"""A window, in blocks, for each layer and head: `[layers, heads]`."""


def window_patterns(blocks: int, sink: int) -> torch.Tensor:
    """Masks of the sink and windows of 1 to `blocks` blocks: bool `[windows, blocks, blocks]`."""
    row, column = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
    near = row - column < torch.arange(1, blocks + 1)[:, None, None]
    return (column <= row) & ((column < sink) | near)


def visible_pairs(blocks: int, sink: int) -> npt.NDArray[np.float64]:
    """Counts visible pairs of blocks under windows of 1 to `blocks` blocks, `[windows]`."""
    return np.array([window_pairs(blocks, sink, window) for window in range(1, blocks + 1)], dtype=np.float64)


def uniform_windows(layers: int, heads: int, blocks: int, sink: int, density: float) -> Windows:
    """The largest equal windows that the density allows, and one more block in as many heads as it still allows.

    The heads with more are spread evenly over the model.

    Raises:
        TopologyError: the sink and the own block alone exceed the density.
    """
    check_reachable(blocks, sink, density)
    pairs = visible_pairs(blocks, sink)
    wanted = density * causal_pairs(blocks)
    common = int(np.searchsorted(pairs, wanted * (1 + 1e-12), side="right"))
    windows = np.full(layers * heads, common, dtype=np.int64)
    if common < blocks:
        more = int((wanted - pairs[common - 1]) / (pairs[common] - pairs[common - 1]) * windows.size)
        windows[np.arange(more) * windows.size // max(more, 1)] += 1
    return windows.reshape(layers, heads)


def window_floor(blocks: int, sink: int, density: float) -> int:
    """The smallest window that a head may get: the uniform window whose pairs are nearest to two thirds of the budget.

    A head's far context varies between texts, its near context does not; without a floor a learner takes more from
    heads than other texts tolerate.

    Raises:
        TopologyError: the sink and the own block alone exceed the density.
    """
    check_reachable(blocks, sink, density)
    pairs = visible_pairs(blocks, sink)
    wanted = density * causal_pairs(blocks)
    affordable = int(np.searchsorted(pairs, wanted * (1 + 1e-12), side="right"))
    nearest = int(np.abs(pairs - wanted * 2 / 3).argmin()) + 1
    return min(affordable, nearest)
