"""Every way to break a topology document in one place, with the error that it must cause."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import topologies

REMOVED = object()


@dataclass(frozen=True)
class Fault:
    """`value` put at `place` of the example document; `structural` faults are ones that a JSON Schema can see.

    `routed` faults are in the example of version 2.
    """

    place: tuple[str | int, ...]
    value: object
    text: str
    structural: bool = True
    routed: bool = False

    def document(self) -> dict[str, Any]:
        document = topologies.routed_example() if self.routed else topologies.example()
        parent: Any = functools.reduce(lambda inner, key: inner[key], self.place[:-1], cast(Any, document))
        if self.value is REMOVED:
            del parent[self.place[-1]]
        elif isinstance(parent, list) and self.place[-1] == len(parent):
            parent.append(self.value)
        else:
            parent[self.place[-1]] = self.value
        return document

    def __str__(self) -> str:
        value = "removed" if self.value is REMOVED else repr(self.value)[:20]
        return "routed " * self.routed + ".".join(map(str, self.place)) + "=" + value


INTEGER = "expected a whole number, got {}; write it without quotes, point or exponent"
RANGE = "expected a number in {}..{}, got {}; correct it"
LIST = "expected a list, got {}; write it in brackets"
OBJECT = "expected an object, got {}; write it in braces"
UNKNOWN = "expected the keys {}, got an unknown key {!r}; remove it or correct its spelling"
MISSING = "expected the key {!r}, got an object without it; add it"
CUT = "expected a finite height of at least 0, got {}; use 0.0 for no clusters"
HEIGHT = "expected a finite height of at least 0, got {}; correct the third column"
WHOLE = "expected a whole number for {}, got {}; correct the entry"

ROOT_KEYS = ("format", "version", "model", "block_size", "num_blocks", "dendrograms", "layers")
MODEL_KEYS = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
HEAD_KEYS = ("dendrogram", "cut", "sink", "window")
ROWS = ("dendrograms", 0, "linkage")
PATHS = ("dendrograms", 1, "paths")
HEAD = ("layers", 1, "heads", 3)
HUGE = 10**400
HUGE_SHOWN = "1" + "0" * 58 + "…"


def _spelled(place: Sequence[str | int]) -> str:
    """The place layers[1].heads[3], as the reader writes it."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).lstrip(".")


def _missing() -> list[Fault]:
    faults = [Fault((key,), REMOVED, "topology: " + MISSING.format(key)) for key in ROOT_KEYS]
    faults += [Fault(("model", key), REMOVED, "model: " + MISSING.format(key)) for key in MODEL_KEYS]
    faults += [Fault((*HEAD, key), REMOVED, f"{_spelled(HEAD)}: " + MISSING.format(key)) for key in HEAD_KEYS]
    return [
        *faults,
        Fault(HEAD, {}, f"{_spelled(HEAD)}: " + MISSING.format("sink")),
        Fault(HEAD, {"sink": 1}, f"{_spelled(HEAD)}: " + MISSING.format("window")),
        Fault(HEAD, {"window": 1}, f"{_spelled(HEAD)}: " + MISSING.format("sink")),
        Fault(HEAD, {"cut": 1.0}, f"{_spelled(HEAD)}: " + MISSING.format("dendrogram")),
        Fault(("layers", 0, "heads"), REMOVED, "layers[0]: " + MISSING.format("heads")),
        Fault(ROWS, REMOVED, "dendrograms[0]: " + MISSING.format("linkage")),
        Fault(("dendrograms", 1, "arity"), REMOVED, "dendrograms[1]: " + MISSING.format("arity")),
        Fault(("dendrograms", 1), {"arity": 2}, "dendrograms[1]: " + MISSING.format("linkage")),
    ]


