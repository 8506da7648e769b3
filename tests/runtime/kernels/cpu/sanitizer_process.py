"""Calls the kernels of a package in every way, in exactly as much memory as they may touch.

`test_sanitizers.py` runs it. Takes the package's folder, and prints the number of calls, each compared with the oracle.
"""

import itertools
import sys
from pathlib import Path

import torch

import reference
from surgeon.compiler.topology.read import read_topology
from surgeon.runtime import Package, load
from surgeon.runtime.operands import Operands

CALLS: list[
    tuple[int, int, list[int], list[int]]
] = [  # queries, keys, positions of the first query in each sequence, first valid keys
    (130, 130, [0], [0]),
    (65, 65, [0, 0], [0, 33]),
    (40, 200, [160, 150], [0, 100]),
    (1, 200, [199, 199], [0, 170]),
    (1, 1, [0], [0]),
    (3, 90, [87, 5], [0, 20]),
    (17, 17, [0], [17]),
    (0, 5, [5], [0]),
    (0, 0, [0], [0]),
    (5, 9, [], []),
]
DENSE_ROWS = (0, 20)


def main(folder: Path) -> int:
    topology, count = read_topology(folder / "topology.json"), 0
    for variant in load(folder).cpu_variants:
        package = load(folder, cpu_variant=variant)
        for dtype, case, dense_rows, layer in itertools.product(package.dtypes_on("cpu"), CALLS, DENSE_ROWS, (0, 1)):
            queries, keys, position, leftpad = case
            operands = _operands(package, dtype, *case, dense_rows)
            found = _called(package, layer, operands, whole=queries == keys and not any(position))
            count += len(found)
            if operands.q.numel():
                numbers = position, leftpad, None, dense_rows
                expected, _ = reference.attention(topology, layer, *operands[:3], *numbers)
                errors = [reference.relative_error(out, expected) for out in found]
                assert max(errors) < reference.TOLERANCE[dtype], (variant, dtype, case, dense_rows, errors)
    return count


def _operands(
    package: Package,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    position: list[int],
    leftpad: list[int],
    dense_rows: int,
) -> Operands:
    generator, shape, batch = torch.Generator().manual_seed(queries), package.manifest.model, len(position)
    q, k, v = (  # each in memory of its own
        torch.randn(batch, heads, length, shape.head_dim, generator=generator).to(dtype)
        for heads, length in (
            (shape.num_attention_heads, queries),
            (shape.num_key_value_heads, keys),
            (shape.num_key_value_heads, keys),
        )
    )
    places = (torch.tensor(numbers, dtype=torch.int64) for numbers in (position, leftpad))
    return Operands(q, k, v, *places, shape.head_dim**-0.5, dense_rows)


def _called(package: Package, layer: int, operands: Operands, whole: bool) -> list[torch.Tensor]:
    """The outputs of every kind of call; keys of `whole` sequences are also rotated, by no angle."""
    q, kernels = operands.q, package.kernels
    lse = torch.empty(q.shape[:3])
    found = [kernels.run(layer, operands), kernels.run(layer, operands, lse)]
    if q.numel():
        found.append(_paged(package, layer, operands))
    if q.numel() and whole:
        cos, sin = (make(q.shape[0], *q.shape[2:], dtype=q.dtype) for make in (torch.ones, torch.zeros))
        found.append(kernels.run_rotary(layer, operands, cos, sin))
    assert not lse.isnan().any()
    return found


def _paged(package: Package, layer: int, operands: Operands) -> torch.Tensor:
    """The same call over pools of blocks, which count from each sequence's first valid key."""
    q, k, v, position, leftpad, scale, *rest = operands
    assert position is not None
    assert leftpad is not None
    (batch, kv_heads, keys, size), block = k.shape, package.manifest.block_size
    blocks = -(-keys // block)
    table = torch.randperm(batch * kv_heads * blocks).view(batch, kv_heads, blocks).int()
    pools = torch.zeros(2, table.numel(), block, size, dtype=k.dtype)
    for sequence, first in enumerate(leftpad.tolist()):
        for pool, whole in zip(pools, (k, v), strict=True):
            shifted = torch.nn.functional.pad(whole[sequence, :, first:], (0, 0, 0, blocks * block - keys + first))
            pool[table[sequence].flatten().long()] = shifted.reshape(kv_heads * blocks, block, size)
    pooled = Operands(q, pools[0].clone(), pools[1].clone(), position, leftpad, scale, *rest)
    return package.kernels.run_paged(layer, pooled, table)


if __name__ == "__main__":
    torch.set_num_threads(2)
    with torch.no_grad():
        print(main(Path(sys.argv[1])), "calls")
