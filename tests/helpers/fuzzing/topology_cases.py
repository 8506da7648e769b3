"""Cases of topology.json: valid ones of every kind, changed in structure, meaning and text; and their judgement."""

import contextlib
import copy
import functools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np

from fuzzing import json_mutations, rules
from fuzzing.cases import Kind, Verdict
from fuzzing.json_mutations import Raw
from fuzzing.topology_checker import InvalidError, Valid, check
from schedules import block_mask
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.topology import read
from surgeon.compiler.topology.topology import Topology
from surgeon.compiler.topology.write import spelled
from surgeon.runtime.errors import TopologyError

LEARNED = sorted((Path(__file__).parents[3] / "benchmarks/topologies").glob("*.json"))
_SCHEMA = Path(read.__file__).with_name("topology.schema.json")
_LEARNED_ONE_IN = 50
"""Cases that take one of the learned topologies are one in so many: they are large."""

Json = dict[str, Any]


class Case(NamedTuple):
    """The bytes of a file; `valid` says that it was changed only in ways that keep it valid."""

    data: bytes
    valid: bool


def make(rng: random.Random) -> Case:
    """Makes a case."""
    if rng.randrange(2000) == 0:
        return Case(_at_a_limit(rng), valid=False)
    large = rng.randrange(_LEARNED_ONE_IN) == 0
    document = _learned(rng.randrange(len(LEARNED))) if large else valid_document(rng)
    for _ in range(rng.choice((0, 0, 1, 2))):
        rng.choice(KEEPING)(document, rng)
    if rng.random() < 0.15:
        return Case(_valid_text(document, rng), valid=True)
    kind = rng.random()
    for _ in range(rng.choice((1, 1, 1, 2, 3)) if kind < 0.85 else 0):
        with contextlib.suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # it is broken
            (rng.choice(BREAKING) if rng.random() < 0.4 else json_mutations.mutate)(document, rng)
    data = json_mutations.encode(document).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice((1, 1, 2)) if kind >= 0.8 else 0):
        data = json_mutations.damage(data, rng)
    return Case(data, valid=False)


def judge(case: Case, rng: random.Random, file: Path) -> Verdict:
    """Reads a case by both readers and compares them; looks closer at some of the accepted ones."""
    file.write_bytes(case.data)
    expected: Valid | str
    try:
        expected = check(case.data)
    except InvalidError as reason:
        expected = str(reason)
    try:
        topology = read.read_topology(file)
    except TopologyError as error:
        if not isinstance(expected, str):
            return Verdict("refused", f"wrong refusal of a valid topology: {error}")
        text = str(error).replace(str(file), "")
        if not text.isprintable() or len(text) > 1000:
            return Verdict("refused", f"an error that is not one printable line: {text!r:.200}")
        return Verdict("refused", "wrong refusal of a change that keeps it valid" if case.valid else "")
    if isinstance(expected, str):
        return Verdict("accepted", f"wrong acceptance: {expected}")
    if expected.document["num_blocks"] > 40 or rng.random() < 0.85:
        return Verdict("accepted", "")
    return Verdict("accepted, compared", _difference(expected, topology, rng))


def _difference(expected: Valid, topology: Topology, rng: random.Random) -> str:
    """The first difference between an accepted topology and the definition, or nothing."""
    document = expected.document
    if rng.random() < 0.3 and not _validator().is_valid(document):
        return "accepted against the schema"
    blocks, beyond = document["num_blocks"], document.get("beyond", "window")
    length = blocks if beyond == "error" else blocks + rng.randrange(6)
    schedules = schedule_layers(topology)
    for layer, found in enumerate(document["layers"]):
        if len(schedules[layer].heads) != len(found["heads"] if found else ()):
            return f"layer {layer} has another number of heads"
        for head in range(len(schedules[layer].heads)):
            mask = block_mask(schedules[layer].heads[head], length)
            wanted = [[expected.visible(layer, head, i, j) for j in range(length)] for i in range(length)]
            if not np.array_equal(mask, np.array(wanted)):
                return f"layer {layer} head {head}: the schedule is not what the definition says"
    text = spelled(topology)
    again = read.parse_topology(text)
    if again != topology or again.sha256 != topology.sha256:
        return "written and read again, it is another"
    check(text.encode())
    return ""


