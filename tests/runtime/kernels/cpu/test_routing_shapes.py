"""Routed heads of other shapes on a CPU: blocks of few and of many nodes, and head sizes that fill no vector."""

import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import reference
import routing
import topologies
from surgeon.compiler import Topology, compile_package
from surgeon.compiler.kernels import backend
from surgeon.compiler.kernels.cpu.variants import Variant, variants_for
from surgeon.runtime import load
from topologies import window_head

SHAPES = [(16, 80, 48), (48, 96, 12), (256, 32, 12)]
"""Tokens of a block, the head size, and blocks: 2, 6 and 32 nodes a block, where vectors have 4 to 16 lanes."""
KINDS = 5
"""Blocks whose keys differ: the others repeat them, so that many tie."""


def topology_of(block_size: int, head_dim: int, blocks: int) -> Topology:
    heads = [window_head(0, 1, route=3), window_head(1, 2, route=2)]
    return topologies.build(
        [heads], num_kv_heads=1, head_dim=head_dim, block_size=block_size, num_blocks=blocks, beyond="window"
    )


@pytest.mark.parametrize(("block_size", "head_dim", "blocks"), SHAPES)
def test_every_variant_chooses_the_oracles_blocks(
    block_size: int, head_dim: int, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = topology_of(block_size, head_dim, blocks)
    # What runs besides the choice is tested elsewhere, so it need not be fast.
    plain = [each for each in variants_for(platform.machine()) if isinstance(each, Variant)]
    variants = tuple(replace(each, flags=(*each.flags, "-O0")) for each in plain)
    monkeypatch.setattr(backend, "variants_for", lambda _machine: variants)
    folder = compile_package(topology, tmp_path / "package", targets=["cpu"], dtypes=["fp32"])
    usable = load(folder).cpu_variants
    assert "portable" in usable

    keys = blocks * block_size
    generator = torch.Generator().manual_seed(block_size)
    kinds = torch.randn(1, 1, KINDS * block_size, head_dim, generator=generator)
    k = kinds[:, :, torch.arange(keys) % (KINDS * block_size)]
    v = torch.nn.functional.one_hot(torch.arange(keys) // block_size, head_dim).float().expand_as(k)
    for queries in (1, 23, max(4 * block_size, 480)):  # the last ones are many tiles, for which nodes are packed
        q = torch.randn(1, 2, queries, head_dim, generator=generator)
        chosen = routing.chosen_blocks(topology, 0, q[0], k[0], keys - queries)
        scheduled = reference.token_mask(topology, 0, queries, keys, keys - queries, 0)[:, :, ::block_size]
        for variant in usable:
            read = load(folder, strict=True, cpu_variant=variant).attention(0, q, k, v, scale=1e-3)
            assert torch.equal(read[0].transpose(0, 1)[:, :, :blocks] > 1e-30, scheduled | chosen), (variant, queries)
