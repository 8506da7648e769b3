"""Kernels for keys and values in pages on a GPU; run these with -m gpu on a machine that has one, and Triton."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
import topologies
from paged_calls import PagedCall, PagedSequence, dense_rows_of, make_paged_call
from surgeon.compiler import Topology, compile_package
from surgeon.runtime import Package, load
from surgeon.runtime.kernels.gpu.targets import target_of
from surgeon.runtime.packed_batch import DeviceBatch

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

MIXED_BATCH = [PagedSequence(*each) for each in ((500, 500), (1, 1900), (0, 20), (133, 787), (2, 2), (1, 64))]
"""Whole prompts, a chunk, sequences that decode, and one that stands for none."""


def mixed(block_size: int, head_dim: int = 128) -> Topology:
    return topologies.random_topology(
        np.random.default_rng(block_size),
        num_layers=1,
        num_heads=8,
        num_kv_heads=2,
        head_dim=head_dim,
        block_size=block_size,
        num_blocks=2048 // block_size,
    )


def compiled(topology: Topology, folder: Path) -> Package:
    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    return load(compile_package(topology, folder / "kernels", [target], paged=True), strict=True, device="cuda")


def batch_of(call: PagedCall, sequences: Sequence[PagedSequence]) -> DeviceBatch:
    numbers = (call.query_start, call.lengths, call.dense_from, call.block_table)
    tensors = (torch.from_numpy(each).cuda() for each in numbers)
    return DeviceBatch(*tensors, call.cache.shape[2], max(each.queries for each in sequences))


def check(
    package: Package, topology: Topology, sequences: Sequence[PagedSequence], page_tokens: int, dtype: torch.dtype
) -> None:
    """Compares each sequence with the reference; pages that nobody reads are NaN."""
    call, states = make_paged_call(topology, sequences, page_tokens=page_tokens)
    cache = torch.from_numpy(call.cache).to("cuda", dtype)
    k, v = cache.split(topology.model.head_dim, dim=3)
    q = torch.from_numpy(call.q).to("cuda", dtype)
    out = torch.full_like(q, torch.nan)
    package.kernels.run_pages(0, batch_of(call, sequences), q, k, v, call.scale, out)
    for index, (each, (keys, values)) in enumerate(zip(sequences, states, strict=True)):
        if not each.queries:
            continue
        tokens = slice(*call.query_start[index : index + 2])
        own = q[tokens].cpu().transpose(0, 1)[None]
        pair = (torch.from_numpy(x)[None].to(dtype) for x in (keys, values))
        position = each.length - each.queries
        expected, _ = reference.attention(topology, 0, own, *pair, [position], [0], call.scale, *dense_rows_of(each))
        assert reference.relative_error(out[tokens].cpu(), expected[0]) < reference.TOLERANCE[dtype], (
            f"sequence {index}"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block_size", "page_tokens"), [(16, 16), (32, 64), (64, 64), (128, 256)])
def test_a_batch_of_prompts_chunks_and_decoding(
    block_size: int, page_tokens: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    topology = mixed(block_size)
    check(compiled(topology, tmp_path), topology, MIXED_BATCH, page_tokens, dtype)


@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_head_sizes(head_dim: int, tmp_path: Path) -> None:
    topology = mixed(64, head_dim)
    check(compiled(topology, tmp_path), topology, MIXED_BATCH, 64, torch.bfloat16)


def test_each_sequence_has_its_own_dense_rows(tmp_path: Path) -> None:
    topology = mixed(64)
    sequences = [PagedSequence(n, 900, first) for n in (1, 200) for first in (0, 640, 800, 899, 900, 901)]
    check(compiled(topology, tmp_path), topology, sequences, 64, torch.bfloat16)


def test_a_captured_step_of_decoding_follows_the_engine(tmp_path: Path) -> None:
    topology = mixed(64)
    package = compiled(topology, tmp_path)
    sequences = [PagedSequence(1, length) for length in (1900, 3, 640, 77)]
    call, _ = make_paged_call(topology, sequences, page_tokens=64)
    batch = batch_of(call, sequences)
    cache = torch.from_numpy(call.cache).nan_to_num(0.5).to("cuda", torch.bfloat16)
    k, v = cache.split(128, dim=3)
    q = torch.from_numpy(call.q).to("cuda", torch.bfloat16)

    def step(out: torch.Tensor) -> torch.Tensor:
        package.kernels.run_pages(0, batch, q, k, v, call.scale, out)
        return out

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(torch.empty_like(q))
    torch.cuda.current_stream().wait_stream(stream)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(q)
    with torch.cuda.graph(graph):
        step(out)
    batch.lengths.copy_(torch.tensor([64, 1899, 1, 600]))
    batch.dense_from.copy_(torch.tensor([0, 1700, 5, 2**31 - 1]))
    batch.query_start.copy_(torch.tensor([0, 1, 2, 3, 3]))  # the last stands for none
    q.copy_(torch.randn_like(q))
    out.fill_(7.0)
    graph.replay()
    torch.testing.assert_close(out[:3], step(torch.empty_like(q))[:3], rtol=0, atol=0)
    assert (out[3] == 7.0).all()
