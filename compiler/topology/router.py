"""The router of a topology: how keys become the nodes that routed heads choose blocks by.

Source: topology.json version 2 (`topology.schema.json` beside this file).
"""

from dataclasses import dataclass

Channels = tuple[tuple[float, ...], ...]
"""One number for each channel of each KV head: `[num_key_value_heads][head_dim]`."""


@dataclass(frozen=True)
class LayerRouter:
    """The quantisation of a layer's keys: a key becomes (key − centre) / scale, in steps of 1/127 from −1 to 1."""

    centre: Channels
    scale: Channels


@dataclass(frozen=True)
class Router:
    """The quantisation of every layer that has routed heads, None for the others."""

    layers: tuple[LayerRouter | None, ...]