def _unknown() -> list[Fault]:
    root = ", ".join((*ROOT_KEYS, "beyond", "provenance"))
    model = ", ".join((*MODEL_KEYS, "weights_sha256"))
    head = ", ".join(HEAD_KEYS)
    treeless = "sink, window, dendrogram, cut"
    return [
        Fault(("colour",), 1, "topology: " + UNKNOWN.format(root, "colour")),
        Fault(("a\nline \ud800",), 1, "topology: " + UNKNOWN.format(root, "a\nline \ud800")),
        Fault(("k" * 9999,), 1, "topology: " + UNKNOWN.format(root, "k" * 58).replace("k'", "k…")),
        Fault(("model", "rope"), None, "model: " + UNKNOWN.format(model, "rope")),
        Fault(("layers", 1, "norm"), {}, "layers[1]: " + UNKNOWN.format("heads", "norm")),
        Fault((*HEAD, "windwo"), 2, f"{_spelled(HEAD)}: " + UNKNOWN.format(head, "windwo")),
        Fault(HEAD, {"sink": 1, "window": 1, "cuts": 1}, f"{_spelled(HEAD)}: " + UNKNOWN.format(treeless, "cuts")),
        Fault(("layers", 0, "heads", 1, "cut"), 1.0, "layers[0].heads[1]: " + UNKNOWN.format("dense", "cut")),
        Fault(("dendrograms", 0, "arity"), 2, "dendrograms[0]: " + UNKNOWN.format("linkage", "arity")),
        Fault(("dendrograms", 1, "linkage"), [], "dendrograms[1]: " + UNKNOWN.format("paths, arity", "linkage")),
    ]


def _integers() -> list[Fault]:
    fields: list[tuple[tuple[str | int, ...], int, int]] = [
        (("model", "num_hidden_layers"), 1, 512),
        (("model", "num_attention_heads"), 1, 512),
        (("model", "num_key_value_heads"), 1, 512),
        (("model", "head_dim"), 1, 1024),
        (("block_size",), 16, 1024),
        (("num_blocks",), 1, 16384),
        (("dendrograms", 1, "arity"), 2, 1024),
        ((*HEAD, "dendrogram"), 0, 262144),
        ((*HEAD, "sink"), 0, 16384),
        ((*HEAD, "window"), 1, 16384),
    ]
    faults = []
    for place, low, high in fields:
        where = _spelled(place) + ": "
        faults += [Fault(place, value, where + INTEGER.format(repr(value))) for value in (True, None, "3", 2.5, [1])]
        # JSON Schema takes 3.0 for an integer.
        faults.append(Fault(place, float(low), where + INTEGER.format(float(low)), structural=False))
        faults += [
            Fault(place, value, where + RANGE.format(low, high, value)) for value in (low - 1, high + 1, -(2**70))
        ]
        faults.append(Fault(place, HUGE, where + RANGE.format(low, high, HUGE_SHOWN)))
    return faults


def _model() -> list[Fault]:
    kind = 'model.model_type: expected a Transformers model type, got {}; use for example "llama"'
    weights = (
        "model.weights_sha256: expected 64 lower-case hexadecimal digits or null, got {}; "
        "use surgeon.runtime.weights_id"
    )
    return [
        Fault(
            ("format",),
            "surgeon.package",
            "format: expected 'surgeon.topology', got 'surgeon.package'; this version reads nothing else",
        ),
        Fault(("version",), 3, "version: expected 1 or 2, got 3; this version reads nothing else"),
        Fault(("version",), True, "version: expected 1 or 2, got True; this version reads nothing else"),
        Fault(
            ("version",), 1.0, "version: expected 1 or 2, got 1.0; this version reads nothing else", structural=False
        ),
        Fault(
            ("version",), 2.0, "version: expected 1 or 2, got 2.0; this version reads nothing else", structural=False
        ),
        Fault(("model",), ["llama"], "model: " + OBJECT.format("['llama']")),
        *(
            Fault(("model", "model_type"), value, kind.format(repr(value)))
            for value in (3, None, "", "two words", "a\nb", "\ud800")
        ),
        # Python's $ matches before a last line break, a browser's does not.
        Fault(("model", "model_type"), "llama\n", kind.format(repr("llama\n")), structural=False),
        Fault(("model", "model_type"), "m" * 101, kind.format("'" + "m" * 58 + "…")),
        *(Fault(("model", "weights_sha256"), value, weights.format(repr(value))) for value in (7, "", "abc")),
        Fault(("model", "weights_sha256"), "A" * 64, weights.format("'" + "A" * 58 + "…")),
        Fault(
            ("model", "num_key_value_heads"),
            3,
            "model.num_attention_heads: expected a multiple of num_key_value_heads (3), got 4; "
            "copy both from the model's config.json",
            structural=False,
        ),
        Fault(("block_size",), 24, "block_size: expected a multiple of 16 tokens, got 24; use 32, 64 or 128"),
        *(
            Fault(
                ("beyond",), value, f"beyond: expected one of window, dense, error, got {value!r}; choose one of these"
            )
            for value in ("nothing", None, True, ["window"])
        ),
        Fault(("provenance",), [], "provenance: " + OBJECT.format("[]")),
        Fault(("provenance",), None, "provenance: " + OBJECT.format("None")),
    ]


