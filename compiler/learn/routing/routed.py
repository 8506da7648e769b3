"""Topologies with routes in place of windows, at the same density."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from surgeon.compiler.topology.router import LayerRouter, Router
from surgeon.compiler.topology.topology import Head, SparseHead, Topology, WindowHead, mean_density
from surgeon.runtime.errors import TopologyError

LEAST_TOKENS = 352
"""Tokens that a head that retrieves chooses, at least: more would cost text twice as much."""

NEAR_TOKENS = (64, 128)
"""Tokens of a routed head's window, of which the learner takes the better for text that it was not learned on."""

_LONGEST = 4.0  # times its learned length, a window

SHARE = 0.25
"""The share of the heads that choose so many: those that retrieve most."""


def routed_places(scores: torch.Tensor, share: float = SHARE) -> frozenset[tuple[int, int]]:
    """The layers and heads of the highest scores `[layers, heads]`."""
    layers, heads = scores.shape
    best = scores.flatten().argsort(descending=True, stable=True)[: round(share * layers * heads)]
    return frozenset((int(index) // heads, int(index) % heads) for index in best)


def lengthened(topology: Topology, places: frozenset[tuple[int, int]], density: float) -> Topology:
    """Gives the heads at these places windows that hold `LEAST_TOKENS` beyond the nearest, so that the density stays.

    All other windows become shorter or longer by one factor, as do those at these places that are longer.

    Raises:
        TopologyError: these windows alone exceed the density, or heads have clusters.
    """
    size = topology.block_size
    least = max(1, max(NEAR_TOKENS) // size) + max(1, LEAST_TOKENS // size)

    def made(factor: float) -> Topology:
        def head(present: WindowHead, place: tuple[int, int]) -> WindowHead:
            window = max(least if place in places else 1, int(present.window * factor))
            return dataclasses.replace(present, window=min(topology.num_blocks, window))

        return _with_heads(topology, head)

    least_density = mean_density(made(0.0))
    if least_density > density:
        raise TopologyError(
            "--route",
            f"a density that holds windows of {least} blocks in every fourth head, {least_density:.3f}",
            f"{density:.3f}",
            "raise --density, or learn for longer sequences, where the same number of blocks is a smaller share",
        )
    factors = np.linspace(0.0, _LONGEST, 1025)
    low, high = 0, len(factors) - 1
    while low < high:  # the density grows with the factor
        middle = (low + high + 1) // 2
        low, high = (middle, high) if mean_density(made(factors[middle])) <= density else (low, middle - 1)
    return made(float(factors[low]))


def converted(topology: Topology, routers: Sequence[LayerRouter], near_tokens: int) -> Topology:
    """Lets every head choose as many blocks as its window has beyond the nearest tokens, which stay its window.

    No row reads fewer or more blocks than before.

    Raises:
        TopologyError: heads have clusters.
    """
    near = max(1, near_tokens // topology.block_size)

    def head(present: WindowHead, _place: tuple[int, int]) -> WindowHead:
        if present.window <= near or present.sink + present.window >= topology.num_blocks:
            return present
        return WindowHead(present.sink, near, present.window - near)

    return _with_heads(topology, head, routers)


def routed_heads(topology: Topology) -> int:
    """The number of heads that choose blocks."""
    return sum(isinstance(head, WindowHead) and head.route > 0 for heads in topology.layers for head in heads)


def _with_heads(
    topology: Topology,
    change: Callable[[WindowHead, tuple[int, int]], WindowHead],
    routers: Sequence[LayerRouter] = (),
) -> Topology:
    """The topology with its windows changed, given their layer and head, and with the routers of layers with routes.

    Raises:
        TopologyError: heads have clusters.
    """

    def head(present: Head, layer: int, index: int) -> Head:
        if isinstance(present, SparseHead):
            raise TopologyError(
                f"layers[{layer}].heads[{index}]",
                "a head without clusters, which could have a route",
                "one with clusters",
                "learn without --cuts",
            )
        return change(present, (layer, index)) if isinstance(present, WindowHead) else present

    layers = tuple(
        tuple(head(present, layer, index) for index, present in enumerate(heads))
        for layer, heads in enumerate(topology.layers)
    )
    routed = [any(isinstance(head, WindowHead) and head.route for head in heads) for heads in layers]
    if not any(routed):
        return dataclasses.replace(topology, layers=layers, router=None)
    router = Router(tuple(own if has else None for own, has in zip(routers, routed, strict=True)))
    return dataclasses.replace(topology, layers=layers, router=router)
