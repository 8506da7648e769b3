"""Formats a topology as readable topology.json: one line per head, per merge, and per KV head of a router."""

import json
from typing import Any

from surgeon.compiler.topology.topology import Topology


def spelled(topology: Topology) -> str:
    """The text of topology.json, with one line per head, per merge, and per KV head of a router."""
    plain = json.loads(topology.canonical())
    trees = [_listed([json.dumps(row) for row in tree["linkage"]], 4) for tree in plain["dendrograms"]]
    layers = [layer and _listed([json.dumps(head) for head in layer["heads"]], 4) for layer in plain["layers"]]
    parts = {
        "format": json.dumps(plain["format"]),
        "version": json.dumps(plain["version"]),
        "model": json.dumps(plain["model"]),
        "block_size": json.dumps(plain["block_size"]),
        "num_blocks": json.dumps(plain["num_blocks"]),
        "dendrograms": _listed([f'{{"linkage": {tree}}}' for tree in trees], 2),
        "layers": _listed([f'{{"heads": {layer}}}' if layer else "null" for layer in layers], 2),
        "beyond": json.dumps(plain["beyond"]),
        **({"router": _router(plain["router"])} if "router" in plain else {}),
        "provenance": json.dumps(dict(topology.provenance), indent=1).replace("\n", "\n "),
    }
    return "{\n" + ",\n".join(f' "{name}": {text}' for name, text in parts.items()) + "\n}\n"


def _router(router: dict[str, Any]) -> str:
    layers = [
        layer
        and "{\n"
        + ",\n".join(f'   "{name}": {_listed([json.dumps(row) for row in layer[name]], 5)}' for name in layer)
        + "}"
        for layer in router["layers"]
    ]
    sizes = "".join(f'"{name}": {router[name]}, ' for name in ("node", "tile"))
    return f'{{{sizes}"layers": {_listed([layer or "null" for layer in layers], 2)}}}'


def _listed(items: list[str], indent: int) -> str:
    if not items:
        return "[]"
    space = " " * indent
    return "[\n" + ",\n".join(space + item for item in items) + "\n" + " " * (indent - 1) + "]"