def _linkages() -> list[Fault]:
    row = "dendrograms[0].linkage[1]: "
    four = row + "expected [left, right, height, count], got {}; give four numbers, as SciPy's linkage does"
    nodes = row + "expected a {} node in 0..3, got {}; merge only blocks and nodes made by earlier rows"
    falling = (
        row
        + "expected a height of at least 1.0, its {} child's, got 0.5; "
        + "let heights grow toward the root (average, complete or single linkage do)"
    )
    merges = (
        "dendrograms[0].linkage: expected 2 merges for 3 blocks, got {}; "
        "give one row for every merge, as scipy.cluster.hierarchy.linkage does"
    )
    count = (
        "dendrograms[0].linkage[{}]: expected count {}, the number of blocks below, got {}; correct the fourth column"
    )
    no_rows: tuple[object, ...] = (None, 7, "row", {}, [], [2, 3, 2.0], [2, 3, 2.0, 3, 0])
    faults = [
        Fault(("dendrograms",), {}, "dendrograms: " + LIST.format("{}")),
        Fault(("dendrograms", 0), None, "dendrograms[0]: " + OBJECT.format("None")),
        Fault(("dendrograms", 0), [[0, 1, 1.0, 2]], "dendrograms[0]: " + OBJECT.format("[[0, 1, 1.0, 2]]")),
        Fault(ROWS, None, "dendrograms[0].linkage: " + LIST.format("None")),
        Fault(ROWS, [], merges.format(0), structural=False),
        Fault((*ROWS, 1), REMOVED, merges.format(1), structural=False),
        Fault((*ROWS, 2), [4, 0, 3.0, 4], merges.format(3), structural=False),
        *(Fault((*ROWS, 1), value, four.format(repr(value))) for value in no_rows),
        *(Fault((*ROWS, 1, 2), value, row + HEIGHT.format(repr(value))) for value in (None, True, "2", -0.5, [2])),
        Fault((*ROWS, 1, 2), float("nan"), row + HEIGHT.format("nan"), structural=False),
        Fault((*ROWS, 1, 2), float("inf"), row + HEIGHT.format("inf"), structural=False),
        Fault((*ROWS, 1, 2), HUGE, row + HEIGHT.format(HUGE_SHOWN), structural=False),
        Fault((*ROWS, 1, 2), 0.5, falling.format("right"), structural=False),
        Fault((*ROWS, 1), [3, 2, 0.5, 3], falling.format("left"), structural=False),
        Fault((*ROWS, 1, 0), 4, nodes.format("left", 4), structural=False),
        Fault((*ROWS, 1, 1), 4, nodes.format("right", 4), structural=False),
        Fault((*ROWS, 1, 0), HUGE, nodes.format("left", HUGE_SHOWN), structural=False),
        Fault((*ROWS, 1, 0), -1, nodes.format("left", -1)),
        Fault(
            (*ROWS, 1, 0),
            0,
            row + "expected nodes not merged before, got block 0 again; merge every node exactly once",
            structural=False,
        ),
        Fault(
            (*ROWS, 1, 0),
            3,
            row + "expected nodes not merged before, got node 3 again; merge every node exactly once",
            structural=False,
        ),
        Fault((*ROWS, 1, 3), 4, count.format(1, 3, 4), structural=False),
        Fault((*ROWS, 0, 3), 3, count.format(0, 2, 3), structural=False),
        Fault((*ROWS, 0, 3), HUGE, count.format(0, 2, HUGE_SHOWN), structural=False),
    ]
    for column, name in ((0, "left"), (1, "right"), (3, "count")):
        faults += [
            Fault((*ROWS, 1, column), value, row + WHOLE.format(name, repr(value))) for value in (None, True, "2", 0.5)
        ]
        faults.append(Fault((*ROWS, 1, column), float("nan"), row + WHOLE.format(name, "nan")))
        faults.append(Fault((*ROWS, 1, column), float("inf"), row + WHOLE.format(name, "inf")))
    return faults


