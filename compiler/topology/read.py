"""Reads topology.json without trusting anything in it.

Source: topology.json versions 1 and 2 (`topology.schema.json` beside this file holds the same formats for editors).
"""

import os
import re
import sys
from collections.abc import Mapping
from typing import Any, cast

from surgeon.compiler.topology.dendrogram import Dendrogram
from surgeon.compiler.topology.fields import choice, constant, integer, list_of, mapping, object_of
from surgeon.compiler.topology.provenance import check_provenance
from surgeon.compiler.topology.read_router import read_router
from surgeon.compiler.topology.topology import DenseHead, Head, SparseHead, Topology, WindowHead
from surgeon.runtime.errors import TopologyError, short_repr
from surgeon.runtime.package.manifest import ModelShape
from surgeon.runtime.package.strict_json import Fault, parse_json, read_document

MAX_FILE_BYTES = 64 * 2**20
MAX_BLOCKS = 16_384
MAX_LAYERS = 512
MAX_HEADS = 512
MAX_DEPTH = 64
_MAX_DIGIT = 1023
BLOCK_SIZES = range(16, 1025, 16)
_FAULT = Fault(TopologyError)


def read_topology(path: str | os.PathLike[str]) -> Topology:
    """Reads and checks a topology file.

    Raises:
        TopologyError: the file is missing, too large, not JSON, or violates the format; the text says where.
    """
    return read_document(path, MAX_FILE_BYTES, parse_topology, _FAULT, "share dendrograms between heads")


def parse_topology(text: str) -> Topology:
    """Checks the text of a topology file.

    Raises:
        TopologyError: it violates the format; the text says where.
    """
    parsed = mapping(parse_json(text, "topology", _FAULT), "topology")
    routes = type(parsed.get("version")) is int and parsed["version"] == 2
    root = object_of(
        parsed,
        "topology",
        required=("format", "version", "model", "block_size", "num_blocks", "dendrograms", "layers"),
        optional=("beyond", "provenance", *(("router",) if routes else ())),
    )
    constant(root["format"], "format", "surgeon.topology")
    if not routes and (type(root["version"]) is not int or root["version"] != 1):
        raise TopologyError("version", "1 or 2", short_repr(root["version"]), "this version reads nothing else")
    model = _model(root["model"])
    block_size = integer(root["block_size"], "block_size", BLOCK_SIZES.start, BLOCK_SIZES[-1])
    if block_size not in BLOCK_SIZES:
        raise TopologyError("block_size", "a multiple of 16 tokens", str(block_size), "use 32, 64 or 128")
    num_blocks = integer(root["num_blocks"], "num_blocks", 1, MAX_BLOCKS)
    beyond = choice(root.get("beyond", "window"), "beyond", ("window", "dense", "error"))
    trees = list_of(root["dendrograms"], "dendrograms", 0, MAX_LAYERS * MAX_HEADS)
    layers = list_of(root["layers"], "layers", 1, MAX_LAYERS)
    if len(layers) != model.num_hidden_layers:
        raise TopologyError(
            "layers",
            f"{model.num_hidden_layers} layers, as model.num_hidden_layers says",
            str(len(layers)),
            "list every layer",
        )
    if all(layer is None for layer in layers):
        raise TopologyError("layers", "heads for at least one layer", "null for all", "give a layer its heads")
    read_layers = tuple(
        _layer(layer, f"layers[{i}]", model.num_attention_heads, len(trees), routes) for i, layer in enumerate(layers)
    )
    return Topology(
        model=model,
        block_size=block_size,
        num_blocks=num_blocks,
        dendrograms=tuple(_dendrogram(tree, f"dendrograms[{i}]", num_blocks) for i, tree in enumerate(trees)),
        layers=read_layers,
        beyond=beyond,
        provenance=check_provenance(mapping(root.get("provenance", {}), "provenance")),
        router=read_router(root.get("router"), model, read_layers),
    )


