"""Decoding kernels: correct in Triton's interpreter, and compiled for GPUs that this machine need not have."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import reference
import topologies
from compiled_code import laid_out, parameters, spills
from gpu_sources import decode_sources
from surgeon.compiler.kernels.gpu.compile import build_triton
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.schedule.segment_tables import MAX_GROUP, decode_table
from surgeon.compiler.specs.kernel_spec import GpuSpec
from surgeon.compiler.specs.specialize import specialize_gpu
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.target import Target
from triton_interpreter import DecodeCall, launch_decode, launch_splits, part_of, query_heads

pytest.importorskip("triton")

Array = npt.NDArray[Any]
BLOCK = 16
TOLERANCE = {"float32": 2e-6, "float16": 1e-3}


def specs_of(topology: Topology, target: str = "cuda:90") -> tuple[GpuSpec, ...]:
    return specialize_gpu(topology, schedule_layers(topology), Target.parse(target))


def make_call(
    topology: Topology,
    *,
    positions: Sequence[int],
    cache_leftpads: Sequence[int] | None = None,
    num_splits: int = 3,
    spare_keys: int = 5,
    dtype: str = "float32",
    dense_rows: int = 0,
    tokens_ahead: int = 0,
    layer: int = 0,
    seed: int = 0,
) -> DecodeCall:
    """Makes random q, k, v, where every key and value that the query may not read is NaN."""
    specs = specs_of(topology)
    decode, combine = decode_sources(specs)
    table = decode_table(schedule_layers(topology)[layer])
    rng = np.random.default_rng(seed)
    batch, model = len(positions), topology.model
    cache_leftpads = cache_leftpads or [0] * batch
    q = rng.standard_normal((batch, 1, model.num_attention_heads, model.head_dim))
    shape = (2, batch, model.num_key_value_heads, max(positions) + 1 + spare_keys, model.head_dim)
    k, v = rng.standard_normal(shape)
    for sequence, (position, cache_leftpad) in enumerate(zip(positions, cache_leftpads, strict=True)):
        for tensor in (k, v):
            tensor[sequence, :, :cache_leftpad] = np.nan
            tensor[sequence, :, position + 1 :] = np.nan
    return DecodeCall(
        decode_text=decode.files[0].text,
        combine_text=combine.files[0].text,
        rows=table.rows,
        plans=table.plans,
        segments=table.segments,
        num_splits=num_splits,
        q=q.astype(dtype),
        k=k.astype(dtype),
        v=v.astype(dtype),
        position=np.array(positions, dtype=np.int64),
        cache_leftpad=np.array(cache_leftpads, dtype=np.int64),
        scale=model.head_dim**-0.5,
        dense_rows=dense_rows,
        tokens_ahead=tokens_ahead,
    )


def check(pool: Executor, topology: Topology, call: DecodeCall, layer: int = 0) -> None:
    out, lse = pool.submit(launch_decode, call, True).result()
    q = torch.from_numpy(call.q).transpose(1, 2)
    k, v = (torch.from_numpy(tensor).nan_to_num(0.0) for tensor in (call.k, call.v))
    places = call.position.tolist(), call.cache_leftpad.tolist()
    expected_out, expected_lse = reference.attention(
        topology, layer, q, k, v, *places, call.scale, call.dense_rows, call.tokens_ahead
    )
    assert np.isfinite(out).all()
    assert reference.relative_error(torch.from_numpy(out), expected_out) <= TOLERANCE[call.q.dtype.name]
    np.testing.assert_allclose(lse, expected_lse.numpy(), rtol=1e-5, atol=1e-5)


def shaped(build: Callable[..., Topology], *arguments: Any, **shape: Any) -> Topology:
    return build(*arguments, **({"block_size": BLOCK, "head_dim": 16} | shape))


def mixed(num_heads: int, num_kv_heads: int, seed: int = 0, **shape: Any) -> Topology:
    return topologies.random_topology(
        np.random.default_rng(seed),
        num_layers=2,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        **({"block_size": BLOCK, "head_dim": 16, "num_blocks": 11} | shape),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (3, 1), (8, 2), (8, 1)])
def test_heads_of_a_group_that_see_different_blocks(
    pool: Executor, num_heads: int, num_kv_heads: int, dtype: str
) -> None:
    topology = mixed(num_heads, num_kv_heads)
    for layer in range(2):
        call = make_call(topology, positions=[11 * BLOCK - 3, 6 * BLOCK], layer=layer, dtype=dtype)
        check(pool, topology, call, layer)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_head_sizes(pool: Executor, head_dim: int) -> None:
    topology = mixed(4, 2, head_dim=head_dim)
    check(pool, topology, make_call(topology, positions=[10 * BLOCK + 7]))


@pytest.mark.parametrize("num_splits", [1, 2, 7, 40])
def test_any_number_of_splits(pool: Executor, num_splits: int) -> None:
    topology = mixed(4, 1, seed=1)
    check(pool, topology, make_call(topology, positions=[0, 4, 9 * BLOCK + 15], num_splits=num_splits))


@pytest.mark.parametrize("seed", range(4))
def test_every_row_of_a_block(pool: Executor, seed: int) -> None:
    topology = mixed(6, 2, seed=seed + 10, beyond=["window", "dense"][seed % 2])
    check(pool, topology, make_call(topology, positions=[BLOCK * row + 5 for row in range(14)], seed=seed))


def test_blocks_of_several_tiles(pool: Executor) -> None:
    topology = topologies.window_topology([1, 3, 2, 1], sink=1, block_size=256, head_dim=16, num_blocks=4)
    check(pool, topology, make_call(topology, positions=[1023, 768, 700, 70], num_splits=5))


def test_left_padding_and_queries_before_the_first_key(pool: Executor) -> None:
    topology = mixed(4, 2, seed=2)
    call = make_call(topology, positions=[5 * BLOCK + 3, 5 * BLOCK + 3, 4], cache_leftpads=[BLOCK + 9, 0, 9])
    check(pool, topology, call)
    out, lse = pool.submit(launch_decode, call, True).result()
    assert not out[2].any()
    assert (lse[2] == -np.inf).all()


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 2), (12, 3)])
def test_a_part_of_the_kv_heads_is_the_whole_for_them(pool: Executor, num_heads: int, num_kv_heads: int) -> None:
    topology = mixed(num_heads, num_kv_heads, seed=num_heads)
    call = make_call(topology, positions=[11 * BLOCK - 3, 5 * BLOCK + 3, 4], cache_leftpads=[0, BLOCK + 9, 9])
    check(pool, topology, call)
    out, lse = pool.submit(launch_decode, call, True).result()
    for own in (range(1), range(1, num_kv_heads)):
        heads = query_heads(call, own)
        part, part_lse = pool.submit(launch_decode, part_of(call, own), True).result()
        np.testing.assert_array_equal(part, out[:, :, heads])
        np.testing.assert_array_equal(part_lse, lse[:, heads])


@pytest.mark.parametrize("num_splits", [1, 12])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (8, 1)])
def test_a_query_that_sees_every_key(pool: Executor, num_heads: int, num_kv_heads: int, num_splits: int) -> None:
    topology = shaped(topologies.window_topology, [1, 2] * (num_heads // 2), num_kv_heads=num_kv_heads)
    call = make_call(
        topology,
        num_splits=num_splits,
        dense_rows=1,
        positions=[0, BLOCK - 1, BLOCK, 9 * BLOCK + 5, 7],
        cache_leftpads=[0, 0, 0, BLOCK + 9, 9],
    )
    check(pool, topology, call)


@pytest.mark.parametrize("block_size", [16, 256])  # the second has several tiles
def test_splits_of_a_query_that_sees_every_key_are_even(pool: Executor, block_size: int) -> None:
    topology = shaped(topologies.window_topology, [1, 2], num_kv_heads=1, block_size=block_size)
    call = make_call(topology, positions=[5 * block_size - 1], num_splits=5, dense_rows=128)
    check(pool, topology, call)
    for split in range(5):  # which has a block of its own, and gives NaN if that is NaN
        k = call.k.copy()
        k[:, :, split * block_size : (split + 1) * block_size] = np.nan
        partial, _ = pool.submit(launch_splits, dataclasses.replace(call, k=k)).result()
        assert np.isnan(partial).any(axis=(0, 1, 3)).tolist() == [number == split for number in range(5)]


@pytest.mark.parametrize("tokens_ahead", [1, 4, 5, 9, 30])
def test_a_query_before_the_end_of_its_prompt(pool: Executor, tokens_ahead: int) -> None:
    topology = mixed(4, 2, seed=3)
    positions = [6 * BLOCK, 6 * BLOCK + 11, 6 * BLOCK + 12, 7 * BLOCK - 1]
    check(pool, topology, make_call(topology, positions=positions, dense_rows=4, tokens_ahead=tokens_ahead))


def test_rows_that_the_topology_refuses_are_nan(pool: Executor) -> None:
    heads = [topologies.DENSE, topologies.head(0, 1.0, 1, 2)]
    trees = [{"linkage": topologies.balanced_tree(4)}]
    topology = shaped(topologies.build, [heads], trees, num_blocks=4, beyond="error")
    call = make_call(topology, positions=[4 * BLOCK, 2 * BLOCK])
    out, _ = pool.submit(launch_decode, call, True).result()
    assert np.isnan(out[0]).all()
    check(pool, topology, make_call(topology, positions=[4 * BLOCK - 1, 2 * BLOCK]))


def test_log_sum_exp_is_left_alone_unless_asked_for(pool: Executor) -> None:
    topology = mixed(2, 1)
    _, lse = pool.submit(launch_decode, make_call(topology, positions=[70]), False).result()
    assert np.isnan(lse).all()


# Compiled


EVERY_TARGET = [f"cuda:{arch}" for arch in (80, 86, 89, 90, 100, 120)] + ["hip:gfx90a", "hip:gfx942", "hip:gfx950"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "head_dim"), [(target, 128) for target in EVERY_TARGET] + [("cuda:90", 80), ("cuda:80", 256)]
)
def test_every_target_builds_without_spills(target: str, head_dim: int, tmp_path: Path) -> None:
    topology = mixed(8, 2, head_dim=head_dim, block_size=128)
    for source in decode_sources(specs_of(topology, target)):
        binary = build_triton(source, "bf16")
        (entry,) = binary.kernels
        assert (entry.phase, entry.symbol, entry.layers) == (source.phase, source.phase, (0, 1))
        assert spills(binary, tmp_path) == 0
        if target.startswith("cuda"):
            assert parameters(binary, tmp_path) == laid_out(entry.arguments)


def test_compiling_again_gives_the_same_bytes_and_no_path() -> None:
    for source in decode_sources(specs_of(mixed(8, 2, head_dim=64, block_size=64))):
        binary = build_triton(source, "fp16")
        assert build_triton(source, "fp16") == binary
        for trace in (b"/tmp", f"{source.phase}.py".encode(), str(Path.home()).encode()):
            assert trace not in binary.data


def test_a_group_with_too_many_heads_has_no_decoding_kernels() -> None:
    topology = shaped(topologies.window_topology, [1, 2] * 16, num_kv_heads=1)
    assert MAX_GROUP < 32
    assert decode_sources(specs_of(topology)) == ()
    assert len(decode_sources(specs_of(shaped(topologies.window_topology, [1] * MAX_GROUP)))) == 2


def test_golden(golden: Callable[[str, str], None]) -> None:
    decode, combine = decode_sources(specs_of(mixed(8, 2, head_dim=80, block_size=64)))
    golden("decode_triton.py.txt", decode.files[0].text)
    golden("combine_triton.py.txt", combine.files[0].text)
