"""The operands of one call of attention, and checks that they fit a package."""

import math
from typing import NamedTuple

import torch

from surgeon.runtime.errors import PatchError, short_repr
from surgeon.runtime.package.manifest import ModelShape
from surgeon.runtime.package.schedule import NODE
from surgeon.runtime.packed_batch import DeviceBatch, PackedBatch


class Operands(NamedTuple):
    """The inputs of every attention kernel: q `[B,Hq,Sq,D]`, k and v `[B,Hkv,Sk,D]` or pools of blocks.

    `position` and `cache_leftpad` are integers `[B]`; None stands for Sk − Sq and for 0. `dense_rows` and
    `tokens_ahead` are counted in tokens. See `Package.attention`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    position: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    scale: float
    dense_rows: int = 0
    tokens_ahead: int = 0

    @property
    def dense_tail(self) -> int:
        """The number of tokens before the call's end after which a row of blocks that ends reads every block.

        It is negative where that is after the call's end, and PATTERN_ALONE without dense rows.
        """
        return self.dense_rows - self.tokens_ahead if self.dense_rows else PATTERN_ALONE

    def first_dense_row(self, end: int, block_size: int) -> int | None:
        """The first row of blocks that reads every block in a call of a sequence that ends at `end`; None if none does.

        `end`, in tokens, is counted from the sequence's first valid one.
        """
        return max(0, end - self.dense_tail) // block_size if self.dense_rows else None

    def to(self, dtype: torch.dtype) -> "Operands":
        """The same operands with q, k and v converted to another dtype."""
        return self._replace(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))


class Nodes(NamedTuple):
    """The nodes that routed heads choose by, kept from call to call, int8, and how many there are, int64 `[B]`.

    `values` is `[B, Hkv, keys // 8, D]` or, for a pool of blocks, `[slots, block_size // 8, D]`; `written` counts each
    sequence's nodes from its first valid key. A call writes the nodes that its keys complete, and counts them.
    """

    values: torch.Tensor
    written: torch.Tensor


PATTERN_ALONE = -(2**31)
"""A `dense_tail` that leaves every row to the topology."""

_MOST_TOKENS = 2**31

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The gradients of q, k and v, in their shapes."""

WITHOUT_GRADIENTS = "run under torch.no_grad(), or unpatch the model to train it"
"""The remedy where there is no backward pass."""


def operands_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    position: int | torch.Tensor | None,
    cache_leftpad: int | torch.Tensor | None,
    dense_rows: int = 0,
    tokens_ahead: int = 0,
) -> Operands:
    """Makes the operands of a call from a user's arguments; see `Package.attention`.

    Raises:
        PatchError: an argument has another type, or a number is not finite, is negative or is too large.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise PatchError(
                f"attention: {name}", "a tensor of four dimensions", short_repr(tensor), "pass a torch.Tensor"
            )
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.dim() else 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < math.inf:
        raise PatchError("attention: scale", "a finite number", short_repr(scale), "leave it out for D**-0.5")
    return Operands(
        q,
        k,
        v,
        _per_sequence("position", position, q),
        _per_sequence("cache_leftpad", cache_leftpad, q),
        float(scale),
        number_of_tokens("attention: dense_rows", dense_rows),
        number_of_tokens("attention: tokens_ahead", tokens_ahead),
    )


def number_of_tokens(where: str, value: int, least: int = 0) -> int:
    """Returns a caller's number of tokens if it is an int from `least` on that fits 32 bits.

    Raises:
        PatchError: it is not; `where` names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _MOST_TOKENS:
        raise PatchError(where, f"a whole number of tokens from {least} on", short_repr(value), "correct the number")
    return value


def _per_sequence(name: str, value: int | torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):  # torch would choose an op's kernel by the device of this one, too
        _check_place(name, value, q)
    if value is None or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise _no_position(name, q, short_repr(value))
    return torch.full(q.shape[:1], value, dtype=torch.int64, device=q.device)


