"""The fourth stage: prefills and decoding beside SDPA and FlexAttention, the most important rows first."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import gpu
from gpu_day.calls import block_mask, milliseconds
from gpu_day.day import Day, Row, Tell
from inputs.topologies import inputs
from measure.checked import Tensors, checked
from surgeon.compiler import Topology
from surgeon.runtime import Package, load


def speed(day: Day, packages: Path, tell: Tell) -> None:
    """Tells a row for each length, density, phase and batch, in milliseconds and as multiples of the peers' speed."""
    for length in day.lengths:
        for density in day.densities:
            topology = day.topology(day.shape, length, density)
            package = load(packages / day.named(day.shape, length, density), strict=True, device=day.device)
            mask = block_mask(day, topology)
            tell(compared(day, topology, package, mask, length, 1))
            for batch in day.batches:
                tell(compared(day, topology, package, mask, 1, batch))


def compared(day: Day, topology: Topology, package: Package, mask: torch.Tensor, q_length: int, batch: int) -> Row:
    """Times one call beside its peers, each checked first; FlexAttention only at the first length, since it compiles.

    A decoded token's density is that of the last row, which it is.
    """
    length = topology.num_blocks * topology.block_size
    tensors = inputs(day.shape, q_length, length, day.torch_dtype, batch, day.device)
    calls = _calls(day, package, mask, tensors)
    row: Row = {
        "phase": "decode" if q_length == 1 else "prefill",
        "length": length,
        "batch": batch,
        "density": _density(mask, q_length),
        "error": checked("ours", mask, topology.block_size, tensors, calls["ours"]()),
    }
    if "flex" in calls:
        checked("flex", mask, topology.block_size, tensors, calls["flex"]().transpose(1, 2))
    found = milliseconds(day, calls, graphs=q_length == 1, repeats=10)
    row |= {f"{name}_ms": value for name, value in found.items()}
    row |= {f"times_{name}": value / found["ours"] for name, value in found.items() if name != "ours"}
    if q_length > 1:
        row["tflops"] = operations(day, length, float(str(row["density"]))) / found["ours"] / 1e9
    row["times_sdpa_x_density"] = found["sdpa"] / found["ours"] * float(str(row["density"]))
    return row


def operations(day: Day, length: int, density: float) -> float:
    """The floating-point operations of both products on the pairs that a causal prefill of this density reads."""
    return 4 * day.shape.heads * day.shape.head_dim * density * length * (length + 1) / 2


def _calls(day: Day, package: Package, mask: torch.Tensor, tensors: Tensors) -> dict[str, Callable[[], torch.Tensor]]:
    q, k, v = tensors
    dense = partial(scaled_dot_product_attention, q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)
    calls: dict[str, Callable[[], torch.Tensor]] = {"ours": partial(package.attention, 0, q, k, v), "sdpa": dense}
    if day.device == "cuda":
        if q.shape[2] > 1:
            calls["cudnn"] = partial(gpu.with_cudnn, dense)
        if k.shape[2] == day.lengths[0] and not bool(mask.tril().eq(mask.new_ones(mask.shape).tril()).all()):
            calls["flex"] = gpu.flexible(mask, tensors)
    return calls


def _density(mask: torch.Tensor, q_length: int) -> float:
    if q_length == 1:
        return float(mask[:, -1].float().mean())
    heads, rows, _ = mask.shape
    return float(mask.sum() / (heads * rows * (rows + 1) / 2))
