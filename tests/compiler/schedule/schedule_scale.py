"""Schedules a 32-layer, 32-head topology with 1,024 blocks and prints the time and memory, as JSON.

python schedule_scale.py mixed       windows, and clusters of contiguous and of scattered trees
python schedule_scale.py scattered   the worst case: every head has its own scattered tree
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import topologies
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.topology.topology import SparseHead, Topology

NUM_BLOCKS = 1024
SIDE = 32


def scattered(rng: np.random.Generator) -> list[list[float]]:
    """A balanced tree whose blocks are shuffled."""
    place = rng.permutation(NUM_BLOCKS).tolist() + list(range(NUM_BLOCKS, 2 * NUM_BLOCKS))
    rows = topologies.balanced_tree(NUM_BLOCKS)
    return [[place[int(left)], place[int(right)], height, count] for left, right, height, count in rows]


def mixed(rng: np.random.Generator) -> Topology:
    trees = [{"linkage": topologies.balanced_tree(NUM_BLOCKS)}]
    trees += [{"linkage": topologies.tree(NUM_BLOCKS, rng, contiguous=True)} for _ in range(4)]
    trees += [{"linkage": scattered(rng)} for _ in range(8)]
    heads = []
    for number in range(SIDE * SIDE):
        index = int(rng.integers(len(trees)))
        heights = [row[2] for row in trees[index]["linkage"]]
        cut = 0.0 if number % 2 else float(rng.choice(heights))
        heads.append(topologies.head(index, cut, int(rng.integers(4)), int(rng.integers(1, 200))))
    return build(heads, trees)


def worst(rng: np.random.Generator) -> Topology:
    trees = [{"linkage": scattered(rng)} for _ in range(SIDE * SIDE)]
    heads = [topologies.head(index, float(rng.integers(3, 8)), 1, 1) for index in range(SIDE * SIDE)]
    return build(heads, trees)


def build(heads: list[dict[str, Any]], trees: list[dict[str, Any]]) -> Topology:
    layers = [heads[begin : begin + SIDE] for begin in range(0, len(heads), SIDE)]
    return topologies.build(layers, trees, num_kv_heads=8, num_blocks=NUM_BLOCKS)


def _peak_bytes() -> int:
    """This program's own peak: `ru_maxrss` counts the process that started it, too."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def main(kind: str) -> None:
    topology = {"mixed": mixed, "scattered": worst}[kind](np.random.default_rng(0))
    begin = time.perf_counter(), time.process_time()
    layers = schedule_layers(topology)
    seconds, cpu_seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
    heads = {
        head: schedule
        for heads, layer in zip(topology.layers, layers, strict=True)
        for head, schedule in zip(heads, layer.heads, strict=True)
    }
    windows = [schedule for head, schedule in heads.items() if isinstance(head, SparseHead) and head.cut == 0.0]
    figures = {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_bytes": _peak_bytes(),
        "heads": len(heads),
        "pieces": sum(len(schedule.pieces) for schedule in heads.values()),
        "most_pieces": max(len(schedule.pieces) for schedule in heads.values()),
        "most_pieces_of_a_window": max((len(schedule.pieces) for schedule in windows), default=0),
        "most_runs": max(len(schedule.runs) for schedule in heads.values()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1])
