"""Calls of the kernels for keys and values in pages, in Triton's interpreter, checked against the fp64 reference."""

import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import reference
from gpu_sources import gpu_sources
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.specs.artifacts import GpuSource
from surgeon.compiler.specs.specialize import specialize_gpu
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.target import Target
from surgeon.runtime.packed_batch import NO_DENSE_ROWS
from triton_interpreter import load_kernel

Array = npt.NDArray[Any]
TOLERANCE = {"float32": 2e-6, "float16": 1e-3}
TILE = 256
"""A multiple of every tile of queries: a tile reads what its rows see, also rows before the first query."""


@dataclass(frozen=True)
class PagedCall:
    """Sequences whose queries lie one behind the other, and whose keys and values lie in pages.

    `cache` is `[pages, KV heads, page_tokens, 2 * head_dim]`, keys in the first half; q is `[tokens, heads, head_dim]`.
    """

    sources: tuple[GpuSource, ...]
    block_size: int
    q: Array
    cache: Array
    query_start: Array
    lengths: Array
    dense_from: Array
    block_table: Array
    scale: float
    num_splits: int
    first_kv_head: int = 0

    def part(self, kv_heads: range) -> "PagedCall":
        """The call for only some of its KV heads and their query heads."""
        group = self.q.shape[1] // self.cache.shape[1]
        heads = slice(group * kv_heads.start, group * kv_heads.stop)
        cache = self.cache[:, kv_heads.start : kv_heads.stop]
        return replace(self, q=self.q[:, heads], cache=cache, first_kv_head=self.first_kv_head + kv_heads.start)


@dataclass(frozen=True)
class PagedSequence:
    """A sequence of a call: its new queries, its tokens with these, and the token after which rows are dense."""

    queries: int
    length: int
    dense_from: int = NO_DENSE_ROWS


def paged_sources(topology: Topology, layer: int, target: str = "cuda:90") -> tuple[GpuSource, ...]:
    """The kernels for pages that a layer runs on, with no tables but its own."""
    specs = specialize_gpu(topology, schedule_layers(topology), Target.parse(target), paged=True)
    spec = next(spec for spec in specs if layer in spec.layers)
    return tuple(
        replace(source, tables={name: read for name, read in source.tables.items() if name.startswith(f"{spec.name}.")})
        for source in gpu_sources(specs)
        if source.phase.startswith("paged") and any(layer in each.layers for each in source.specs)
    )


