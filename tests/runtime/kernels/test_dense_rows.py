"""Dense rows: the last rows of a prompt, which read every block whatever the topology says, against the fp64 oracle."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import reference
from surgeon.compiler import compile_package
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PatchError, TopologyError
from surgeon.runtime.operands import Operands
from topologies import random_topology, window_topology

pytestmark = pytest.mark.usefixtures("one_thread")

TOPOLOGY = random_topology(
    np.random.default_rng(13), num_layers=2, num_heads=6, num_kv_heads=2, head_dim=32, block_size=16, num_blocks=10
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Queries, keys, position and left padding of each sequence.
CALLS: dict[str, tuple[int, int, Sequence[int], Sequence[int]]] = {
    "a prompt": (150, 150, [0], [0]),
    "padded prompts": (150, 150, [0, 0, 0], [0, 37, 150]),
    "a chunk": (40, 150, [110], [0]),
    "chunks at other places": (40, 150, [110, 30, 3], [0, 5, 20]),
    "beyond the topology": (60, 300, [240], [7]),
    "a token": (1, 137, [136, 100], [0, 9]),
    "a few tokens": (5, 137, [130, 100], [0, 101]),
}
ROWS = ((1, 0), (15, 0), (16, 0), (17, 0), (70, 0), (1_000, 0), (40, 30), (40, 39), (40, 55), (40, 2_000))
"""Dense rows and the tokens of the prompt that later calls bring."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_package(TOPOLOGY, tmp_path_factory.mktemp("package") / "kernels")


@pytest.fixture(scope="module")
def package(folder: Path) -> Package:
    return load(folder, strict=True)


