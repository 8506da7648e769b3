"""Compiles GPU kernels with the tiles of tiles.json and prints the resources of each as a line of JSON.

python tests/helpers/tile_resources.py    every target, head size and dtype (about two hours of one core)
python tests/helpers/tile_resources.py --targets cuda:90 --head-dims 128 --dtypes bf16

The exit status is 1 if a kernel spills registers or takes more shared memory than a program may have.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import topologies
from compiled_code import spills
from gpu_sources import gpu_sources
from surgeon.compiler.kernels.gpu.compile import build_triton
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.specs.artifacts import GpuSource
from surgeon.compiler.specs.specialize import HEAD_DIMS, specialize_gpu
from surgeon.compiler.specs.tiles import tiles_of
from surgeon.runtime.package.interface import PREFILL_PHASES
from surgeon.runtime.package.target import Target

TARGETS = [f"cuda:{arch}" for arch in (80, 86, 89, 90, 100, 120)] + ["hip:gfx90a", "hip:gfx942", "hip:gfx950"]


def sources(target: Target, head_dim: int, dtype: str) -> Iterator[tuple[str, GpuSource]]:
    """The kernels to compile: prefill tiles in one row of blocks and in several, by code and by table, and decoding.

    Each is also made for keys and values in pages.
    """
    for block_size, num_blocks in ((128, 12), (32, 12), (32, 400)):
        topology = topologies.random_topology(
            np.random.default_rng(1),
            num_layers=1,
            num_heads=8,
            num_kv_heads=2,
            head_dim=head_dim,
            block_size=block_size,
            num_blocks=num_blocks,
        )
        for source in gpu_sources(specialize_gpu(topology, schedule_layers(topology), target, [dtype], paged=True)):
            if block_size == 128 or source.phase in PREFILL_PHASES:
                yield f"{source.phase}, blocks of {block_size}{', by table' if source.table else ''}", source


def figures(target: Target, head_dim: int, dtype: str, folder: Path) -> Iterator[dict[str, Any]]:
    for name, source in sources(target, head_dim, dtype):
        binary = build_triton(source, dtype)
        launch = binary.kernels[0].launch
        assert launch is not None
        limit = tiles_of(target).device.shared_bytes
        spilled = spills(binary, folder)
        yield {
            "target": str(target),
            "head_dim": head_dim,
            "dtype": dtype,
            "kernel": name,
            "spilled": spilled,
            "shared_bytes": launch.shared_bytes,
            "limit": limit,
            "fits": spilled == 0 and launch.shared_bytes <= limit,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[size for size in HEAD_DIMS if size >= 32])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp16"])
    arguments = parser.parse_args()
    fits = True
    with tempfile.TemporaryDirectory() as folder:
        for target in map(Target.parse, arguments.targets):
            for head_dim in arguments.head_dims:
                for dtype in arguments.dtypes:
                    for row in figures(target, head_dim, dtype, Path(folder)):
                        print(json.dumps(row), flush=True)
                        fits &= row["fits"]
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
