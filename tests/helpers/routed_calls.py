"""Calls of the kernels for routed heads in Triton's interpreter, one after the other as the launcher runs them."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gpu_sources import gpu_sources
from surgeon.compiler.kernels.gpu.tiling import tiling_of
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.schedule.segment_tables import decode_table
from surgeon.compiler.specs.specialize import specialize_gpu
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.target import Target
from triton_interpreter import load_kernel

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RoutedCall:
    """A call of one layer with random q, k and v; `places` are positions and first valid keys.

    `texts` are the rendered kernels by phase with their names, `tables` the decode table and the one that the prefill
    kernel reads, if any. The arrays are float32 and are converted to `dtype`. `programs` is the number of persistent
    programs of the prefill kernel, None if there is one for each task.
    """

    texts: dict[str, tuple[str, str]]
    decode_table: tuple[Array, ...]
    prefill_table: tuple[Array, ...]
    routes: Array
    key_centre: Array
    key_scale: Array
    tile_rows: int
    program_heads: int
    program_nodes: int
    block_size: int
    q: Array
    k: Array
    v: Array
    positions: Sequence[int]
    cache_leftpads: Sequence[int]
    dtype: str
    dense_rows: int = 0
    first_kv_head: int = 0
    num_parts: int = 2
    num_splits: int = 3
    programs: int | None = None


@dataclass(frozen=True)
class Found:
    """What a call left: nodes, the chosen blocks `[batch, heads, queries, blocks]`, out and lse."""

    nodes: Array
    chosen: npt.NDArray[np.bool_]
    out: Array
    lse: Array


def make_call(
    topology: Topology,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: Sequence[int],
    cache_leftpads: Sequence[int],
    layer: int = 0,
    dense_rows: int = 0,
    target: str = "cuda:90",
) -> RoutedCall:
    """The call of a routed layer on tensors `[batch, heads, length, head_dim]`."""
    layers = schedule_layers(topology)
    spec = next(spec for spec in specialize_gpu(topology, layers, Target.parse(target)) if layer in spec.layers)
    sources = {source.phase: source for source in gpu_sources([spec])}
    router = layers[layer].router
    assert router is not None
    prefill = sources["prefill"]
    table = decode_table(layers[layer])
    return RoutedCall(
        texts={phase: (Path(source.files[0].path).stem, source.files[0].text) for phase, source in sources.items()},
        decode_table=(table.rows, table.plans, table.segments),
        prefill_table=tuple(
            part for read in prefill.tables.values() for part in (read.rows, read.plans, read.segments)
        ),
        routes=np.array([head.route for head in layers[layer].heads], dtype=np.int32),
        key_centre=np.array(router.centre, dtype=np.float32),
        key_scale=np.array(router.scale, dtype=np.float32),
        tile_rows=tiling_of(spec).query_tile,
        program_heads=prefill.tile.heads,
        program_nodes=sources["write_nodes"].tile.queries,
        block_size=topology.block_size,
        q=q.float().numpy(),
        k=k.float().numpy(),
        v=v.float().numpy(),
        positions=positions,
        cache_leftpads=cache_leftpads,
        dtype=str(q.dtype).removeprefix("torch."),
        dense_rows=dense_rows,
        programs=3 if prefill.tile.persistent else None,
    )


def run(call: RoutedCall, attends: bool = True) -> Found:
    """Runs a call in this process, whose Triton interprets; without `attends`, only up to the choice."""
    from surgeon.runtime.kernels.gpu.kernels import row_tiles
    from surgeon.runtime.kernels.gpu.routing import num_slots
    from surgeon.runtime.operands import Operands
    from surgeon.runtime.package.schedule import NODE

    dtype = getattr(torch, call.dtype)
    # As projections leave q.
    q = torch.from_numpy(call.q).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    k, v = (torch.from_numpy(tensor).to(dtype) for tensor in (call.k, call.v))
    (batch, heads, length, head_dim), kv_heads = q.shape, k.shape[1]
    position, leftpad = torch.tensor(call.positions), torch.tensor(call.cache_leftpads)
    routes, key_centre, key_scale = map(torch.from_numpy, (call.routes, call.key_centre, call.key_scale))
    tail = Operands(q, k, v, None, None, head_dim**-0.5, call.dense_rows).dense_tail
    nodes = torch.full((batch, kv_heads, k.shape[2] // NODE, head_dim), 99, dtype=torch.int8)
    slots, most = num_slots(length), int(call.routes.max())
    chosen = torch.full((batch, heads, slots, most), -7, dtype=torch.int32)
    first, table = call.first_kv_head, [*map(torch.from_numpy, call.decode_table), call.decode_table[0].shape[1]]
    strides = [tensor.stride()[:3] for tensor in (q, k, v)]
    decodes = length == 1
    num_parts = call.num_parts if decodes else 1
    num_places = call.num_splits + num_parts if decodes else length
    partial = torch.full((batch, heads, num_places, head_dim), torch.nan)
    partial_lse = torch.full((batch, heads, num_places), torch.nan)
    out = torch.full((batch, length, heads, head_dim), torch.nan, dtype=dtype)
    lse = torch.full((batch, heads, length), torch.nan)
    scale = head_dim**-0.5
    with tempfile.TemporaryDirectory() as folder:  # the interpreter reads the text again when it first runs a function
        kernels = {phase: load_kernel(text, name, Path(folder)) for phase, (name, text) in call.texts.items()}
        kernels["write_nodes"][kv_heads, batch, -(-nodes.shape[2] // call.program_nodes)](
            k, nodes, leftpad, position, routes, key_centre, key_scale, *strides[1], length, nodes.shape[2], first
        )
        kernels["choose"][heads, batch, -(-slots // 16)](
            *(q, nodes, chosen, leftpad, position, routes, key_scale, *strides[0]),
            *(length, nodes.shape[2], slots, most, tail, first, *table),
        )
        if attends:
            kernels["attend_chosen"][heads, batch, slots * num_parts](
                *(q, k, v, chosen, partial, partial_lse, leftpad, position, *strides[0], *strides[1], *strides[2]),
                *(length, most, num_parts, num_places, call.num_splits if decodes else 0, scale),
            )
            if decodes:
                kernels["decode"][kv_heads, batch, call.num_splits](
                    *(q, k, v, partial, partial_lse, leftpad, position, *strides[0], *strides[1], *strides[2]),
                    *(tail, first, scale, *table, num_places),
                )
                kernels["combine"][heads, batch, 1](partial, partial_lse, out, lse, num_places, 1)
            else:
                own_table = [*map(torch.from_numpy, call.prefill_table)]
                grid = (heads // call.program_heads, batch, row_tiles(length, call.tile_rows, call.block_size, tail))
                tasks = (torch.zeros(1, dtype=torch.int32), *grid[:2], math.prod(grid))
                kernels["prefill"][grid if call.programs is None else (call.programs, 1, 1)](
                    *(q, k, v, out, lse, leftpad, position, *strides[0], *strides[1], *strides[2]),
                    *(length, tail, first, kv_heads, 1, scale, *own_table),
                    *(part.shape[1] for part in own_table[:1]),
                    *(partial, partial_lse),
                    *(() if call.programs is None else tasks),
                )
    blocks = -(-(k.shape[2]) // call.block_size)
    read = torch.zeros(batch, heads, length, blocks, dtype=torch.bool)
    for sequence, (start, pad) in enumerate(zip(call.positions, call.cache_leftpads, strict=True)):
        for slot, unit in unit_slots(start - pad, length).items():
            for head in range(heads):
                listed = chosen[sequence, head, slot].tolist()
                found = [block for block in listed if block >= 0]
                assert found == sorted(set(found)), found
                assert listed == found + [-1] * (most - len(found))
                read[sequence, head, unit.start : unit.stop, found] = True
    return Found(nodes.numpy(), read.numpy(), out.float().numpy(), lse.numpy())


def unit_slots(position: int, length: int) -> dict[int, range]:
    """The units of a sequence by their slots: single queries first, then tiles; see `routing.units`."""
    import routing

    found = list(routing.units(position, length))
    singles = [unit for unit in found if len(unit) == 1]
    tiles = [unit for unit in found if len(unit) > 1]
    return dict(enumerate(singles)) | {min(length, 30) + number: unit for number, unit in enumerate(tiles)}
