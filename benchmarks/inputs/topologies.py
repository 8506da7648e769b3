"""The topologies that are timed: windows of a given density, with the packages compiled for them."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from surgeon.compiler import Topology, compile_package, parse_topology
from surgeon.compiler.system.cache import cache_folder
from surgeon.compiler.tune.exact import sampled_error
from surgeon.runtime import Package, load


@dataclass(frozen=True)
class Shape:
    """The shape of one attention layer: heads, KV heads, head size, tokens per block."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int


def windows(shape: Shape, length: int, density: float) -> Topology:
    """A one-layer topology of heads with a sink and the window closest to the given density at `length` tokens.

    Density 1 gives dense heads. The heads of a group differ by one block where possible, as learned ones do.
    """
    num_blocks = length // shape.block_size
    if density >= 1.0:
        heads: list[dict[str, object]] = [{"dense": True}] * shape.heads
    else:
        sizes = np.arange(1, num_blocks + 1)
        seen = sizes * (2 * num_blocks - sizes + 1) / 2 + (num_blocks - sizes) * 1.0  # the window's blocks, the sink's
        window = int(sizes[np.abs(seen / (num_blocks * (num_blocks + 1) / 2) - density).argmin()])
        heads = [
            {"dendrogram": 0, "cut": 0.0, "sink": 1, "window": max(1, window + (index % 3 - 1) * (window > 2))}
            for index in range(shape.heads)
        ]
    chain = [[0, 1, 1.0, 2]] + [[num_blocks + row - 1, row + 1, 1.0, row + 2] for row in range(1, num_blocks - 1)]
    return parse_topology(
        json.dumps(
            {
                "format": "surgeon.topology",
                "version": 1,
                "model": {
                    "model_type": "llama",
                    "num_hidden_layers": 1,
                    "num_attention_heads": shape.heads,
                    "num_key_value_heads": shape.kv_heads,
                    "head_dim": shape.head_dim,
                },
                "block_size": shape.block_size,
                "num_blocks": num_blocks,
                "dendrograms": [{"linkage": chain}],
                "layers": [{"heads": heads}],
            }
        )
    )


def compiled(topology: Topology, variant: str | None) -> Package:
    """Compiles the topology into the cache and loads its package."""
    folder: Path = cache_folder() / "kernels" / f"bench-{topology.sha256[:16]}"
    return load(compile_package(topology, folder), strict=True, cpu_variant=variant)


def inputs(
    shape: Shape, queries: int, keys: int, dtype: torch.dtype, batch: int = 1, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q `[batch, heads, queries, head_dim]`, transposed, and k and v `[batch, kv_heads, keys, head_dim]`."""

    def random(*size: int) -> torch.Tensor:
        return torch.randn(batch, *size, dtype=dtype, device=device)

    q = random(queries, shape.heads, shape.head_dim).transpose(1, 2)
    return q, random(shape.kv_heads, keys, shape.head_dim), random(shape.kv_heads, keys, shape.head_dim)


def operations(topology: Topology, mask: np.ndarray) -> float:
    """Multiplications and additions on active blocks of `mask` `[heads, rows, blocks]`; diagonal blocks count half."""
    heads, rows, _ = mask.shape
    blocks = float(mask.sum()) - heads * rows / 2
    return float(blocks * topology.block_size**2 * topology.model.head_dim * 4)


def error(
    topology: Topology, mask: np.ndarray, tensors: tuple[torch.Tensor, ...], out: torch.Tensor, samples: int = 32
) -> float:
    """The relative Frobenius error of a prefill's output against fp64, on a sample of its queries."""
    q, k, v = tensors
    return sampled_error(torch.from_numpy(mask), topology.block_size, q, k, v, out, samples)
