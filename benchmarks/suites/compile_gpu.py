"""Ahead-of-time compilation for a GPU: a topology of Llama 3.1 8B's shape, uncached and cached; needs no GPU."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from surgeon.compiler import Topology, compile_package, parse_topology
from surgeon.runtime.package.reader import read_package

TARGET = "cuda:90"
LAYERS, HEADS, KV_HEADS, HEAD_DIM, BLOCK, BLOCKS = 32, 32, 8, 128, 128, 1024


def llama_8b(_variant: str | None) -> Iterator[dict[str, object]]:
    """Seconds to compile bf16 and fp16 kernels with an empty and a full cache, seconds to inspect, and bytes."""
    topology = windows_and_clusters()
    with tempfile.TemporaryDirectory() as scratch:
        kept = os.environ.get("SURGEON_CACHE")
        os.environ["SURGEON_CACHE"] = str(Path(scratch) / "cache")
        try:
            seconds = [_seconds_to_compile(topology, Path(scratch) / "kernels") for _ in range(2)]
        finally:
            os.environ.pop("SURGEON_CACHE")
            if kept is not None:
                os.environ["SURGEON_CACHE"] = kept
        package = Path(scratch) / "kernels"
        started = time.perf_counter()
        inspect = "import sys; from surgeon.compiler.cli.main import main; sys.exit(main())"
        subprocess.run([sys.executable, "-c", inspect, "inspect", package], check=True, stdout=subprocess.DEVNULL)
        inspected = time.perf_counter() - started
        files = read_package(package)
        yield {
            "target": TARGET,
            "layers": LAYERS,
            "blocks": BLOCKS,
            "kernels": len(files.manifest.kernels),
            "first_s": seconds[0],
            "unchanged_s": seconds[1],
            "inspect_s": inspected,
            "mb": sum(map(len, files.files.values())) / 2**20,
        }


def windows_and_clusters() -> Topology:
    """A topology whose heads have a sink and their own window, every other one also clusters of a tree over runs."""
    random = np.random.default_rng(0)
    heads = [
        {
            "dendrogram": 0,
            "cut": float(random.integers(1, 6)) if index % 2 else 0.0,  # clusters of 2 to 32 blocks
            "sink": int(random.integers(1, 4)),
            "window": int(random.integers(1, 200)),
        }
        for index in range(LAYERS * HEADS)
    ]
    merges: list[list[float]] = []
    level = list(range(BLOCKS))
    while len(level) > 1:
        height, size = BLOCKS.bit_length() - len(level).bit_length() + 1, 2 * BLOCKS // len(level)
        pairs = list(zip(level[::2], level[1::2], strict=True))
        level = list(range(BLOCKS + len(merges), BLOCKS + len(merges) + len(pairs)))
        merges += [[left, right, float(height), size] for left, right in pairs]
    model = {
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
    }
    document = {
        "format": "surgeon.topology",
        "version": 1,
        "model": model,
        "block_size": BLOCK,
        "num_blocks": BLOCKS,
        "dendrograms": [{"linkage": merges}],
        "layers": [{"heads": heads[begin : begin + HEADS]} for begin in range(0, len(heads), HEADS)],
    }
    return parse_topology(json.dumps(document))


def _seconds_to_compile(topology: Topology, out: Path) -> float:
    started = time.perf_counter()
    compile_package(topology, out, targets=(TARGET,), dtypes=("bf16", "fp16"))
    return time.perf_counter() - started