def inputs(batch: int, queries: int, keys: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries + keys)
    q = torch.randn(batch, queries, 6, 32, generator=generator).to(dtype).transpose(1, 2)
    return [q, *torch.randn(2, batch, 2, keys, 32, generator=generator).to(dtype)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("rows", ROWS, ids=lambda rows: "{} rows {} ahead".format(*rows))
def test_every_place_in_every_variant(folder: Path, call: str, rows: tuple[int, int]) -> None:
    queries, keys, position, leftpad = CALLS[call]
    dense_rows, tokens_ahead = rows
    places = torch.tensor(position), torch.tensor(leftpad)
    for variant in load(folder).cpu_variants:
        package = load(folder, cpu_variant=variant)
        for dtype in DTYPES:
            q, k, v = inputs(len(position), queries, keys, dtype)
            for layer in (0, 1):
                found, lse = package.attention_with_lse(
                    layer, q, k, v, None, *places, dense_rows=dense_rows, tokens_ahead=tokens_ahead
                )
                expected, expected_lse = reference.attention(
                    TOPOLOGY, layer, q, k, v, position, leftpad, dense_rows=dense_rows, tokens_ahead=tokens_ahead
                )
                assert reference.relative_error(found, expected) < reference.TOLERANCE[dtype], (variant, dtype)
                torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
                without = package.attention(
                    layer, q, k, v, None, *places, dense_rows=dense_rows, tokens_ahead=tokens_ahead
                )
                assert reference.relative_error(without, expected) < reference.TOLERANCE[dtype], (variant, dtype)


def test_without_dense_rows_the_pattern_alone_is_read(package: Package) -> None:
    q, k, v = inputs(1, 150, 150, torch.float32)
    pattern = package.attention(0, q, k, v)
    assert torch.equal(pattern, package.attention(0, q, k, v, dense_rows=0, tokens_ahead=20))
    some = package.attention(0, q, k, v, dense_rows=40)
    first = (150 - 40) // 16 * 16
    assert torch.equal(some[:, :first], pattern[:, :first])
    assert not torch.allclose(some[:, first:], pattern[:, first:], atol=1e-3)


@pytest.mark.parametrize("chunks", [(100, 50), (96, 53, 1), (16, 16, 16, 16, 16, 16, 54), (60, 60, 30), (143, 7)])
def test_chunks_of_a_prompt_whose_end_is_known(package: Package, chunks: Sequence[int]) -> None:
    q, k, v = inputs(2, 150, 150, torch.float32)
    leftpad = torch.tensor([0, 21])
    whole = package.attention(1, q, k, v, cache_leftpad=leftpad, dense_rows=45)
    begin = 0
    for length in chunks:
        end = begin + length
        part = package.attention(
            1, q[:, :, begin:end], k, v, None, begin, leftpad, dense_rows=45, tokens_ahead=150 - end
        )
        torch.testing.assert_close(part, whole[:, begin:end], rtol=1e-5, atol=1e-5)
        begin = end


@pytest.mark.parametrize("queries", [1, 5, 70])
def test_pages(package: Package, queries: int) -> None:
    q, k, v = inputs(1, queries, 150, torch.float32)
    position, leftpad = torch.tensor([150 - queries]), torch.tensor([3])
    blocks = -(-147 // 16)
    table = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(1)).int().view(1, 2, blocks)
    slots = torch.zeros(2, 2 * blocks, 16, 32)
    for head in range(2):
        for block in range(blocks):
            begin, end = 3 + 16 * block, min(3 + 16 * (block + 1), 150)
            slots[:, table[0, head, block], : end - begin] = torch.stack((k, v))[:, 0, head, begin:end]
    operands = Operands(q, slots[0], slots[1], position, leftpad, 0.2, dense_rows=20)
    found = package.kernels.run_paged(0, operands, table)
    assert torch.equal(found, package.attention(0, q, k, v, 0.2, position, leftpad, dense_rows=20))


def test_a_dropped_block_is_missed_by_dense_rows_only(tmp_path: Path) -> None:
    topology = window_topology([1, 1], num_kv_heads=1, head_dim=32, block_size=16)
    package = load(compile_package(topology, tmp_path / "kernels"))
    q, slots = torch.ones(1, 2, 1, 32), torch.ones(2, 16, 32)
    table = torch.tensor([[[0, -1, 1]]], dtype=torch.int32)
    operands = Operands(q, slots, slots, torch.tensor([40]), torch.tensor([0]), 0.2)
    package.kernels.run_paged(0, operands, table)
    with pytest.raises(PatchError, match="a block that the cache has dropped"):
        package.kernels.run_paged(0, operands._replace(dense_rows=1), table)


def test_rotary(package: Package) -> None:
    q, k, v = inputs(1, 100, 100, torch.float32)
    angles = torch.arange(100)[:, None] * 0.3 ** torch.arange(16)
    cos, sin = angles.cos().repeat(1, 2)[None], angles.sin().repeat(1, 2)[None]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat((-x[..., 16:], x[..., :16]), dim=-1) * sin

    found = torch.ops.surgeon.attention_rotary(q, k, v, cos, sin, None, 0.2, 30, 0, package.id, 0)
    expected, _ = reference.attention(TOPOLOGY, 0, rotated(q), rotated(k), v, scale=0.2, dense_rows=30)
    assert reference.relative_error(found, expected) < reference.TOLERANCE[torch.float32]


@pytest.mark.parametrize("rows", [(1, 0), (45, 0), (45, 20), (1_000, 0)])
@pytest.mark.parametrize("call", ["padded prompts", "chunks at other places", "a few tokens"])
def test_gradients(package: Package, call: str, rows: tuple[int, int]) -> None:
    queries, keys, position, leftpad = CALLS[call]
    dense_rows, tokens_ahead = rows
    tensors = [tensor.requires_grad_() for tensor in inputs(len(position), queries, keys, torch.float32)]
    places = torch.tensor(position), torch.tensor(leftpad)
    out = package.attention(1, *tensors, None, *places, dense_rows=dense_rows, tokens_ahead=tokens_ahead)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(out, tensors, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wanted, _ = reference.attention(
        TOPOLOGY, 1, *exact, position, leftpad, dense_rows=dense_rows, tokens_ahead=tokens_ahead
    )
    expected = torch.autograd.grad(wanted, exact, grad.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert reference.relative_error(ours, theirs) < 4e-6


def test_the_end_of_a_topology_stays_the_end(tmp_path: Path) -> None:
    topology = window_topology([1, 2], num_kv_heads=1, num_blocks=4, block_size=16, head_dim=32, beyond="error")
    package = load(compile_package(topology, tmp_path / "kernels"))
    shape = package.manifest.model
    q = torch.ones(1, shape.num_attention_heads, 1, 32)
    k = torch.ones(1, shape.num_key_value_heads, 65, 32)
    package.attention(0, q, k[:, :, :64], k[:, :, :64], dense_rows=128)
    with pytest.raises(TopologyError, match="a sequence within the topology's blocks"):
        package.attention(0, q, k, k, dense_rows=128)


@pytest.mark.parametrize("name", ["dense_rows", "tokens_ahead"])
@pytest.mark.parametrize("value", [-1, 1.0, True, "8", None, 2**31])
def test_numbers_of_tokens_that_are_refused(package: Package, name: str, value: object) -> None:
    arguments = {"dense_rows": 1} | {name: value}
    with pytest.raises(PatchError, match=f"attention: {name}: expected a whole number of tokens from 0 on, got"):
        package.attention(0, *inputs(1, 4, 4, torch.float32), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [(-1, 0), (1, -1), (2**31, 0)])
def test_numbers_of_tokens_that_an_op_refuses(package: Package, rows: tuple[int, int]) -> None:
    with pytest.raises(PatchError, match="expected a whole number of tokens from 0 on"):
        torch.ops.surgeon.attention(*inputs(1, 4, 4, torch.float32), None, None, 0.2, *rows, package.id, 0)


def test_opcheck(package: Package) -> None:
    q, k, v = inputs(2, 40, 150, torch.float32)
    places = torch.tensor([110, 30]), torch.tensor([0, 5])
    torch.library.opcheck(torch.ops.surgeon.attention.default, (q, k, v, *places, 0.2, 30, 10, package.id, 0))
