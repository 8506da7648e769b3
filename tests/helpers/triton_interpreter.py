"""Runs rendered Triton kernels in Triton's interpreter, in a process of its own.

The interpreter must be chosen before Triton is imported, and makes the process unusable for compiling.
"""

import importlib.util
import math
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Call:
    """One launch, in float16 or float32.

    q is `[batch, length, heads, head_dim]`, as projections leave it; k and v are `[batch, heads, length, head_dim]`;
    position and cache_leftpad are int64 `[batch]`. `heads` are the first and the end of the kernel's heads, empty for
    all; `table` holds rows, plans and segments of the table that it reads. The arrays hold the layer's KV heads from
    `first_kv_head` on. `dense_rows` and `tokens_ahead` are those of `Operands`. `programs` is the number of persistent
    programs, None if there is one for each task.
    """

    text: str
    name: str
    tile_rows: int
    block_size: int
    q: Array
    k: Array
    v: Array
    position: Array
    cache_leftpad: Array
    scale: float
    heads: tuple[int, ...] = ()
    table: tuple[Array, ...] = ()
    first_kv_head: int = 0
    dense_rows: int = 0
    tokens_ahead: int = 0
    program_heads: int = 1
    programs: int | None = None


@dataclass(frozen=True)
class DecodeCall:
    """A launch like `Call` with one query per sequence, by the two decoding kernels and a layer's table."""

    decode_text: str
    combine_text: str
    rows: Array
    plans: Array
    segments: Array
    num_splits: int
    q: Array
    k: Array
    v: Array
    position: Array
    cache_leftpad: Array
    scale: float
    first_kv_head: int = 0
    dense_rows: int = 0
    tokens_ahead: int = 0


AnyCall = TypeVar("AnyCall", Call, DecodeCall)


def part_of(call: AnyCall, kv_heads: range) -> AnyCall:
    """The call for only some of its KV heads and their query heads."""
    heads = query_heads(call, kv_heads)
    q, k, v = call.q[:, :, heads], *(tensor[:, kv_heads.start : kv_heads.stop] for tensor in (call.k, call.v))
    return replace(call, q=q, k=k, v=v, first_kv_head=call.first_kv_head + kv_heads.start)


def query_heads(call: Call | DecodeCall, kv_heads: range) -> slice:
    """The query heads of some of a call's KV heads."""
    group = call.q.shape[2] // call.k.shape[1]
    return slice(group * kv_heads.start, group * kv_heads.stop)


@contextmanager
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton interprets; submit `launch` to it."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(os.getpid).result()  # the process starts with the first task, in the environment of that moment
            _restore(before)
            yield pool
    finally:
        _restore(before)


def launch(call: Call, write_lse: bool) -> tuple[Array, Array]:
    """Runs a call; returns out `[batch, length, heads, head_dim]`, lse `[batch, heads, length]`, NaN if not written."""
    out, lse, _, _ = _launched(call, write_lse)
    return out, lse


def count_tasks(call: Call) -> tuple[int, int]:
    """Runs a call by persistent programs; returns the tasks that there are, and how often one was done."""
    _, _, there, done = _launched(call, write_lse=True)
    return there, done


def _launched(call: Call, write_lse: bool) -> tuple[Array, Array, int, int]:
    import torch

    from surgeon.runtime.kernels.gpu.kernels import row_tiles
    from surgeon.runtime.operands import Operands

    q = torch.from_numpy(call.q).transpose(1, 2)
    k, v = torch.from_numpy(call.k), torch.from_numpy(call.v)
    batch, heads, length, _ = q.shape
    dense_tail = Operands(q, k, v, None, None, call.scale, call.dense_rows, call.tokens_ahead).dense_tail
    out = torch.full(call.q.shape, torch.nan, dtype=q.dtype)
    lse = torch.full((batch, heads, length), torch.nan, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:  # the interpreter reads the text again when it first runs a function
        kernel = load_kernel(call.text, call.name, Path(folder))
        first_head = call.first_kv_head * heads // k.shape[1]
        first, end = call.heads or (first_head, first_head + heads)
        own = range(max(first, first_head), min(end, first_head + heads))
        grid = len(own) // call.program_heads, batch, row_tiles(length, call.tile_rows, call.block_size, dense_tail)
        taken = torch.zeros(1, dtype=torch.int32)  # a program takes another task after each that it has done
        kernel[grid if call.programs is None else (call.programs, 1, 1)](
            q,
            k,
            v,
            out,
            lse,
            torch.from_numpy(call.cache_leftpad),
            torch.from_numpy(call.position),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            length,
            dense_tail,
            call.first_kv_head,
            k.shape[1],
            int(write_lse),
            call.scale,
            *map(torch.from_numpy, call.table),
            *(part.shape[1] for part in call.table[:1]),
            *(() if call.programs is None else (taken, *grid[:2], math.prod(grid))),
        )
    return out.numpy(), lse.numpy(), math.prod(grid), int(taken)


def launch_decode(call: DecodeCall, write_lse: bool) -> tuple[Array, Array]:
    """Runs a decoding call like `launch`, through the partial results of `num_splits` splits."""
    import torch

    batch, _, heads, _ = call.q.shape
    out = torch.full(call.q.shape, torch.nan, dtype=torch.from_numpy(call.q).dtype)
    lse = torch.full((batch, heads, 1), torch.nan, dtype=torch.float32)
    partial, partial_lse = map(torch.from_numpy, launch_splits(call))
    with tempfile.TemporaryDirectory() as folder:
        combine = load_kernel(call.combine_text, "combine", Path(folder))
        combine[(heads, batch, 1)](partial, partial_lse, out, lse, call.num_splits, int(write_lse))
    return out.numpy(), lse.numpy()


def launch_splits(call: DecodeCall) -> tuple[Array, Array]:
    """The partial results of a decoding call's splits and their log-sum-exp, NaN where not written."""
    import torch

    from surgeon.runtime.operands import Operands

    q = torch.from_numpy(call.q).transpose(1, 2)
    k, v = torch.from_numpy(call.k), torch.from_numpy(call.v)
    batch, heads, _, head_dim = q.shape
    partial = torch.full((batch, heads, call.num_splits, head_dim), torch.nan)
    partial_lse = torch.full((batch, heads, call.num_splits), torch.nan)
    dense_tail = Operands(q, k, v, None, None, call.scale, call.dense_rows, call.tokens_ahead).dense_tail
    with tempfile.TemporaryDirectory() as folder:
        decode = load_kernel(call.decode_text, "decode", Path(folder))
        decode[(k.shape[1], batch, call.num_splits)](
            q,
            k,
            v,
            partial,
            partial_lse,
            torch.from_numpy(call.cache_leftpad),
            torch.from_numpy(call.position),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            dense_tail,
            call.first_kv_head,
            call.scale,
            torch.from_numpy(call.rows),
            torch.from_numpy(call.plans),
            torch.from_numpy(call.segments),
            call.rows.shape[1],
        )
    return partial.numpy(), partial_lse.numpy()


def load_kernel(text: str, name: str, folder: Path) -> Any:
    """Imports a rendered kernel through a file in `folder`, which must stay while the kernel runs."""
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _restore(value: str | None) -> None:
    if value is None:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = value
