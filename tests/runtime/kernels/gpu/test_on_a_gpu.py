"""Compiled GPU kernels on a GPU; run these with -m gpu on a machine that has one, and Triton.

In a source tree that is not installed: benchmarks/from_source python -m pytest -m gpu.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import StaticCache

import reference
import topologies
from models import padded, sparse_topology, tiny_llama
from surgeon.compiler import Topology, compile_package
from surgeon.compiler.specs.tiles import loads_of, tiles_of
from surgeon.runtime import Package, load, patch
from surgeon.runtime.kernels.gpu.targets import target_of

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

BLOCK = 64


def mixed(head_dim: int, num_heads: int = 8, num_kv_heads: int = 2) -> Topology:
    return topologies.random_topology(
        np.random.default_rng(head_dim),
        num_layers=2,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=BLOCK,
        num_blocks=12,
    )


@pytest.fixture(scope="module")
def topology() -> Topology:
    return mixed(128)


@pytest.fixture(scope="module")
def package(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return compiled(topology, tmp_path_factory.mktemp("package"))


def compiled(topology: Topology, folder: Path) -> Package:
    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    return load(compile_package(topology, folder / "kernels", [target]), strict=True, device="cuda")


def tensors(
    topology: Topology, q_length: int, k_length: int, dtype: torch.dtype, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q laid out as projections leave it; k and v in the layout of a cache."""
    model = topology.model
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, q_length, model.num_attention_heads, model.head_dim, generator=generator)
    k, v = torch.randn(2, batch, model.num_key_value_heads, k_length, model.head_dim, generator=generator)
    q, k, v = (tensor.to("cuda", dtype) for tensor in (q, k, v))
    return q.transpose(1, 2), k, v


def check(
    package: Package,
    topology: Topology,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: list[int] | None = None,
    cache_leftpad: list[int] | None = None,
    layer: int = 0,
    dense_rows: int = 0,
) -> None:
    places = [None if place is None else torch.tensor(place, device="cuda") for place in (position, cache_leftpad)]
    out, lse = package.attention_with_lse(layer, q, k, v, None, *places, dense_rows=dense_rows)
    expected, expected_lse = reference.attention(
        topology, layer, q.cpu(), k.cpu(), v.cpu(), position, cache_leftpad, dense_rows=dense_rows
    )
    assert reference.relative_error(out.cpu(), expected) < reference.TOLERANCE[q.dtype]
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("length", [1, 63, 500, 12 * BLOCK, 15 * BLOCK + 7])
def test_prefill(package: Package, topology: Topology, dtype: torch.dtype, layer: int, length: int) -> None:
    check(package, topology, *tensors(topology, length, length, dtype), layer=layer)


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (3, 1), (8, 1)])
def test_shapes(head_dim: int, num_heads: int, num_kv_heads: int, tmp_path: Path) -> None:
    topology = mixed(head_dim, num_heads, num_kv_heads)
    package = compiled(topology, tmp_path)
    check(package, topology, *tensors(topology, 700, 700, torch.bfloat16))
    check(package, topology, *tensors(topology, 1, 700, torch.bfloat16))


@pytest.mark.parametrize("q_length", [1, 150])
def test_chunks_of_a_longer_cache_with_left_padding(package: Package, topology: Topology, q_length: int) -> None:
    q, k, v = tensors(topology, q_length, 900, torch.bfloat16)
    check(package, topology, q, k, v, position=[600, 233], cache_leftpad=[0, 77])


@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("dense_rows", [1, 70, 1000])
def test_dense_rows(block_size: int, dense_rows: int, tmp_path: Path) -> None:
    topology = topologies.window_topology([1, 2, 3, 1], num_kv_heads=2, head_dim=128, block_size=block_size)
    package = compiled(topology, tmp_path)
    for q_length in (1, 5, 300):
        q, k, v = tensors(topology, q_length, 900, torch.bfloat16)
        check(package, topology, q, k, v, dense_rows=dense_rows, position=[600, 233], cache_leftpad=[0, 77])


def test_positions_of_the_past(package: Package, topology: Topology) -> None:
    q, k, v = tensors(topology, 1, 900, torch.float16, batch=3)
    check(package, topology, q, k, v, position=[899, 64, 3], cache_leftpad=[5, 0, 9])


@pytest.mark.parametrize("q_length", [1, 150])
def test_a_part_of_the_kv_heads_is_the_whole_for_them(package: Package, topology: Topology, q_length: int) -> None:
    q, k, v = tensors(topology, q_length, 900, torch.bfloat16)
    cache_leftpad = torch.tensor([0, 77], device="cuda")
    whole = package.attention(1, q, k, v, cache_leftpad=cache_leftpad)
    part = package.part(range(1, 2)).attention(1, q[:, 4:], k[:, 1:], v[:, 1:], cache_leftpad=cache_leftpad)
    torch.testing.assert_close(part, whole[:, :, 4:], rtol=2e-2, atol=2e-2)  # a part splits its keys more often


