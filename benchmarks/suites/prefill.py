"""Prefill of one layer: our kernel against torch's matrix product, SDPA and FlexAttention on the same pattern."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from inputs import topologies as patterns
from inputs.topologies import Shape
from measure.dtypes import name_of
from measure.timing import gemm_flops, gemm_operations, interleaved, repeats_for, seconds_of

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def against_gemm(variant: str | None) -> Iterator[dict[str, object]]:
    """The rate on active blocks relative to torch's fp32 1024^3 product, at a quarter of the blocks."""
    for head_dim, block, (heads, kv_heads), length in itertools.product(
        (64, 128), (32, 64, 128), ((4, 4), (3, 1), (8, 2)), (4096, 16384)
    ):
        shape = Shape(heads, kv_heads, head_dim, block)
        topology = patterns.windows(shape, length, 0.25)
        yield _row(shape, topology, variant, length, torch.float32, {})


def against_dtypes(variant: str | None) -> Iterator[dict[str, object]]:
    """Storage in 16 bits against fp32, on one pattern."""
    for head_dim, dtype in itertools.product((64, 128), TOLERANCE):
        shape = Shape(9, 3, head_dim, 64)
        yield _row(shape, patterns.windows(shape, 8192, 0.25), variant, 8192, dtype, {})


def against_peers(variant: str | None) -> Iterator[dict[str, object]]:
    """SDPA (dense, causal) and compiled FlexAttention (the same blocks) on a few shapes."""
    for shape, length, density in (
        (Shape(9, 3, 64, 128), 4096, 0.25),
        (Shape(8, 2, 128, 128), 4096, 0.25),
        (Shape(9, 3, 64, 128), 8192, 0.25),
        (Shape(9, 3, 64, 128), 8192, 0.5),
        (Shape(9, 3, 64, 64), 4096, 1.0),
        (Shape(8, 2, 128, 128), 4096, 1.0),
    ):
        topology = patterns.windows(shape, length, density)
        mask = topology.block_mask(0, length // shape.block_size)
        q, k, v = tensors = patterns.inputs(shape, length, length, torch.float32)
        peers: dict[str, Callable[[], object]] = {
            "sdpa": partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        }
        if shape.block_size >= 128 and density < 1.0:
            flex = _flex(mask, shape.block_size, tensors)
            found = flex().transpose(1, 2)
            _check("flex", topology, mask, tensors, found)
            peers["flex"] = flex
        yield _row(shape, topology, variant, length, torch.float32, peers, tensors)


def against_sdpa_in_bf16(variant: str | None) -> Iterator[dict[str, object]]:
    """bf16 beside SDPA (dense, causal) and torch's bf16 product, which have a matrix unit where the processor does."""
    for heads, head_dim, block, length in itertools.product(
        ((4, 4), (9, 3), (8, 2)), (64, 128), (64, 128), (2048, 4096, 8192)
    ):
        shape = Shape(*heads, head_dim, block)
        for density in (0.25, 1.0) if length == 4096 else (0.25,):
            q, k, v = tensors = patterns.inputs(shape, length, length, torch.bfloat16)
            sdpa = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
            topology = patterns.windows(shape, length, density)
            yield _row(
                shape, topology, variant, length, torch.bfloat16, {"sdpa": sdpa}, tensors, (2048, torch.bfloat16)
            )


def _row(
    shape: Shape,
    topology: Any,
    variant: str | None,
    length: int,
    dtype: torch.dtype,
    peers: dict[str, Callable[[], object]],
    tensors: tuple[torch.Tensor, ...] | None = None,
    gemm: tuple[int, torch.dtype] = (1024, torch.float32),
) -> dict[str, object]:
    operations = gemm_operations(gemm[0])
    package = patterns.compiled(topology, variant)
    mask = topology.block_mask(0, length // shape.block_size)
    q, k, v = tensors = tensors or patterns.inputs(shape, length, length, dtype)

    def ours() -> torch.Tensor:
        return package.attention(0, q, k, v)

    error = _check("ours", topology, mask, tensors, ours())
    calls = {"ours": ours, "gemm": gemm_flops(*gemm), **peers}
    times = interleaved(calls, repeats_for(sum(seconds_of(call) for call in calls.values()), budget=4.0))
    density = float(mask.sum() / (len(mask) * mask.shape[1] * (mask.shape[1] + 1) / 2))
    work = patterns.operations(topology, mask)
    row: dict[str, object] = {
        "heads": f"{shape.heads}/{shape.kv_heads}",
        "head_dim": shape.head_dim,
        "block": shape.block_size,
        "length": length,
        "dtype": name_of(dtype),
        "density": round(density, 4),
        "ours_ms": times["ours"].median * 1e3,
        "ours_min_ms": times["ours"].minimum * 1e3,
        "ours_cpu_ms": times["ours"].cpu * 1e3,
        "of_gemm": work / times["ours"].median / (operations / times["gemm"].median),
        "of_gemm_cpu": work / times["ours"].cpu / (operations / times["gemm"].cpu),
        "gemm_gflops": operations / times["gemm"].median / 1e9,
    }
    for name in peers:
        row[f"{name}_ms"] = times[name].median * 1e3
        row[f"times_{name}"] = times[name].median / times["ours"].median
    if "sdpa" in peers:
        row["times_sdpa_x_density"] = times["sdpa"].median / times["ours"].median * density
        row["times_sdpa_x_density_cpu"] = times["sdpa"].cpu / times["ours"].cpu * density
    row["error"] = error
    return row


def _check(name: str, topology: Any, mask: np.ndarray, tensors: tuple[torch.Tensor, ...], out: torch.Tensor) -> float:
    error = patterns.error(topology, mask, tensors, out)
    if not error < TOLERANCE[tensors[0].dtype]:
        raise ArithmeticError(f"{name} is wrong on this pattern: relative error {error:.1e}")
    return error


def _flex(mask: np.ndarray, block: int, tensors: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
    """Compiled FlexAttention, with the diagonal blocks partial and all others full."""
    q, k, v = tensors
    blocks = torch.from_numpy(mask)[None]
    diagonal = torch.eye(mask.shape[1], dtype=torch.bool).expand_as(blocks)

    def listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return chosen.sum(dim=-1, dtype=torch.int32), order

    block_mask = BlockMask.from_kv_blocks(
        *listed(blocks & diagonal),
        *listed(blocks & ~diagonal),
        BLOCK_SIZE=block,
        mask_mod=lambda _b, _h, query, key: query >= key,
    )
    compiled: Any = torch.compile(flex_attention)
    return partial(compiled, q, k, v, block_mask=block_mask, enable_gqa=True)