def make_paged_call(
    topology: Topology,
    sequences: Sequence[PagedSequence],
    *,
    page_tokens: int,
    layer: int = 0,
    dtype: str = "float32",
    num_splits: int = 3,
    target: str = "cuda:90",
    seed: int = 0,
) -> tuple[PagedCall, list[tuple[Array, Array]]]:
    """A call with random numbers, and each sequence's keys and values `[KV heads, tokens, head_dim]`.

    Pages are in no order. What no query of a call may read is NaN; pages of which that is true everywhere share one.
    """
    rng = np.random.default_rng(seed)
    model, block = topology.model, topology.block_size
    group = model.num_attention_heads // model.num_key_value_heads
    sources = paged_sources(topology, layer, target)
    decodes = any(source.phase == "paged_decode" for source in sources)
    most = max(-(-each.length // page_tokens) for each in sequences)
    free = rng.permutation(most * len(sequences)) + 1  # page 0 is the one of those that nobody reads
    table = np.zeros((len(sequences), most), dtype=np.int32)
    cache = np.full((len(free) + 1, model.num_key_value_heads, page_tokens, 2 * model.head_dim), np.nan)
    states = []
    for index, each in enumerate(sequences):
        k, v = rng.standard_normal((2, model.num_key_value_heads, each.length, model.head_dim))
        states.append((k.astype(dtype), v.astype(dtype)))
        first = each.length - 1 if each.queries == 1 and decodes else (each.length - each.queries) // TILE * TILE
        places = (each.length - first, each.length, first, 0)
        mask = reference.token_mask(topology, layer, *places, *dense_rows_of(each))
        seen = mask.any(dim=1).view(model.num_key_value_heads, group, -1).any(dim=1).numpy()
        held = np.zeros_like(seen)
        for begin in range(0, each.length, block):  # whole blocks are read
            held[:, begin : begin + block] = seen[:, begin : begin + block].any(axis=1, keepdims=True)
        for page in range(-(-each.length // page_tokens)):
            tokens = slice(page * page_tokens, min((page + 1) * page_tokens, each.length))
            if not held[:, tokens].any():
                continue
            place = table[index, page] = free[index * most + page]
            both = np.concatenate((k[:, tokens], v[:, tokens]), axis=2)
            both[~held[:, tokens]] = np.nan
            cache[place, :, : both.shape[1]] = both
    starts = np.cumsum([0, *(each.queries for each in sequences)])
    q = rng.standard_normal((starts[-1], model.num_attention_heads, model.head_dim))
    call = PagedCall(
        sources=sources,
        block_size=block,
        q=q.astype(dtype),
        cache=cache.astype(dtype),
        query_start=starts.astype(np.int32),
        lengths=np.array([each.length for each in sequences], dtype=np.int32),
        dense_from=np.array([each.dense_from for each in sequences], dtype=np.int32),
        block_table=table,
        scale=model.head_dim**-0.5,
        num_splits=num_splits,
    )
    return call, states


def check_paged(
    pool: Executor, topology: Topology, sequences: Sequence[PagedSequence], *, layer: int = 0, **options: Any
) -> tuple[PagedCall, Array]:
    """Runs a call, compares each sequence with the reference, and returns the call and its output."""
    call, states = make_paged_call(topology, sequences, layer=layer, **options)
    out: Array = pool.submit(launch_paged, call).result()
    for index, (each, (k, v)) in enumerate(zip(sequences, states, strict=True)):
        if not each.queries:
            continue
        tokens = slice(*call.query_start[index : index + 2])
        q = torch.from_numpy(call.q[tokens]).transpose(0, 1)[None]
        position = each.length - each.queries
        keys, values = (torch.from_numpy(x)[None] for x in (k, v))
        expected, _ = reference.attention(
            topology, layer, q, keys, values, [position], [0], call.scale, *dense_rows_of(each)
        )
        found = torch.from_numpy(out[tokens])
        assert found.isfinite().all(), f"sequence {index}"
        assert reference.relative_error(found, expected[0]) <= TOLERANCE[call.q.dtype.name], f"sequence {index}"
    return call, out


def dense_rows_of(each: PagedSequence) -> tuple[int, int]:
    """The `dense_rows` and `tokens_ahead` of a call of the sequence's last tokens, with the same dense rows."""
    if each.dense_from == NO_DENSE_ROWS:
        return 0, 0
    rows = max(each.length - each.dense_from, 0) + 1
    return rows, each.dense_from - each.length + rows


def launch_paged(call: PagedCall) -> Array:
    """Runs a call like the launcher; returns out `[tokens, heads, head_dim]`, NaN where nothing is written."""
    from surgeon.runtime.kernels.gpu.kernels import row_tiles

    q, cache = torch.from_numpy(call.q), torch.from_numpy(call.cache)
    k, v = cache.split(cache.shape[3] // 2, dim=3)
    heads, kv_heads, batch = q.shape[1], k.shape[1], len(call.lengths)
    out = torch.full_like(q, torch.nan)
    partial = torch.full((batch, heads, call.num_splits, q.shape[2]), torch.nan)
    partial_lse = torch.full((batch, heads, call.num_splits), torch.nan)
    starts, lengths, dense_from, block_table = map(
        torch.from_numpy, (call.query_start, call.lengths, call.dense_from, call.block_table)
    )
    page_shift = (cache.shape[2] - 1).bit_length()
    where = (
        *(starts, lengths, dense_from, block_table, *q.stride()[:2], *k.stride()[:3]),
        *(block_table.stride(0), page_shift, call.first_kv_head),
    )
    most = int(np.diff(call.query_start).max())
    for source in call.sources:
        read: list[Any] = []
        for table in source.tables.values():
            read = [*map(torch.from_numpy, (table.rows, table.plans, table.segments)), table.rows.shape[1]]
        name = Path(source.files[0].path).stem
        with tempfile.TemporaryDirectory() as folder:
            kernel = load_kernel(source.files[0].text, name, Path(folder))
            if source.phase == "paged_decode":
                kernel[kv_heads, batch, call.num_splits](q, k, v, partial, partial_lse, *where, call.scale, *read)
            elif source.phase == "paged_combine":
                kernel[heads, batch, 1](partial, partial_lse, out, starts, call.num_splits)
            else:
                first_head = call.first_kv_head * heads // kv_heads
                first, end = source.heads or (first_head, first_head + heads)
                own = range(max(first, first_head), min(end, first_head + heads))
                tiles = row_tiles(most, source.tile.queries, call.block_size, 1)
                grid = len(own) // source.tile.heads, batch, tiles
                kernel[grid](q, k, v, out, *where, kv_heads, call.scale, *read)
    return out.numpy()