def _model(value: object) -> ModelShape:
    fields = object_of(
        value,
        "model",
        required=("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
        optional=("weights_sha256",),
    )
    model_type = fields["model_type"]
    if not isinstance(model_type, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", model_type):
        raise TopologyError(
            "model.model_type", "a Transformers model type", short_repr(model_type), 'use for example "llama"'
        )
    heads = integer(fields["num_attention_heads"], "model.num_attention_heads", 1, MAX_HEADS)
    kv_heads = integer(fields["num_key_value_heads"], "model.num_key_value_heads", 1, MAX_HEADS)
    if heads % kv_heads:
        raise TopologyError(
            "model.num_attention_heads",
            f"a multiple of num_key_value_heads ({kv_heads})",
            str(heads),
            "copy both from the model's config.json",
        )
    weights = fields.get("weights_sha256")
    if weights is not None and not (isinstance(weights, str) and re.fullmatch(r"[0-9a-f]{64}", weights)):
        raise TopologyError(
            "model.weights_sha256",
            "64 lower-case hexadecimal digits or null",
            short_repr(weights),
            "use surgeon.runtime.weights_id",
        )
    return ModelShape(
        model_type=model_type,
        num_hidden_layers=integer(fields["num_hidden_layers"], "model.num_hidden_layers", 1, MAX_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=integer(fields["head_dim"], "model.head_dim", 1, 1024),
        weights_sha256=weights,
    )


def _dendrogram(value: object, where: str, num_blocks: int) -> Dendrogram:
    fields = mapping(value, where)
    if "paths" not in fields:
        rows = list_of(object_of(value, where, required=("linkage",))["linkage"], f"{where}.linkage", 0, MAX_BLOCKS)
        return Dendrogram.from_linkage(cast(list[list[object]], rows), num_blocks, f"{where}.linkage")
    object_of(value, where, required=("paths", "arity"))
    arity = integer(fields["arity"], f"{where}.arity", 2, 1024)
    place = f"{where}.paths"
    paths = [
        _digits(list_of(path, f"{place}[{block}]", 0, MAX_DEPTH), f"{place}[{block}]")
        for block, path in enumerate(list_of(fields["paths"], place, 0, MAX_BLOCKS))
    ]
    if len(paths) != num_blocks:
        raise TopologyError(place, f"{num_blocks} paths, one per block", str(len(paths)), "give every block its digits")
    return Dendrogram.from_paths(paths, arity, place)


def _digits(path: list[Any], where: str) -> list[int]:
    for level, digit in enumerate(path):
        if (
            type(digit) is not int or not 0 <= digit <= _MAX_DIGIT
        ):  # names the place of a wrong one only: there are many
            integer(digit, f"{where}[{level}]", 0, _MAX_DIGIT)
    return path


def _layer(value: object, where: str, num_heads: int, num_trees: int, routes: bool) -> tuple[Head, ...]:
    if value is None:  # not covered
        return ()
    heads = list_of(object_of(value, where, required=("heads",))["heads"], f"{where}.heads", 1, MAX_HEADS)
    if len(heads) != num_heads:
        raise TopologyError(
            f"{where}.heads",
            f"{num_heads} heads, as model.num_attention_heads says",
            str(len(heads)),
            'list every query head; {"dense": true} is one',
        )
    return tuple(_head(head, f"{where}.heads[{i}]", num_trees, routes) for i, head in enumerate(heads))


def _head(value: object, where: str, num_trees: int, routes: bool) -> Head:
    if "dense" in mapping(value, where):
        constant(object_of(value, where, required=("dense",))["dense"], f"{where}.dense", True)
        return DenseHead()
    of_tree, more = ("dendrogram", "cut"), ("route",) if routes else ()
    if not any(key in mapping(value, where) for key in of_tree):
        fields = object_of(value, where, required=("sink", "window"), optional=(*of_tree, *more))
        return WindowHead(sink=_sink(fields, where), window=_window(fields, where), route=_route(fields, where))
    fields = object_of(value, where, required=(*of_tree, "sink", "window"), optional=more)
    cut = fields["cut"]
    if isinstance(cut, bool) or not isinstance(cut, int | float) or not 0 <= cut <= sys.float_info.max:
        raise TopologyError(f"{where}.cut", "a finite height of at least 0", short_repr(cut), "use 0.0 for no clusters")
    dendrogram = integer(fields["dendrogram"], f"{where}.dendrogram", 0, MAX_LAYERS * MAX_HEADS)
    if dendrogram >= num_trees:
        raise TopologyError(
            f"{where}.dendrogram",
            f"an index below {num_trees}",
            str(dendrogram),
            "add the tree to dendrograms or correct the index",
        )
    return SparseHead(
        dendrogram=dendrogram,
        cut=abs(float(cut)),  # abs: −0.0 and 0.0 are one height
        sink=_sink(fields, where),
        window=_window(fields, where),
        route=_route(fields, where),
    )


def _sink(fields: Mapping[str, Any], where: str) -> int:
    return integer(fields["sink"], f"{where}.sink", 0, MAX_BLOCKS)


def _window(fields: Mapping[str, Any], where: str) -> int:
    return integer(fields["window"], f"{where}.window", 1, MAX_BLOCKS)


def _route(fields: Mapping[str, Any], where: str) -> int:
    return integer(fields.get("route", 0), f"{where}.route", 0, MAX_BLOCKS)