@functools.cache
def _validator() -> Any:
    return jsonschema.Draft202012Validator(json.loads(_SCHEMA.read_text("utf-8")))


def _learned(index: int) -> Json:
    found: Json = json.loads(_text(index))
    return found


@functools.cache
def _text(index: int) -> str:
    return LEARNED[index].read_text("utf-8")


# Valid documents


def valid_document(rng: random.Random) -> Json:
    """A small document with trees of both kinds and heads of every kind, from one block and one head on."""
    blocks = rng.choice((1, 1, 2, 2, 3, 4, 5, 7, 8, 11, 16))
    trees = [_tree(rng, blocks) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    kv_heads, group, layers = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2)), rng.choice((1, 1, 2, 3))
    covered = rng.randrange(layers)
    document = {
        "format": "surgeon.topology",
        "version": 1,
        "model": {
            "model_type": rng.choice(("llama", "qwen2", "a.b-c_D9", "m" * 100)),
            "num_hidden_layers": layers,
            "num_attention_heads": kv_heads * group,
            "num_key_value_heads": kv_heads,
            "head_dim": rng.choice((1, 32, 64, 1024)),
            "weights_sha256": rng.choice((None, "0f" * 32)),
        },
        "block_size": rng.choice((16, 32, 64, 128, 1024)),
        "num_blocks": blocks,
        "dendrograms": trees,
        "layers": [
            {"heads": [_head(rng, trees, blocks) for _ in range(kv_heads * group)]}
            if layer == covered or rng.random() < 0.8
            else None
            for layer in range(layers)
        ],
        "beyond": rng.choice(("window", "dense", "error")),
        "provenance": rng.choice(({}, {"method": "window", "figures": [1.5, {"kl": 1e-9}], "text": "é\U0001f600"})),
    }
    for name in ("beyond", "provenance"):
        if rng.random() < 0.2:
            del document[name]
    return document


def _head(rng: random.Random, trees: list[Json], blocks: int) -> Json:
    if not trees or rng.random() < 0.2:
        return {"dense": True}
    near = {
        "sink": rng.choice((0, 0, 1, 2, blocks, blocks + 2)),
        "window": rng.choice((1, 1, 2, 3, blocks, blocks + 3)),
    }
    if rules.TREELESS_HEADS and rng.random() < 0.3:
        return near
    tree = rng.randrange(len(trees))
    heights = [row[2] for row in trees[tree].get("linkage", ())] or [0, 1, 2.0]
    return {"dendrogram": tree, "cut": rng.choice((0, 0.0, 0.5, 1e9, rng.choice(heights))), **near}


def _tree(rng: random.Random, blocks: int) -> Json:
    if rng.random() < 0.4:
        arity, depth = rng.choice((2, 2, 3, 5, 1024)), rng.choice((0, 1, 2, 3, 6, 64))
        some = min(arity, rng.choice((2, 3, arity)))
        return {"paths": [[rng.randrange(some) for _ in range(depth)] for _ in range(blocks)], "arity": arity}
    nodes, rows, height = [(block, 1) for block in range(blocks)], [], 0.0
    contiguous = rng.random() < 0.5
    while len(nodes) > 1:
        height += rng.choice((0, 0, 0.25, 1, 1e-300))
        first = rng.randrange(len(nodes) - 1)
        second = first + 1 if contiguous else rng.randrange(first + 1, len(nodes))
        (left, some), (right, others) = nodes[first], nodes.pop(second)
        rows.append([left, right, height, some + others])
        nodes[first] = (blocks + len(rows) - 1, some + others)
    return {"linkage": rows}


def _valid_text(document: Json, rng: random.Random) -> bytes:
    text = json.dumps(
        document,
        ensure_ascii=rng.random() < 0.5,
        indent=rng.choice((None, None, 1, "\t")),
        separators=rng.choice((None, (",", ":"), (" ,\r\n", " : "))),
    )
    if rng.random() < 0.3:
        text = (
            text.replace("format", "f\\u006frmat", 1)
            .replace("window", "\\u0077indow")
            .replace("heads", "head\\u0073", 1)
        )
    return (rng.choice(("", " ", "\n\r\t")) + text + rng.choice(("", "\n", " \t\r\n"))).encode()


# Changes that keep a document valid


def _linkages(document: Json) -> list[list[Any]]:
    return [tree["linkage"] for tree in document["dendrograms"] if tree.get("linkage")]


