"""Calls the kernels of a package in every way, in exactly as much memory as they may touch.

`test_sanitizers.py` runs it. Takes the package's folder, and prints the number of calls, each compared with the oracle.
"""

import sys
from pathlib import Path

import torch

import reference
from surgeon.compiler.topology.read import read_topology
from surgeon.runtime import Package, load
from surgeon.runtime.operands import Operands

CALLS = [  # queries, keys, positions of the first query in each sequence, first valid keys
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


def main(folder: Path) -> int:
    topology, count = read_topology(folder / "topology.json"), 0
    for variant in load(folder).cpu_variants:
        package = load(folder, cpu_variant=variant)
        for dtype in package.dtypes_on("cpu"):
            for number, (queries, keys, position, leftpad) in enumerate(CALLS):
                generator = torch.Generator().manual_seed(number)
                shape = package.manifest.model
                batch, kv_heads, size = len(position), shape.num_key_value_heads, shape.head_dim
                q = torch.randn(batch, shape.num_attention_heads, queries, size, generator=generator).to(dtype)
                k, v = torch.randn(2, batch, kv_heads, keys, size, generator=generator).to(dtype)
                places = Operands(q, k.clone(), v.clone(), *map(_int64, (position, leftpad)), size**-0.5)
                for layer in range(shape.num_hidden_layers):
                    found = package.kernels.run(layer, places)
                    with_lse, lse = package.attention_with_lse(layer, *places[:3], None, *places[3:5])
                    assert torch.equal(found.isfinite(), torch.ones_like(found, dtype=torch.bool))
                    count += 2
                    if not found.numel():
                        continue
                    expected, expected_lse = reference.attention(topology, layer, q, k, v, position, leftpad)
                    for one in (found, with_lse):
                        assert reference.relative_error(one, expected) < reference.TOLERANCE[dtype], (
                            variant,
                            dtype,
                            number,
                        )
                    seen = expected_lse.isfinite()
                    assert torch.allclose(lse[seen].double(), expected_lse[seen], atol=1e-2)
                    assert (
                        reference.relative_error(_paged(package, layer, places), expected) < reference.TOLERANCE[dtype]
                    )
                    count += 1
                    if queries == keys and not any(position):
                        cos, sin = (
                            torch.ones(batch, keys, size, dtype=dtype),
                            torch.zeros(batch, keys, size, dtype=dtype),
                        )
                        rotated = package.kernels.run_rotary(layer, places, cos, sin)
                        assert reference.relative_error(rotated, expected) < reference.TOLERANCE[dtype]
                        count += 1
    return count


def _int64(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def _paged(package: Package, layer: int, operands: Operands) -> torch.Tensor:
    """The same call over pools of blocks, which count from each sequence's first valid key."""
    q, k, v, position, leftpad, scale = operands
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
    pooled = Operands(q, pools[0].clone(), pools[1].clone(), position, leftpad, scale)
    return package.kernels.run_paged(layer, pooled, table)


if __name__ == "__main__":
    torch.set_num_threads(2)
    with torch.no_grad():
        print(main(Path(sys.argv[1])), "calls")
