"""A second reader of topology.json, written from its definition alone: valid or not, and what is visible.

It imports nothing of the compiler, so that a mistake there is no mistake here.
"""

import json
import re
from typing import Any, NamedTuple, NoReturn

from fuzzing import rules


class InvalidError(Exception):
    """The reason why a text is no topology."""


class Valid(NamedTuple):
    """The parsed document, and the members of each tree's clusters, merge by merge."""

    document: dict[str, Any]
    trees: list[dict[tuple[int, int], float]]

    def visible(self, layer: int, head: int, i: int, j: int) -> bool:
        """The definition: j ≤ i and (j < sink or i − j < window or d(i,j) ≤ cut), and what `beyond` says."""
        found = self.document["layers"][layer]["heads"][head]
        blocks = self.document["num_blocks"]
        if j > i:
            return False
        if "dense" in found or j < found["sink"] or i - j < found["window"]:
            return True
        if i >= blocks:
            return bool(self.document.get("beyond") == "dense")
        return "cut" in found and self.trees[found["dendrogram"]][j, i] <= found["cut"]


def check(data: bytes) -> Valid:
    """Reads a file's bytes.

    Raises:
        InvalidError: they are no topology.
    """
    _require(len(data) <= rules.MAX_FILE_BYTES, "too large")
    root = _parse(data)
    _require(type(root) is dict, "an object")
    version = root.get("version")
    _require(_is_int(version) and version in (1, 2), "version")
    required = {"format", "version", "model", "block_size", "num_blocks", "dendrograms", "layers"}
    _keys(root, required, "beyond provenance" + " router" * (version == 2))
    _require(root["format"] == "surgeon.topology", "format")
    heads = _check_model(root["model"])
    _require(_within(root["block_size"], 16, rules.MAX_BLOCK_SIZE) and root["block_size"] % 16 == 0, "block_size")
    _require(_within(root["num_blocks"], 1, rules.MAX_BLOCKS), "num_blocks")
    _require(type(root.get("beyond", "window")) is str and root.get("beyond", "window") in _BEYOND, "beyond")
    _require(type(root.get("provenance", {})) is dict, "provenance")
    _check_free(root.get("provenance", {}))
    _require(type(root["dendrograms"]) is list and len(root["dendrograms"]) <= rules.MAX_TREES, "dendrograms")
    trees = [_tree(tree, root["num_blocks"]) for tree in root["dendrograms"]]
    layers = root["layers"]
    _require(type(layers) is list and len(layers) == root["model"]["num_hidden_layers"], "layers")
    _require(any(layer is not None for layer in layers), "no layer is covered")
    for layer in layers:
        if layer is not None:
            _keys(layer, {"heads"})
            _require(type(layer["heads"]) is list and len(layer["heads"]) == heads, "heads")
            for head in layer["heads"]:
                _check_head(head, len(trees), version)
    _check_router(root)
    return Valid(root, trees)


_BEYOND = ("window", "dense", "error")
_LARGE = re.compile(rb"[eE]\+?[0-9]{3}|[0-9]{300}")
"""Numbers that may be beyond all doubles."""


def _parse(data: bytes) -> Any:
    def refuse(_: str) -> NoReturn:
        raise InvalidError("not JSON")

    def real(text: str) -> float:
        _require(abs(float(text)) < float("inf"), "a number beyond all doubles")
        return float(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _require(len({key for key, _ in pairs}) == len(pairs), "a key twice")
        return dict(pairs)

    parse_float = real if _LARGE.search(data) else None
    try:  # Python's own limit of digits is the format's
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_float=parse_float)
    except (ValueError, RecursionError) as error:
        raise InvalidError(f"not JSON: {error}") from None


def _check_model(model: Any) -> int:
    numbers = {
        "num_hidden_layers": rules.MAX_LAYERS,
        "num_attention_heads": rules.MAX_HEADS,
        "num_key_value_heads": rules.MAX_HEADS,
        "head_dim": rules.MAX_HEAD_DIM,
    }
    _keys(model, {"model_type", *numbers}, "weights_sha256")
    for name, most in numbers.items():
        _require(_within(model[name], 1, most), name)
    _require(type(model["model_type"]) is str, "model_type")
    _require(re.fullmatch(r"[A-Za-z0-9_.\-]{1,100}", model["model_type"]) is not None, "model_type")
    weights = model.get("weights_sha256")
    if weights is not None:
        _require(type(weights) is str and len(weights) == 64 and set(weights) <= set("0123456789abcdef"), "weights")
    _require(model["num_attention_heads"] % model["num_key_value_heads"] == 0, "groups")
    found: int = model["num_attention_heads"]
    return found


def _tree(tree: Any, blocks: int) -> dict[tuple[int, int], float]:
    """The distance of every two blocks of a small tree; of a large one nothing, it is only checked."""
    _require(type(tree) is dict, "a tree")
    return _of_paths(tree, blocks) if "paths" in tree else _of_linkage(tree, blocks)


_SMALL = 64