def _sides(document: Json, rng: random.Random) -> None:
    for rows in _linkages(document):
        for row in rows:
            if rng.random() < 0.5:
                row[0], row[1] = row[1], row[0]


def _floats(document: Json, rng: random.Random) -> None:
    for rows in _linkages(document):
        rows[:] = [list(map(float, row)) for row in rows]


def _equal_heights(document: Json, rng: random.Random) -> None:
    for rows in _linkages(document):
        for row in rows:
            row[2] = rows[-1][2]


def _as_raw(document: Json, rng: random.Random) -> None:
    for rows in _linkages(document):
        for row in rows:
            row[2] = row[2] * 2.0 or -0.0


def _relabelled(document: Json, rng: random.Random) -> None:
    """Exchanges two blocks in a tree."""
    blocks = document["num_blocks"]
    one, other = rng.randrange(blocks), rng.randrange(blocks)
    names = {one: other, other: one}
    for rows in _linkages(document):
        for row in rows:
            row[:2] = (names.get(node, node) for node in row[:2])
    for tree in document["dendrograms"]:
        if "paths" in tree:
            tree["paths"][one], tree["paths"][other] = tree["paths"][other], tree["paths"][one]


def _keys_turned(document: Json, rng: random.Random) -> None:
    items = list(document.items())
    rng.shuffle(items)
    document.clear()
    document.update(items)


def _trees_turned(document: Json, rng: random.Random) -> None:
    document["dendrograms"].reverse()
    for head in _heads(document):
        if "dendrogram" in head:
            head["dendrogram"] = len(document["dendrograms"]) - 1 - head["dendrogram"]


def _an_unused_tree(document: Json, rng: random.Random) -> None:
    if document["num_blocks"] <= 40:
        document["dendrograms"].append(_tree(rng, document["num_blocks"]))


def _other_digits(document: Json, rng: random.Random) -> None:
    for tree in document["dendrograms"]:
        if "paths" in tree:
            tree["paths"] = [[tree["arity"] - 1 - digit for digit in path] for path in tree["paths"]]


def _provenance(document: Json, rng: random.Random) -> None:
    value: Any = rng.choice((1, "x", None, [True], -1e-320))
    for _ in range(rng.choice((0, 1, rules.MAX_PROVENANCE_LEVELS - 2))):
        value = rng.choice(([value], {"": value}))
    document["provenance"] = {"heads": value, "dense": 2**70, "é\0": []}


def _heads(document: Json) -> list[Json]:
    return [head for layer in document["layers"] if layer for head in layer["heads"]]


KEEPING: tuple[Callable[[Json, random.Random], None], ...] = (
    *(_sides, _floats, _equal_heights, _as_raw, _relabelled, _keys_turned, _trees_turned, _an_unused_tree),
    *(_other_digits, _provenance),
)


# Changes that know the format; most break it


def _rows_turned(document: Json, rng: random.Random) -> None:
    for rows in _linkages(document):
        one, other = rng.randrange(len(rows)), rng.randrange(len(rows))
        rows[one], rows[other] = rows[other], rows[one]


def _number_of_a_merge(document: Json, rng: random.Random) -> None:
    if rows := rng.choice(_linkages(document) or [[]]):
        row, column = rng.choice(rows), rng.randrange(4)
        others = [
            -1,
            0,
            row[column] + 1,
            row[column] - 1,
            row[column] + 0.5,
            len(rows),
            2 * len(rows),
            rng.choice(rows)[column],
        ]
        row[column] = rng.choice(
            [*others, Raw("NaN"), Raw("1e999"), -row[column], 10**400, True, None, str(row[column])]
        )


def _height_falls(document: Json, rng: random.Random) -> None:
    if rows := rng.choice(_linkages(document) or [[]]):
        row = rng.choice(rows)
        row[2] = rng.choice((row[2] / 2, np.nextafter(row[2], -1).item(), 0))


def _a_digit(document: Json, rng: random.Random) -> None:
    trees = [tree for tree in document["dendrograms"] if tree.get("paths")]
    if trees:
        tree = rng.choice(trees)
        path = rng.choice(tree["paths"])
        choice = rng.randrange(4)
        if path and choice == 0:
            path[rng.randrange(len(path))] = rng.choice(
                (tree["arity"], tree["arity"] - 1, -1, 1.0, True, None, 1023, 1024)
            )
        elif path and choice == 1:
            path.pop()
        elif choice == 2:
            path.append(0)
        else:
            tree["arity"] = rng.choice((0, 1, 2, tree["arity"] - 1, 1024, 1025, 2.0, True))


