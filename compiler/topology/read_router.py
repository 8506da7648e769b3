"""Reads the router of a topology file.

Source: topology.json version 2 (`topology.schema.json` beside this file).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgeon.compiler.topology.fields import constant, list_of, object_of
from surgeon.compiler.topology.router import Channels, LayerRouter, Router
from surgeon.compiler.topology.topology import DenseHead, Head
from surgeon.runtime.errors import TopologyError, short_repr
from surgeon.runtime.package.manifest import ModelShape
from surgeon.runtime.package.schedule import NODE, TILE

_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def read_router(value: object, model: ModelShape, layers: Sequence[Sequence[Head]]) -> Router | None:
    """Checks the router of a file, None if it has none; returns None as well where no head is routed.

    Raises:
        TopologyError: a routed layer has no entry, or an entry has another shape or numbers that are not finite.
    """
    routed = [any(not isinstance(head, DenseHead) and head.route for head in heads) for heads in layers]
    if value is None:
        if any(routed):
            raise TopologyError(
                "router",
                f"an entry for layer {routed.index(True)}, which has routed heads",
                "no router",
                'add the router that the heads were learned with, or remove their "route"',
            )
        return None
    fields = object_of(value, "router", required=("node", "tile", "layers"))
    constant(fields["node"], "router.node", NODE)
    constant(fields["tile"], "router.tile", TILE)
    entries = list_of(fields["layers"], "router.layers", 1, len(layers))
    if len(entries) != len(layers):
        raise TopologyError(
            "router.layers",
            f"{len(layers)} layers, as model.num_hidden_layers says",
            str(len(entries)),
            "list every layer; null stands for one without routed heads",
        )
    found: list[LayerRouter | None] = []
    for index, (entry, needed) in enumerate(zip(entries, routed, strict=True)):
        where = f"router.layers[{index}]"
        if entry is None:
            if needed:
                raise TopologyError(where, "an object, for the layer's routed heads", "null", "add centre and scale")
            found.append(None)
            continue
        parts = object_of(entry, where, required=("centre", "scale"))
        centre = _channels(parts["centre"], f"{where}.centre", model, "a finite number", -_MOST)
        scale = _channels(parts["scale"], f"{where}.scale", model, "a finite number above 0", _LEAST)
        found.append(LayerRouter(centre, scale) if needed else None)
    return Router(tuple(found)) if any(routed) else None


def _channels(value: object, where: str, model: ModelShape, kind: str, least: float) -> Channels:
    heads = _sized(value, where, model.num_key_value_heads, "one per KV head")
    rows = []
    for head, row in enumerate(heads):
        place = f"{where}[{head}]"
        numbers = _sized(row, place, model.head_dim, "one per channel")
        for channel, number in enumerate(numbers):
            if type(number) not in (int, float) or not least <= number <= _MOST:
                raise TopologyError(f"{place}[{channel}]", kind, short_repr(number), "measure the keys again")
        rows.append(tuple(float(number) for number in numbers))
    return tuple(rows)


def _sized(value: object, where: str, count: int, each: str) -> list[Any]:
    found = list_of(value, where, 0, 1024)
    if len(found) != count:
        raise TopologyError(where, f"{count} entries, {each}", str(len(found)), "use the router of this model")
    return found