def check(operands: Operands, shape: ModelShape) -> None:
    """Refuses operands whose shape, dtype or device is not what kernels for heads of this `shape` take.

    Raises:
        PatchError: an operand does not fit; the message describes the first fault.
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


def check_paged(operands: Operands, block_table: torch.Tensor, shape: ModelShape, block_size: int) -> None:
    """Refuses operands like `check`, with k and v as pools of blocks; see `LayerKernels.run_paged`.

    Raises:
        PatchError: an operand does not fit; the message describes the first fault.
    """
    q, k, v, *_ = operands
    _check_queries(operands, shape)
    _check_pools(q, k, v, (block_size, shape.head_dim))
    if block_table.dim() != 3 or block_table.shape[:2] != (q.shape[0], shape.num_key_value_heads):
        raise _misfit("block_table", f"[{q.shape[0]}, {shape.num_key_value_heads}, blocks]", block_table)
    if block_table.dtype != torch.int32 or block_table.device.type != "cpu":
        raise _mismatch("block_table", "torch.int32 on cpu", block_table)


def check_packed(
    batch: PackedBatch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    shape: ModelShape,
    block_size: int,
    nodes: torch.Tensor | None = None,
) -> None:
    """Refuses tensors that do not fit a batch or kernels for heads of this `shape`; see `LayerKernels.run_packed`.

    Raises:
        PatchError: one does not fit; the message describes the first fault.
    """
    kv_heads, head_dim = shape.num_key_value_heads, shape.head_dim
    _check_rows(q, out, shape, batch.tokens)
    _check_on_cpu("out", out, q)
    _check_pools(q, k, v, (block_size, head_dim), batch.slots)
    if batch.block_table.shape[1] != kv_heads or batch.block_size != block_size:
        expected = f"[sequences, {kv_heads}, blocks], blocks of {block_size} tokens"
        raise _misfit("block_table", expected, batch.block_table)
    if nodes is not None:
        expected_shape = (len(k), block_size // NODE, head_dim)
        if nodes.shape != expected_shape or not nodes.is_contiguous():
            raise _misfit("nodes", f"{list(expected_shape)}, contiguous", nodes)
        if nodes.dtype != torch.int8 or nodes.device.type != "cpu":
            raise _mismatch("nodes", "torch.int8 on cpu", nodes)


def check_write(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, pages: torch.Tensor, shape: ModelShape) -> None:
    """Refuses what `LayerKernels.write_pages` does not write for heads of this `shape`.

    Raises:
        PatchError: a tensor does not fit; the message describes the first fault.
    """
    heads, head_dim = shape.num_key_value_heads, shape.head_dim
    if pages.dim() != 4 or pages.shape[1] != heads or pages.shape[3] != 2 * head_dim or not pages.is_contiguous():
        raise _misfit("pages", f"[pages, {heads}, page tokens, {2 * head_dim}], contiguous", pages)
    if slots.dim() != 1 or not slots.is_contiguous():
        raise _misfit("slots", "[tokens], contiguous", slots)
    if slots.dtype != torch.int64 or slots.device.type != "cpu":
        raise _mismatch("slots", "torch.int64 on cpu", slots)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != 3 or len(tensor) < len(slots) or tensor.shape[1:] != (heads, head_dim):
            raise _misfit(name, f"[{len(slots)} or more, {heads}, {head_dim}]", tensor)
        if tensor.dtype != pages.dtype or tensor.device.type != "cpu" or pages.device.type != "cpu":
            raise _mismatch(name, f"{pages.dtype}, as the pages, on cpu", tensor)


def check_pages(
    batch: DeviceBatch,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    shape: ModelShape,
    block_size: int,
) -> None:
    """Refuses tensors that do not fit a batch or kernels for heads of this `shape`; see `LayerKernels.run_pages`.

    Raises:
        PatchError: one does not fit; the message describes the first fault.
    """
    kv_heads, head_dim, device = shape.num_key_value_heads, shape.head_dim, batch.lengths.device
    _check_rows(q, out, shape, 0)
    expected = (kv_heads, batch.page_tokens, head_dim)
    for name, pages in (("k", k), ("v", v)):
        if pages.dim() != 4 or pages.shape != k.shape or pages.shape[1:] != expected:
            raise _misfit(name, f"[pages, {kv_heads}, {batch.page_tokens}, {head_dim}], k and v alike", pages)
    if k.stride() != v.stride():
        raise PatchError(
            "attention: v", f"strides {k.stride()}, as k", str(v.stride()), "lay keys and values out alike"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        if tensor.dtype != q.dtype or tensor.device != device:
            raise _mismatch(name, f"{q.dtype} on {device}, as q and the batch", tensor)
    if batch.page_tokens % block_size:
        got = f"{batch.page_tokens} tokens"
        raise PatchError(
            "batch: page_tokens", f"a multiple of the block of {block_size} tokens", got, "use larger pages"
        )


def _check_rows(q: torch.Tensor, out: torch.Tensor, shape: ModelShape, least: int) -> None:
    """Refuses queries that are not at least so many rows of all heads, and results that do not take theirs."""
    heads, head_dim = shape.num_attention_heads, shape.head_dim
    if q.dim() != 3 or len(q) < least or q.shape[1:] != (heads, head_dim):
        raise _misfit("q", f"[{least} or more, {heads}, {head_dim}]", q)
    if out.shape != q.shape or not out.is_contiguous():
        raise _misfit("out", f"{list(q.shape)}, contiguous", out)


def check_rotary(operands: Operands, cos: torch.Tensor, sin: torch.Tensor, shape: ModelShape) -> None:
    """Refuses operands like `check`, with cosines and sines; see `LayerKernels.run_rotary`.

    Raises:
        PatchError: an operand does not fit; the message describes the first fault.
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
    number_of_tokens("attention: dense_rows", operands.dense_rows)  # ops take any int
    number_of_tokens("attention: tokens_ahead", operands.tokens_ahead)
    if q.dim() != 4 or q.shape[1] != heads or q.shape[3] != shape.head_dim:
        raise _misfit("q", f"[batch, {heads}, length, {shape.head_dim}]", q)
    for name, place in (("position", operands.position), ("cache_leftpad", operands.cache_leftpad)):
        if place is not None:
            _check_place(name, place, q)