def _a_count(document: Json, rng: random.Random) -> None:
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    name = rng.choice((*names, "num_blocks", "block_size"))
    fields = document["model"] if name in names else document
    now = fields[name]
    fields[name] = rng.choice((now + 1, now - 1, now * 2, 0, -now, float(now), 512, 513, str(now), True, now + 16))


def _a_list(document: Json, rng: random.Random) -> None:
    lists = [document["layers"], document["dendrograms"]]
    lists += [layer["heads"] for layer in document["layers"] if layer]
    lists += list(_linkages(document)) + [tree["paths"] for tree in document["dendrograms"] if "paths" in tree]
    found = rng.choice(lists)
    if found and rng.random() < 0.5:
        found.pop(rng.randrange(len(found)))
    else:
        found.append(copy.deepcopy(rng.choice(found)) if found else None)


def _a_head(document: Json, rng: random.Random) -> None:
    heads = _heads(document)
    if not heads:
        return
    head = rng.choice(heads)
    trees = len(document["dendrograms"])
    changes: tuple[Json, ...] = (
        *({"dense": value} for value in (True, False, 1, None)),
        *({"dendrogram": value} for value in (trees, trees - 1, -1, 0.0, None, False)),
        *({"cut": value} for value in (-1e-300, -0.0, Raw("1e999"), Raw("NaN"), 10**309, 10**308, True, "0")),
        *({"sink": value} for value in (-1, 16384, 16385, 0.0, 1.5, None, False)),
        *({"window": value} for value in (0, -1, 16384, 16385, 1.0, None, True)),
        {"route": 0},
    )
    if rng.random() < 0.2:
        head.pop(rng.choice(list(head)), None)
    elif rng.random() < 0.15:
        head.pop("dendrogram", None)
        head.pop("cut", None)
    else:
        head |= rng.choice(changes)


def _a_layer(document: Json, rng: random.Random) -> None:
    at = rng.randrange(len(document["layers"]))
    document["layers"][at] = rng.choice((None, {}, [], {"heads": []}, {"heads": None}, {"heads": [None]}, False, 0))


BREAKING: tuple[Callable[[Json, random.Random], None], ...] = (
    *(_rows_turned, _number_of_a_merge, _number_of_a_merge, _height_falls, _a_digit, _a_digit, _a_count, _a_count),
    *(_a_list, _a_list, _a_head, _a_head, _a_head, _a_layer),
)


def _at_a_limit(rng: random.Random) -> bytes:
    """A document just within or just beyond a limit."""
    blocks = rng.choice((rules.MAX_BLOCKS, rules.MAX_BLOCKS + 1, 2000))
    layers, heads = rng.choice(
        ((rules.MAX_LAYERS, 1), (rules.MAX_LAYERS + 1, 1), (1, rules.MAX_HEADS), (1, rules.MAX_HEADS + 1))
    )
    depth = rng.choice((0, 1, rules.MAX_DEPTH, rules.MAX_DEPTH + 1)) if blocks == 2000 else 0
    rows = [[0, 1, 0, 2]] + [[block, blocks + block - 2, block, block + 1] for block in range(2, blocks)]
    tree = rng.choice(({"paths": [[0] * depth] * blocks, "arity": rng.choice((2, 1024, 1025))}, {"linkage": rows}))
    head = rng.choice(({"dense": True}, {"dendrogram": 0, "cut": 0, "sink": 0, "window": 1}))
    document = valid_document(rng) | {
        "num_blocks": blocks,
        "dendrograms": [tree] * rng.choice((1, 1, 2)),
        "layers": [{"heads": [head] * heads}] * layers,
    }
    document["model"] |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 1}
    data = json.dumps(document).encode()
    return data + b" " * (rules.MAX_FILE_BYTES + rng.randrange(2) - len(data)) if rng.randrange(30) == 0 else data


def _run(folder: Path, rng: random.Random) -> Verdict:
    return judge(make(rng), rng, folder / f"{os.getpid()}.json")


KIND = Kind("topologies", lambda folder: folder, _run, lambda _, rng: repr(make(rng)))
