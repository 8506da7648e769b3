"""What routed heads choose in a backward pass: the oracle's blocks, and the oracle's gradients over them."""

from pathlib import Path

import pytest
import torch

import reference
import routing
import topologies
from surgeon.compiler import compile_package
from surgeon.runtime import Package, load
from surgeon.runtime.kernels.choice import choose, nodes_of, units_of
from surgeon.runtime.package.reader import read_package
from topologies import DENSE, head, window_head

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, DIM, HEADS, KV_HEADS = 16, 32, 4, 2
TOPOLOGY = topologies.build(
    [
        [window_head(1, 2, route=3), window_head(1, 2), head(0, 2.0, 0, 1, route=2), DENSE],
        [window_head(0, 1, route=1), window_head(2, 1, route=40), window_head(1, 1), window_head(0, 1, route=1)],
        [window_head(1, 2)] * 4,
    ],
    [{"linkage": topologies.balanced_tree(8)}],
    num_kv_heads=KV_HEADS,
    head_dim=DIM,
    block_size=SIZE,
    num_blocks=8,
)

CALLS: dict[str, tuple[int, int, list[int], list[int], int]] = {
    # queries, keys, positions of the first query in each sequence, first valid keys, dense rows
    "whole": (250, 250, [0, 0], [0, 0], 0),
    "padded": (150, 150, [0, 0], [0, 37], 0),
    "all but one padding": (150, 150, [0, 0], [149, 150], 0),
    "split tiles": (61, 200, [133, 120], [9, 0], 0),
    "one query": (1, 200, [199, 37], [0, 5], 0),
    "dense rows": (100, 200, [100, 100], [0, 3], 50),
    "dense rows only": (20, 40, [20, 20], [0, 0], 40),
    "no query": (0, 5, [5, 5], [0, 0], 0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_package(TOPOLOGY, tmp_path_factory.mktemp("packages") / "routed", targets=["cpu"])


@pytest.fixture(scope="module")
def package(folder: Path) -> Package:
    return load(folder, strict=True)


def inputs(queries: int, keys: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Random q, k and v of two sequences; some keys are repeated, so that blocks tie, and some queries are zero."""
    generator = torch.Generator().manual_seed(queries + keys)
    q = torch.randn(2, queries, HEADS, DIM, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, 2, KV_HEADS, keys, DIM, generator=generator).to(dtype)
    k[:, :, 3 * SIZE : 5 * SIZE] = k[:, :, SIZE : 3 * SIZE][:, :, : k[:, :, 3 * SIZE : 5 * SIZE].shape[2]]
    q[:, :, 96:112] = 0
    return [tensor.detach().requires_grad_() for tensor in (q, k, v)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_the_choice_is_the_oracles(folder: Path, call: str, dtype: torch.dtype) -> None:
    queries, keys, position, leftpad, dense_rows = CALLS[call]
    q, k, _ = (tensor.detach() for tensor in inputs(queries, keys, dtype))
    schedules = read_package(folder).schedules
    assert TOPOLOGY.router
    for layer, router in enumerate(TOPOLOGY.router.layers):
        if router is None:
            continue
        for sequence, (start, first) in enumerate(zip(position, leftpad, strict=True)):
            end = start + queries
            dense = max(0, end - first - dense_rows) // SIZE if dense_rows else None
            seen = k[sequence, :, min(first, end) : end]
            expected = routing.chosen_blocks(TOPOLOGY, layer, q[sequence], seen, start - first, dense)
            found = torch.zeros_like(expected)
            padding = max(0, first - start)
            for index, schedule in enumerate(schedules[layer].heads):
                if not schedule.route:
                    continue
                kv_head = index // (HEADS // KV_HEADS)
                centre, width = (torch.tensor(each[kv_head]) for each in (router.centre, router.scale))
                nodes = nodes_of(seen[kv_head], centre, width)
                own = q[sequence, index, padding:]
                for choices in choose(schedule, SIZE, start + padding - first, own, nodes, width, dense).values():
                    for choice in choices:
                        rows = slice(choice.queries.start + first - start, choice.queries.stop + first - start)
                        found[index, rows, list(choice.blocks)] = True
            assert torch.equal(found, expected)


def test_units_are_whole_tiles_and_single_queries_around_them() -> None:
    assert list(units_of(range(14, 49))) == [
        range(14, 15),
        range(15, 16),
        range(16, 32),
        range(32, 48),
        range(48, 49),
    ]
    assert list(units_of(range(17, 31))) == [range(query, query + 1) for query in range(17, 31)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str
)
@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_the_oracles(package: Package, call: str, dtype: torch.dtype, tolerance: float) -> None:
    queries, keys, position, leftpad, dense_rows = CALLS[call]
    tensors = inputs(queries, keys, dtype)
    numbers = {"position": torch.tensor(position), "cache_leftpad": torch.tensor(leftpad)}
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    for layer in range(3):
        out = package.attention(layer, *tensors, dense_rows=dense_rows, **numbers)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(layer)).to(dtype)
        expected, _ = reference.attention(TOPOLOGY, layer, *exact, position, leftpad, dense_rows=dense_rows)
        of_exact = torch.autograd.grad((expected * grad.double()).sum(), exact, materialize_grads=True)
        for ours, theirs in zip(torch.autograd.grad(out, tensors, grad), of_exact, strict=True):
            assert (ours.double() - theirs).norm() <= tolerance * theirs.norm() + 1e-6, layer


def test_each_sequence_of_a_batch_chooses_by_itself(package: Package) -> None:
    tensors = inputs(200, 200)
    grad = torch.randn(2, 200, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    together = torch.autograd.grad(package.attention(0, *tensors), tensors, grad)
    for sequence in range(2):
        own = [tensor[sequence : sequence + 1].detach().requires_grad_() for tensor in tensors]
        alone = torch.autograd.grad(package.attention(0, *own), own, grad[sequence : sequence + 1])
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[sequence], theirs[0])


def test_some_kv_heads_of_a_layer_choose_by_their_own_router(package: Package) -> None:
    q, k, v = inputs(200, 200)
    grad = torch.randn(2, 200, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    whole = torch.autograd.grad(package.attention(0, q, k, v), (q, k, v), grad)
    part = package.part(range(1, 2))
    own = [tensor[:, tensor.shape[1] // 2 :].detach().requires_grad_() for tensor in (q, k, v)]
    found = torch.autograd.grad(part.attention(0, *own), own, grad[:, :, HEADS // 2 :])
    for ours, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(ours, theirs[:, theirs.shape[1] // 2 :])