@pytest.mark.parametrize("q_length", [1, 200])
def test_a_captured_graph_follows_its_inputs(package: Package, topology: Topology, q_length: int) -> None:
    q, k, v = tensors(topology, q_length, 700, torch.bfloat16)
    position = torch.tensor([500, 300], device="cuda")
    cache_leftpad = torch.zeros_like(position)

    def call() -> torch.Tensor:
        return package.attention(0, q, k, v, position=position, cache_leftpad=cache_leftpad)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    position.copy_(torch.tensor([133, 499]))
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.testing.assert_close(out, call(), rtol=0, atol=0)


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
def test_persistent_programs_do_every_task_at_each_replay(topology: Topology, loads: str, tmp_path: Path) -> None:
    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    if loads not in loads_of(target, "prefill"):
        pytest.skip(f"{target} has no {loads}")
    tile = dataclasses.replace(tiles_of(target).listed("prefill", 128), loads=loads, persistent=True)
    tiles = {target: tiles_of(target).with_tile("prefill", 128, tile)}
    package = load(compile_package(topology, tmp_path / "kernels", [target], tiles=tiles), strict=True, device="cuda")
    q, k, v = tensors(topology, 500, 700, torch.bfloat16, batch=12)  # more tasks than programs
    check(package, topology, q, k, v, position=[*range(0, 180, 15)], cache_leftpad=[*range(0, 96, 8)], dense_rows=70)
    package.attention(0, q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = package.attention(0, q, k, v)
    for _ in range(2):
        q.copy_(torch.randn_like(q))
        out.zero_()
        graph.replay()
        torch.testing.assert_close(out, package.attention(0, q, k, v), rtol=0, atol=0)


@torch.no_grad()
def test_a_captured_step_of_a_patched_model_with_padding(tmp_path: Path) -> None:
    model = tiny_llama().to("cuda", torch.bfloat16)
    patch(model, compiled(sparse_topology(), tmp_path), recall="pattern")
    ids, mask = (tensor.cuda() for tensor in padded([5, 8]))
    step = {"input_ids": ids[:, -1:], "attention_mask": torch.nn.functional.pad(mask, (0, 1), value=1)}

    def filled() -> StaticCache:
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        return cache

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = model(**step, past_key_values=filled()).logits
        cache = filled()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = model(**step, past_key_values=cache).logits
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture(scope="module")
def routed() -> Topology:
    heads = [topologies.window_head(1, 2, route=3), topologies.window_head(1, 2), topologies.DENSE]
    return topologies.build(
        [[*heads, topologies.window_head(0, 1, route=19)] * 2],
        num_kv_heads=2,
        head_dim=128,
        block_size=BLOCK // 2,
        num_blocks=24,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_length", [1, 45, 700])
def test_routed_heads_choose_as_the_definition_says(
    routed: Topology, q_length: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    package = compiled(routed, tmp_path)
    q, k, v = tensors(routed, q_length, 760, dtype)
    for dense_rows in (0, 40):
        check(package, routed, q, k, v, [760 - q_length, 730 - q_length], [0, 9], dense_rows=dense_rows)


@pytest.mark.parametrize("q_length", [1, 200])
def test_a_captured_graph_chooses_anew(routed: Topology, q_length: int, tmp_path: Path) -> None:
    package = compiled(routed, tmp_path)
    q, k, v = tensors(routed, q_length, 700, torch.bfloat16)
    position = torch.tensor([500, 300], device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        package.attention(0, q, k, v, position=position)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = package.attention(0, q, k, v, position=position)
    position.copy_(torch.tensor([133, 499]))
    q.copy_(torch.randn_like(q))
    k.copy_(torch.randn_like(k))
    graph.replay()
    torch.testing.assert_close(out, package.attention(0, q, k, v, position=position), rtol=0, atol=0)


def test_a_stream_of_its_own(package: Package, topology: Topology) -> None:
    q, k, v = tensors(topology, 300, 300, torch.bfloat16)
    expected = package.attention(0, q, k, v)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = package.attention(0, q, k, v)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_the_op_in_a_compiled_function(package: Package, topology: Topology) -> None:
    q, k, v = tensors(topology, 300, 300, torch.bfloat16)
    function = torch.compile(lambda q, k, v: package.attention(0, q * 2, k, v) + 1, fullgraph=True)
    torch.testing.assert_close(function(q, k, v), package.attention(0, q * 2, k, v) + 1)
