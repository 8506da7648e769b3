"""A judge of loaded packages that goes by results: attention on random inputs, and for GPUs what would be launched.

It also says, from the format's description alone, if the numbers of tables and schedules are within their bounds.
"""

import contextlib
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
import torch

from fuzzing import gpu_recorder
from surgeon.runtime.errors import SurgeonError
from surgeon.runtime.loading import Package
from surgeon.runtime.package.manifest import ModelShape

LENGTH = 70
"""Tokens, beyond the blocks of the topology."""
Behaviour = Mapping[str, str]


def behaviour(
    package: Package, shape: ModelShape, layers: Sequence[int], gpus: Sequence[str], gradients: bool
) -> Behaviour:
    """The results of a loaded package, by what they are of, for calls that fit the original's shape and layers.

    Gradients take as long as all the rest, and depend on the schedules alone.
    """
    manifest = package.manifest
    found = {
        "model": repr(manifest.model),
        "blocks": repr((manifest.block_size, manifest.num_blocks, manifest.beyond)),
        "layers": repr(manifest.layers),
        "dtypes": repr(package.dtypes_on("cpu")),
    }
    for dtype in package.dtypes_on("cpu"):
        q, k, v = _tensors(dtype, shape)
        for layer in layers:
            results = [
                package.attention(layer, q, k, v),
                package.attention(layer, q[:, :, -1:], k, v),
                *package.attention_with_lse(layer, q[:, :, -17:], k, v),
            ]
            found[f"attention {layer} {dtype}"] = _digest(*results)
    for layer, liveness in package.liveness().items():
        rows = [liveness.live(torch.tensor([row]), blocks) for blocks in (3, 9) for row in range(blocks)]
        found[f"liveness {layer}"] = _digest(*rows)
    for layer in layers:
        found[f"explain {layer}"] = package.explain(layer, LENGTH)
        if gradients:
            found[f"gradients {layer}"] = _gradients(package, layer, shape)
    for target in gpus:
        with contextlib.suppress(SurgeonError):  # a GPU's kernels are judged alone: they may be refused and others not
            found |= gpu_recorder.behaviour(package._files, target, layers, torch.bfloat16, shape)
    return found


def _gradients(package: Package, layer: int, shape: ModelShape) -> str:
    dtype = package.dtypes_on("cpu")[0]
    q, k, v = (tensor.detach().requires_grad_() for tensor in _tensors(dtype, shape))
    package.attention(layer, q, k, v).float().square().sum().backward()
    return _digest(*(tensor.grad for tensor in (q, k, v) if tensor.grad is not None))


@functools.cache
def _tensors(dtype: torch.dtype, shape: ModelShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, shape.num_attention_heads, LENGTH, shape.head_dim, generator=generator)
    k, v = torch.randn(2, 1, shape.num_key_value_heads, LENGTH, shape.head_dim, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        data = tensor.detach().contiguous().reshape(-1)
        found.update(str(tuple(tensor.shape)).encode() + data.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


# Bounds

Arrays = Mapping[str, npt.NDArray[Any]]
_ROWS_BEYOND = (1, 2, 1000, 2**20)


def out_of_bounds(tables: Arrays, names: tuple[str, ...], patterns: int) -> str:
    """The first number of decoding tables with which a kernel would read keys that are not there, or nothing.

    In row r, a segment's blocks begin ≤ j < end must be some of 0..r, and the last segment must end with block r.
    """
    for name in names:
        rows, plans, segments = (tables[f"{name}.{part}"] for part in ("rows", "plans", "segments"))
        if rows.shape[0] != patterns:
            return f"{name}: {rows.shape[0]} patterns"
        for pattern in rows.tolist():
            last = len(pattern) - 1
            for row in (*range(len(pattern)), *(last + beyond for beyond in _ROWS_BEYOND)):
                plan = pattern[min(row, last)]
                first, middle, end = plans[plan].tolist() if 0 <= plan < len(plans) else (0, 0, 0)
                if not 0 <= first <= middle <= end <= len(segments) or first == end:
                    return f"{name}: row {row} has no plan"
                before = 0
                for number, (begin, stop, follow, _readers) in enumerate(segments[first:end].tolist(), first):
                    before = 0 if number == middle else before  # each of a plan's two parts ascends
                    begin, stop = begin + row * (follow & 1), stop + row * (follow >> 1 & 1)
                    if follow not in range(4) or not 0 <= begin < stop <= row + 1:
                        return f"{name}: row {row} reads blocks {begin} to {stop}"
                    if begin < before:
                        return f"{name}: row {row} has segments out of order"
                    before = stop
                if before != row + 1:
                    return f"{name}: row {row} ends with block {before - 1}"
    return ""