def _paths() -> list[Fault]:
    where = _spelled(PATHS)
    digit = f"{where}[1][0]: "
    return [
        Fault(PATHS, None, f"{where}: " + LIST.format("None")),
        Fault(
            PATHS, [], f"{where}: expected 3 paths, one per block, got 0; give every block its digits", structural=False
        ),
        Fault(
            (*PATHS, 3),
            [1, 1],
            f"{where}: expected 3 paths, one per block, got 4; give every block its digits",
            structural=False,
        ),
        Fault((*PATHS, 1), 10, f"{where}[1]: " + LIST.format("10")),
        Fault((*PATHS, 1), [0] * 65, f"{where}[1]: expected 0 to 64 entries, got 65; correct the list"),
        Fault(
            (*PATHS, 1),
            [1],
            f"{where}[1]: expected 2 digits, as in the first path, got 1; give every block a path of the same length",
            structural=False,
        ),
        Fault(
            (*PATHS, 1, 0),
            2,
            digit + "expected a digit in 0..1, got 2; raise arity or correct the digit",
            structural=False,
        ),
        *(Fault((*PATHS, 1, 0), value, digit + INTEGER.format(repr(value))) for value in (True, None, "1", 0.5)),
        Fault((*PATHS, 1, 0), -1, digit + RANGE.format(0, 1023, -1)),
        Fault((*PATHS, 1, 0), HUGE, digit + RANGE.format(0, 1023, HUGE_SHOWN)),
    ]


def _layers() -> list[Fault]:
    head = _spelled(HEAD)
    two = "layers: expected 2 layers, as model.num_hidden_layers says, got {}; list every layer"
    four = (
        "layers[0].heads: expected 4 heads, as model.num_attention_heads says, got {}; "
        'list every query head; {{"dense": true}} is one'
    )
    return [
        Fault(("layers",), {}, "layers: " + LIST.format("{}")),
        Fault(("layers",), [], "layers: expected 1 to 512 entries, got 0; correct the list"),
        Fault(("layers",), [{"heads": []}] * 513, "layers: expected 1 to 512 entries, got 513; correct the list"),
        Fault(("layers", 1), REMOVED, two.format(1), structural=False),
        Fault(("layers", 2), {"heads": [{"dense": True}] * 4}, two.format(3), structural=False),
        Fault(
            ("layers",),
            [None, None],
            "layers: expected heads for at least one layer, got null for all; give a layer its heads",
        ),
        Fault(("layers", 0), [], "layers[0]: " + OBJECT.format("[]")),
        Fault(("layers", 0, "heads"), None, "layers[0].heads: " + LIST.format("None")),
        Fault(("layers", 0, "heads"), [], "layers[0].heads: expected 1 to 512 entries, got 0; correct the list"),
        Fault(("layers", 0, "heads", 3), REMOVED, four.format(3), structural=False),
        Fault(("layers", 0, "heads", 4), {"dense": True}, four.format(5), structural=False),
        Fault(HEAD, {"sink": -1, "window": 1}, f"{head}.sink: " + RANGE.format(0, 16384, -1)),
        Fault(HEAD, {"sink": 1, "window": 0}, f"{head}.window: " + RANGE.format(1, 16384, 0)),
        Fault(HEAD, "dense", f"{head}: " + OBJECT.format("'dense'")),
        *(
            Fault(
                ("layers", 0, "heads", 1, "dense"),
                value,
                f"layers[0].heads[1].dense: expected True, got {value!r}; this version reads nothing else",
            )
            for value in (False, 1, "true", None)
        ),
        Fault(
            (*HEAD, "dendrogram"),
            2,
            f"{head}.dendrogram: expected an index below 2, got 2; add the tree to dendrograms or correct the index",
            structural=False,
        ),
        *(
            Fault((*HEAD, "cut"), value, f"{head}.cut: " + CUT.format(repr(value)))
            for value in (None, True, "0.3", -1, [0])
        ),
        Fault((*HEAD, "cut"), float("nan"), f"{head}.cut: " + CUT.format("nan"), structural=False),
        Fault((*HEAD, "cut"), float("inf"), f"{head}.cut: " + CUT.format("inf"), structural=False),
        Fault((*HEAD, "cut"), HUGE, f"{head}.cut: " + CUT.format(HUGE_SHOWN), structural=False),
    ]


