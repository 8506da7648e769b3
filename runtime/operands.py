"""What attention reads in one call, and whether that fits a package."""

from typing import NamedTuple

import torch

from surgeon.runtime.errors import PatchError
from surgeon.runtime.package.manifest import ModelShape


class Operands(NamedTuple):
    """What every attention kernel reads: q `[B,Hq,Sq,D]`, k and v `[B,Hkv,Sk,D]`, or slots in place of k and v.

    `position` and `first_key` are integers `[B]`, None for Sk − Sq and for 0; see `Package.attention`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    position: torch.Tensor | None
    first_key: torch.Tensor | None
    scale: float

    def to(self, dtype: torch.dtype) -> "Operands":
        """The same with q, k and v of another dtype."""
        return self._replace(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of q, k and v, in their shapes."""

WITHOUT_GRADIENTS = "run under torch.no_grad(), or unpatch the model to train it"
"""What to do where there is no backward pass."""


def check(operands: Operands, shape: ModelShape) -> None:
    """Refuses operands of another shape, dtype or device than kernels for heads of this `shape` take.

    Raises:
        PatchError: the first fault.
    """
    q, k, v, *_ = operands
    _check_queries(operands, shape)
    kv_heads, head_dim = shape.num_key_value_heads, shape.head_dim
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != 4 or tensor.shape[:2] != (q.shape[0], kv_heads) or tensor.shape[3] != head_dim:
            raise _misfit(name, f"[{q.shape[0]}, {kv_heads}, length, {head_dim}]", tensor)
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise _mismatch(name, f"{q.dtype} on {q.device}, as q", tensor)
    if k.shape != v.shape:
        raise _misfit("v", f"{list(k.shape)}, as k", v)


def check_paged(operands: Operands, pages: torch.Tensor, shape: ModelShape, block_size: int) -> None:
    """As `check`, where k and v are slots; see `Package.run_paged`.

    Raises:
        PatchError: the first fault.
    """
    q, k, v, *_ = operands
    _check_queries(operands, shape)
    for name, slots in (("k", k), ("v", v)):
        if slots.dim() != 3 or slots.shape != k.shape or slots.shape[1:] != (block_size, shape.head_dim):
            raise _misfit(name, f"[slots, {block_size}, {shape.head_dim}], k and v alike", slots)
        _check_on_cpu(name, slots, q)
    if pages.dim() != 3 or pages.shape[:2] != (q.shape[0], shape.num_key_value_heads):
        raise _misfit("pages", f"[{q.shape[0]}, {shape.num_key_value_heads}, blocks]", pages)
    if pages.dtype != torch.int32 or pages.device.type != "cpu":
        raise _mismatch("pages", "torch.int32 on cpu", pages)


def check_rotary(operands: Operands, cos: torch.Tensor, sin: torch.Tensor, shape: ModelShape) -> None:
    """As `check`, with cosines and sines; see `Package.run_rotary`.

    Raises:
        PatchError: the first fault.
    """
    q, k, *_ = operands
    check(operands, shape)
    batch, _, length, head_dim = q.shape
    if k.shape[2] != length:
        raise _misfit("k", f"[{batch}, {k.shape[1]}, {length}, {head_dim}], a key for each query", k)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 3 or table.shape[0] not in (1, batch) or table.shape[1:] != (length, head_dim):
            raise _misfit(name, f"[{batch}, {length}, {head_dim}]", table)
        _check_on_cpu(name, table, q)


def _check_queries(operands: Operands, shape: ModelShape) -> None:
    q, heads = operands.q, shape.num_attention_heads
    if q.dim() != 4 or q.shape[1] != heads or q.shape[3] != shape.head_dim:
        raise _misfit("q", f"[batch, {heads}, length, {shape.head_dim}]", q)
    for name, place in (("position", operands.position), ("first_key", operands.first_key)):
        if place is not None and (place.shape != q.shape[:1] or place.dtype not in (torch.int64, torch.int32)):
            raise PatchError(
                f"attention: {name}",
                f"an int or an integer tensor [{q.shape[0]}]",
                f"{place.dtype} {list(place.shape)}",
                "give one number a sequence",
            )


def _check_on_cpu(name: str, tensor: torch.Tensor, q: torch.Tensor) -> None:
    if tensor.dtype != q.dtype or tensor.device.type != "cpu":
        raise _mismatch(name, f"{q.dtype} on cpu, as q", tensor)


def _misfit(name: str, expected: str, tensor: torch.Tensor) -> PatchError:
    return PatchError(f"attention: {name}", expected, str(list(tensor.shape)), "pass the package's own model's tensors")


def _mismatch(name: str, expected: str, tensor: torch.Tensor) -> PatchError:
    return PatchError(f"attention: {name}", expected, f"{tensor.dtype} on {tensor.device}", "convert it")
