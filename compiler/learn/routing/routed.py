"""A topology with routes in place of some heads' windows, at the same density."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from surgeon.compiler.topology.router import LayerRouter, Router
from surgeon.compiler.topology.topology import Head, SparseHead, Topology, WindowHead, mean_density
from surgeon.runtime.errors import TopologyError

ROUTE_TOKENS = 608
"""Tokens that a routed head chooses, at any length: fewer lose single facts among many."""

NEAR_TOKENS = 128
"""Tokens of a routed head's window."""

_LONGEST = 4.0  # times its learned length, a window

SHARE = 0.25
"""The share of the heads that is routed: those that retrieve most."""


def routed_places(scores: torch.Tensor, share: float = SHARE) -> frozenset[tuple[int, int]]:
    """The layers and heads of the highest scores `[layers, heads]`."""
    layers, heads = scores.shape
    best = scores.flatten().argsort(descending=True, stable=True)[: round(share * layers * heads)]
    return frozenset((int(index) // heads, int(index) % heads) for index in best)


def with_routes(
    topology: Topology, places: frozenset[tuple[int, int]], routers: Sequence[LayerRouter], density: float
) -> Topology:
    """Routes the heads at these places, and changes the other heads' windows so that the density stays.

    The routed heads keep their sink; their window becomes `NEAR_TOKENS`, and they choose `ROUTE_TOKENS`, at most. The
    other windows become shorter by one factor, or longer where the routed heads had long ones.

    Raises:
        TopologyError: the routes alone exceed the density, or heads have clusters.
    """
    size = topology.block_size
    near, route = max(1, NEAR_TOKENS // size), max(1, ROUTE_TOKENS // size)

    def made(factor: float) -> Topology:
        def head(present: Head, layer: int, index: int) -> Head:
            if isinstance(present, SparseHead):
                raise TopologyError(
                    f"layers[{layer}].heads[{index}]",
                    "a head without clusters, which could have a route",
                    "one with clusters",
                    "learn without --cuts",
                )
            if not isinstance(present, WindowHead):
                return present
            if (layer, index) in places:
                return WindowHead(present.sink, near, route)
            return dataclasses.replace(present, window=max(1, min(topology.num_blocks, int(present.window * factor))))

        layers = tuple(
            tuple(head(present, layer, index) for index, present in enumerate(heads))
            for layer, heads in enumerate(topology.layers)
        )
        routed = [any(isinstance(head, WindowHead) and head.route for head in heads) for heads in layers]
        router = Router(tuple(own if has else None for own, has in zip(routers, routed, strict=True)))
        return dataclasses.replace(topology, layers=layers, router=router)

    if mean_density(made(0.0)) > density:
        raise TopologyError(
            "--retrieve",
            f"a density that holds {route} chosen blocks in every fourth head, {mean_density(made(0.0)):.3f}",
            f"{density:.3f}",
            "raise --density, or learn for longer sequences, where the same number of blocks is a smaller share",
        )
    factors = np.linspace(0.0, _LONGEST, 1025)
    low, high = 0, len(factors) - 1
    while low < high:  # the density grows with the factor
        middle = (low + high + 1) // 2
        low, high = (middle, high) if mean_density(made(factors[middle])) <= density else (low, middle - 1)
    return made(float(factors[low]))