def _of_linkage(tree: Any, blocks: int) -> dict[tuple[int, int], float]:
    _keys(tree, {"linkage"})
    rows = tree["linkage"]
    _require(type(rows) is list and len(rows) == blocks - 1, "merges")
    below: dict[int, tuple[float, list[int]]] = {block: (0.0, [block]) for block in range(blocks)}
    distances: dict[tuple[int, int], float] = {}
    for made, row in enumerate(rows, start=blocks):
        _require(type(row) is list and len(row) == 4, "a merge")
        left, right, height, count = row
        _require(all(_is_number(value) for value in row), "numbers of a merge")
        _require(all(value == int(value) for value in (left, right, count)), "whole numbers of a merge")
        _require(height >= 0 and height <= 1.7976931348623157e308, "a height")
        _require(left in below and right in below and left != right, "nodes of a merge")
        (low, first), (high, second) = below.pop(left), below.pop(right)
        _require(height >= low and height >= high, "a falling height")
        _require(count == len(first) + len(second), "a count")
        if blocks <= _SMALL:
            distances |= {(min(a, b), max(a, b)): height for a in first for b in second}
        below[made] = (height, first + second)
    _require(len(below) == 1, "one root")
    return distances


def _of_paths(tree: Any, blocks: int) -> dict[tuple[int, int], float]:
    _keys(tree, {"paths", "arity"})
    paths = tree["paths"]
    _require(_within(tree["arity"], 2, rules.MAX_ARITY), "arity")
    _require(type(paths) is list and len(paths) == blocks, "paths")
    _require(all(type(path) is list for path in paths), "a path")
    depth = len(paths[0])
    _require(depth <= rules.MAX_DEPTH and all(len(path) == depth for path in paths), "lengths of paths")
    for path in paths:
        _require(all(_within(digit, 0, tree["arity"] - 1) for digit in path), "digits")
    if blocks > _SMALL:
        return {}
    return {
        (a, b): depth - next((at for at in range(depth) if paths[a][at] != paths[b][at]), depth)
        for a in range(blocks)
        for b in range(a + 1, blocks)
    }


def _check_head(head: Any, trees: int, version: int) -> None:
    _require(type(head) is dict, "a head")
    if "dense" in head:
        _keys(head, {"dense"})
        _require(head["dense"] is True, "dense")
        return
    of_tree = {"dendrogram", "cut"}
    required = {"sink", "window"} | (set() if rules.TREELESS_HEADS and not of_tree & head.keys() else of_tree)
    _keys(head, required, "route" * (version == 2))
    _require(_within(head.get("route", 0), 0, rules.MAX_BLOCKS), "route")
    _require(
        _within(head["sink"], 0, rules.MAX_BLOCKS) and _within(head["window"], 1, rules.MAX_BLOCKS), "sink, window"
    )
    if "cut" in head:
        _require(_within(head["dendrogram"], 0, trees - 1), "dendrogram")
        _require(_is_number(head["cut"]) and 0 <= head["cut"] <= 1.7976931348623157e308, "cut")


def _check_router(root: Any) -> None:
    """An entry of the model's shape for every layer that has a routed head."""
    routed = [layer is not None and any(head.get("route") for head in layer["heads"]) for layer in root["layers"]]
    router, model = root.get("router"), root["model"]
    if router is None:
        _require(not any(routed), "a router")
        return
    _keys(router, {"node", "tile", "layers"})
    _require(
        _is_int(router["node"]) and router["node"] == 8 and _is_int(router["tile"]) and router["tile"] == 16, "node"
    )
    _require(type(router["layers"]) is list and len(router["layers"]) == len(routed), "layers of the router")
    for layer, needed in zip(router["layers"], routed, strict=True):
        _require(layer is not None or not needed, "a layer of the router")
        if layer is None:
            continue
        _keys(layer, {"centre", "scale"})
        for name, least in (("centre", -_MOST_FLOAT), ("scale", 2.0**-126)):
            rows = layer[name]
            _require(type(rows) is list and len(rows) == model["num_key_value_heads"], name)
            for row in rows:
                _require(type(row) is list and len(row) == model["head_dim"], name)
                _require(all(_is_number(value) and least <= value <= _MOST_FLOAT for value in row), name)


_MOST_FLOAT = (2 - 2.0**-23) * 2.0**127


def _check_free(provenance: Any) -> None:
    """Anything that can be written again as JSON and as UTF-8, not too deep for recursive readers."""
    values, levels = [provenance], 0
    while values:
        keys = [key for value in values if type(value) is dict for key in value]
        texts = [value for value in values if type(value) is str]
        _require(not any("\ud800" <= letter <= "\udfff" for text in keys + texts for letter in text), "half a letter")
        containers = [value for value in values if type(value) in (dict, list)]
        levels += bool(containers)
        values = [item for value in containers for item in (value.values() if type(value) is dict else value)]
    _require(levels <= rules.MAX_PROVENANCE_LEVELS, "levels of the provenance")


def _require(fits: bool, reason: str) -> None:
    if not fits:
        raise InvalidError(reason)


def _keys(value: Any, required: set[str], optional: str = "") -> None:
    _require(type(value) is dict, "an object")
    _require(required <= value.keys() <= required | set(optional.split()), "keys")


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) is int or type(value) is float


def _within(value: Any, low: int, high: int) -> bool:
    return _is_int(value) and low <= value <= high
