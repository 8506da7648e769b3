"""Writes smollm2-135m-trees.json, a topology made by hand that has every kind of tree and head.

Nothing in it was learned: it shows the format and exercises the compiler on a real model's shape.

    python benchmarks/topologies/make_trees.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUM_BLOCKS = 32  # of 64 tokens: 2,048 tokens
NUM_LAYERS = 30
WEIGHTS = "77d8d98246181009f37a107558f8870a8d9f5f3bac29b83d59f6ad0283335862"
DENSE = {"dense": True}


def merged(order: Sequence[int]) -> list[list[int]]:
    """The linkage that merges neighbours in `order`, a power of two of blocks, by levels; heights count the levels."""
    nodes, height = list(order), 0
    rows: list[list[int]] = []
    while len(nodes) > 1:
        height += 1
        made = range(NUM_BLOCKS + len(rows), NUM_BLOCKS + len(rows) + len(nodes) // 2)
        rows += [[left, right, height, 2**height] for left, right in zip(nodes[::2], nodes[1::2], strict=True)]
        nodes = list(made)
    return rows


def digits(block: int, base: int, number: int) -> list[int]:
    """The digits of the block's number in a base, lowest first."""
    return [block // base**place % base for place in range(number)]


def dendrograms() -> list[dict[str, Any]]:
    blocks = range(NUM_BLOCKS)
    folded = [block for first in range(NUM_BLOCKS // 2) for block in (first, NUM_BLOCKS - 1 - first)]
    return [
        # 0: intervals of 2, 4, 8, 16 blocks, as cuts 1, 2, 3, 4
        {"linkage": merged(blocks)},
        # 1: folded in the middle, the first block beside the last: scattered clusters of 2, 4, 8, 16 blocks
        {"linkage": merged(folded)},
        # 2: 2-adic, lowest bit at the root: every 2nd, 4th, 8th, 16th block, as cuts 4, 3, 2, 1
        {"paths": [digits(block, 2, 5) for block in blocks], "arity": 2},
        # 3: 3-adic, lowest digit at the root: every 3rd, 9th, 27th block, as cuts 3, 2, 1
        {"paths": [digits(block, 3, 4) for block in blocks], "arity": 3},
        # 4: intervals of 3, 9, 27 blocks, as cuts 1, 2, 3
        {"paths": [digits(block, 3, 4)[::-1] for block in blocks], "arity": 3},
    ]


def head(dendrogram: int, cut: float, sink: int = 1, window: int = 2) -> dict[str, Any]:
    return {"dendrogram": dendrogram, "cut": cut, "sink": sink, "window": window}


def heads() -> list[list[dict[str, Any]]]:
    """The heads of the layers; the three heads of a line share a KV head. Every fifth layer is the same."""
    five = [
        [
            *(DENSE, DENSE, head(0, 3)),
            *(head(0, 2), head(1, 3), head(2, 3)),
            *(head(3, 2), head(4, 2), head(0, 0, window=4)),
        ],
        [
            *(head(2, 4), head(2, 3), head(2, 2)),
            *(head(3, 3, sink=0), head(3, 2, sink=0), DENSE),
            *(head(4, 3), head(4, 2), head(4, 1)),
        ],
        [
            *(head(1, 4, sink=2), head(1, 3, sink=2), head(1, 2, sink=2)),
            *(DENSE, head(0, 4, window=1), head(0, 3, window=1)),
            *(head(0, 0), head(0, 0, window=8), head(0, 0, sink=0, window=16)),
        ],
        [
            *(head(3, 3), head(2, 3), head(1, 3)),
            *(head(4, 2, sink=4), head(0, 2, sink=4), DENSE),
            *(head(2, 4, sink=0, window=1), head(3, 3, sink=0, window=1), head(1, 4, sink=0, window=1)),
        ],
        [
            *(DENSE, DENSE, DENSE),
            *(head(0, 1), head(1, 1), head(2, 1)),
            *(head(0, 5), head(3, 4), head(0, 0)),
        ],
    ]
    return [five[layer % len(five)] for layer in range(NUM_LAYERS)]


def document() -> dict[str, Any]:
    return {
        "format": "surgeon.topology",
        "version": 1,
        "model": {
            "model_type": "llama",
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "weights_sha256": WEIGHTS,
        },
        "block_size": 64,
        "num_blocks": NUM_BLOCKS,
        "dendrograms": dendrograms(),
        "layers": [{"heads": layer} for layer in heads()],
        "beyond": "window",
        "provenance": {"method": "made by hand with make_trees.py; nothing was learned"},
    }


def spelled(value: object, indent: str = "\n") -> str:
    """The value as JSON with one line for every merge, path and head."""
    if isinstance(value, list) and value and all(isinstance(item, list | dict) for item in value):
        inner = indent + " "
        return "[" + inner + ("," + inner).join(spelled(item, inner) for item in value) + indent + "]"
    if isinstance(value, dict) and any(isinstance(item, list | dict) for item in value.values()):
        inner = indent + " "
        items = (f"{json.dumps(key)}: {spelled(item, inner)}" for key, item in value.items())
        return "{" + inner + ("," + inner).join(items) + indent + "}"
    return json.dumps(value)


if __name__ == "__main__":
    Path(__file__).with_name("smollm2-135m-trees.json").write_text(spelled(document()) + "\n", encoding="utf-8")
