"""Calls of prefill kernels in Triton's interpreter, checked against the fp64 reference."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reference
from gpu_sources import prefill_sources
from surgeon.compiler.kernels.gpu.tiling import tiling_of
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.specs.artifacts import GpuSource
from surgeon.compiler.specs.kernel_spec import GpuSpec
from surgeon.compiler.specs.specialize import specialize_gpu
from surgeon.compiler.specs.tiles import TargetTiles, Tile
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.target import Target
from triton_interpreter import Call, launch

TOLERANCE = {"float32": 2e-6, "float16": 1e-3}


def kernel_spec(topology: Topology, target: str = "cuda:90") -> GpuSpec:
    """The kernel of the topology's first layer."""
    return specialize_gpu(topology, schedule_layers(topology), Target.parse(target))[0]


def use_tile(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> Tile:
    """Makes every prefill kernel one with this tile."""
    listed = TargetTiles.listed
    monkeypatch.setattr(TargetTiles, "listed", lambda *at: tile if at[1] == "prefill" else listed(*at))
    return tile


def render_whole(spec: GpuSpec) -> GpuSource:
    """The source of a layer that has all heads in one kernel."""
    (source,) = prefill_sources([spec])
    return source


def make_call(
    topology: Topology,
    *,
    length: int,
    positions: Sequence[int] = (0,),
    cache_leftpads: Sequence[int] = (0,),
    spare_keys: int = 0,
    dtype: str = "float32",
    dense_rows: int = 0,
    tokens_ahead: int = 0,
    target: str = "cuda:90",
    seed: int = 0,
    programs: int = 3,
) -> Call:
    """Random q, k and v for the first layer, with NaN for every key and value that no query may read.

    `programs` is the number of programs if they are persistent.
    """
    spec = kernel_spec(topology, target)
    source = render_whole(spec)
    rng = np.random.default_rng(seed)
    batch, model = len(positions), topology.model
    filled = max(positions) + length
    q = rng.standard_normal((batch, length, model.num_attention_heads, model.head_dim))
    k, v = rng.standard_normal((2, batch, model.num_key_value_heads, filled + spare_keys, model.head_dim))
    for sequence, (position, cache_leftpad) in enumerate(zip(positions, cache_leftpads, strict=True)):
        for tensor in (k, v):
            tensor[sequence, :, :cache_leftpad] = np.nan
            tensor[sequence, :, position + length :] = np.nan
    call = Call(
        text=source.files[0].text,
        name=Path(source.files[0].path).stem,
        tile_rows=tiling_of(spec).query_tile,
        block_size=topology.block_size,
        q=q.astype(dtype),
        k=k.astype(dtype),
        v=v.astype(dtype),
        position=np.array(positions, dtype=np.int64),
        cache_leftpad=np.array(cache_leftpads, dtype=np.int64),
        scale=model.head_dim**-0.5,
        dense_rows=dense_rows,
        tokens_ahead=tokens_ahead,
        program_heads=source.tile.heads,
        programs=programs if source.tile.persistent else None,
    )
    if not source.table:
        return call
    (table,) = source.tables.values()
    return replace(call, table=(table.rows, table.plans, table.segments))


def expected(topology: Topology, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's output and log-sum-exp in fp64."""
    q = torch.from_numpy(call.q).transpose(1, 2)
    k, v = (torch.from_numpy(tensor).nan_to_num(0.0) for tensor in (call.k, call.v))
    places = call.position.tolist(), call.cache_leftpad.tolist()
    return reference.attention(topology, 0, q, k, v, *places, call.scale, call.dense_rows, call.tokens_ahead)


def check(pool: Executor, topology: Topology, call: Call) -> Any:
    """Runs the call, compares it with the reference and returns the output."""
    out, lse = pool.submit(launch, call, True).result()
    expected_out, expected_lse = expected(topology, call)
    assert np.isfinite(out).all()
    assert reference.relative_error(torch.from_numpy(out), expected_out) <= TOLERANCE[call.q.dtype.name]
    np.testing.assert_allclose(lse, expected_lse.numpy(), rtol=1e-5, atol=1e-5)
    return out