def _check_pools(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: tuple[int, int], least: int = 0) -> None:
    for name, slots in (("k", k), ("v", v)):
        if slots.dim() != 3 or slots.shape != k.shape or slots.shape[1:] != block or len(slots) < least:
            count = f"{least} or more" if least else "slots"
            raise _misfit(name, f"[{count}, {block[0]}, {block[1]}], k and v alike", slots)
        _check_on_cpu(name, slots, q)


def _check_place(name: str, place: torch.Tensor, q: torch.Tensor) -> None:
    if place.shape != q.shape[:1] or place.dtype not in (torch.int64, torch.int32):
        raise _no_position(name, q, f"{place.dtype} {list(place.shape)}")
    if place.device != q.device and place.device.type != "cpu":
        raise _mismatch(name, f"an integer tensor on {q.device}, as q", place)


def _no_position(name: str, q: torch.Tensor, got: str) -> PatchError:
    expected = f"an int or an integer tensor [{q.shape[0] if q.dim() else 1}]"
    return PatchError(f"attention: {name}", expected, got, "give one number per sequence")


def _check_on_cpu(name: str, tensor: torch.Tensor, q: torch.Tensor) -> None:
    if tensor.dtype != q.dtype or tensor.device.type != "cpu":
        raise _mismatch(name, f"{q.dtype} on cpu, as q", tensor)


def _misfit(name: str, expected: str, tensor: torch.Tensor) -> PatchError:
    return PatchError(f"attention: {name}", expected, str(list(tensor.shape)), "pass the package's own model's tensors")


def _mismatch(name: str, expected: str, tensor: torch.Tensor) -> PatchError:
    return PatchError(f"attention: {name}", expected, f"{tensor.dtype} on {tensor.device}", "convert it")