def _routes() -> list[Fault]:
    route, row = ("layers", 0, "heads", 0, "route"), ("router", "layers", 0, "scale", 1)
    centre = ("router", "layers", 0, "centre")
    root = ", ".join((*ROOT_KEYS, "beyond", "provenance"))
    treeless = "sink, window, dendrogram, cut"
    entry = "router: expected an entry for layer 0, which has routed heads, got no router; "
    entry += 'add the router that the heads were learned with, or remove their "route"'
    positive = "router.layers[0].scale[1][2]: expected a finite number above 0, got {}; measure the keys again"
    finite = "router.layers[0].centre[1][2]: expected a finite number, got {}; measure the keys again"
    three = "router.layers[0].scale[1]: expected 3 entries, one per channel, got {}; use the router of this model"
    two = "router.layers[0].centre: expected 2 entries, one per KV head, got {}; use the router of this model"
    layers = "router.layers: expected 2 layers, as model.num_hidden_layers says, got 1; "
    layers += "list every layer; null stands for one without routed heads"
    eight = "router.node: expected 8, got {!r}; this version reads nothing else"
    sixteen = "router.tile: expected 16, got {!r}; this version reads nothing else"
    where = "layers[0].heads[0].route: "
    old = UNKNOWN.format(treeless, "route")
    faults = [
        Fault((*HEAD, "route"), 1, f"{_spelled(HEAD)}: " + UNKNOWN.format(", ".join(HEAD_KEYS), "route")),
        Fault(HEAD, {"sink": 1, "window": 1, "route": 1}, f"{_spelled(HEAD)}: {old}"),
        Fault(("router",), None, "topology: " + UNKNOWN.format(root, "router")),
    ]
    in_version_2: list[tuple[tuple[str | int, ...], object, str, bool]] = [
        (("router",), REMOVED, entry, False),
        (("router",), [], "router: " + OBJECT.format("[]"), True),
        (("router", "colour"), 1, "router: " + UNKNOWN.format("node, tile, layers", "colour"), True),
        *((("router", key), REMOVED, "router: " + MISSING.format(key), True) for key in ("node", "tile", "layers")),
        *((("router", "node"), value, eight.format(value), True) for value in (16, "8", None)),
        (("router", "node"), 8.0, eight.format(8.0), False),
        *((("router", "tile"), value, sixteen.format(value), True) for value in (8, True)),
        (("router", "layers"), {}, "router.layers: " + LIST.format("{}"), True),
        (("router", "layers", 1), REMOVED, layers, False),
        (
            ("router", "layers", 0),
            None,
            "router.layers[0]: expected an object, for the layer's routed heads, got null; add centre and scale",
            False,
        ),
        (("router", "layers", 0), [], "router.layers[0]: " + OBJECT.format("[]"), True),
        *(
            (("router", "layers", 0, key), REMOVED, "router.layers[0]: " + MISSING.format(key), True)
            for key in ("centre", "scale")
        ),
        (("router", "layers", 0, "mean"), [], "router.layers[0]: " + UNKNOWN.format("centre, scale", "mean"), True),
        (centre, 0.0, "router.layers[0].centre: " + LIST.format("0.0"), True),
        ((*centre, 1), REMOVED, two.format(1), False),
        ((*centre, 2), [0.0] * 3, two.format(3), False),
        (row, 1.0, "router.layers[0].scale[1]: " + LIST.format("1.0"), True),
        ((*row, 2), REMOVED, three.format(2), False),
        ((*row, 3), 1.0, three.format(4), False),
        *(((*row, 2), value, positive.format(repr(value)), True) for value in (0, 0.0, -1, True, "1", None)),
        *(((*row, 2), value, positive.format(repr(value)), False) for value in (1e-39, 1e39, float("nan"))),
        *(((*centre, 1, 2), value, finite.format(repr(value)), True) for value in (False, "0", None, [0])),
        *(((*centre, 1, 2), value, finite.format(repr(value)), False) for value in (1e39, -1e39, float("inf"))),
        ((*centre, 1, 2), HUGE, finite.format(HUGE_SHOWN), False),
        *((route, value, where + INTEGER.format(repr(value)), True) for value in (True, None, "3", 2.5)),
        (route, 2.0, where + INTEGER.format(2.0), False),
        *((route, value, where + RANGE.format(0, 16384, value), True) for value in (-1, 16385)),
        (("layers", 1, "heads", 1, "route"), 1, "layers[1].heads[1]: " + UNKNOWN.format("dense", "route"), True),
    ]
    return faults + [Fault(place, value, text, seen, routed=True) for place, value, text, seen in in_version_2]


FAULTS = [*_missing(), *_unknown(), *_integers(), *_model(), *_linkages(), *_paths(), *_layers(), *_routes()]
