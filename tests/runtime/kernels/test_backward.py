"""The backward pass of attention: the fp64 oracle's gradients, for all shapes, dtypes and positions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reference
from gpu_standin import on_gpu
from surgeon.compiler import compile_package
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PatchError
from surgeon.runtime.kernels.backward import gradients
from surgeon.runtime.operands import Operands
from surgeon.runtime.package.reader import read_package
from topologies import random_topology

pytestmark = pytest.mark.usefixtures("one_thread")

TOPOLOGY = random_topology(
    np.random.default_rng(5), num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32, block_size=16, num_blocks=8
)
# The forward pass's, and what bf16 and fp16 lose of the incoming gradient.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# Queries, keys, position, first key: whole, left-padded, a chunk after a past, one step, a cache not yet full.
CALLS: dict[str, tuple[int, int, Sequence[int] | None, Sequence[int] | None]] = {
    "whole": (150, 150, None, None),
    "padded": (150, 150, None, [0, 37, 150]),
    "chunk": (40, 150, None, None),
    "one query": (1, 70, None, None),
    "places": (40, 150, [110, 30, 3], [0, 5, 20]),
    "one token": (1, 1, None, None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_package(TOPOLOGY, tmp_path_factory.mktemp("package") / "kernels")


@pytest.fixture(scope="module")
def package(folder: Path) -> Package:
    return load(folder, strict=True)


def inputs(q_length: int, k_length: int, dtype: torch.dtype, batch: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(k_length)
    shapes = ((batch, q_length, 6, 32), (batch, 2, k_length, 32), (batch, 2, k_length, 32))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [tensor.requires_grad_() for tensor in (q.transpose(1, 2).detach(), k, v)]


def expected_gradients(
    layer: int, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor], **places: Any
) -> Sequence[torch.Tensor]:
    """The oracle's gradients in fp64, from those of its output and log-sum-exp."""
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out, lse = reference.attention(TOPOLOGY, layer, *exact, **places)
    seen = torch.isfinite(lse)
    loss = (out * grads[0].double()).sum()
    if len(grads) == 2:
        loss = loss + (lse[seen] * grads[1].double()[seen]).sum()
    return torch.autograd.grad(loss, exact, materialize_grads=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", CALLS)
def test_gradients(package: Package, call: str, dtype: torch.dtype) -> None:
    q_length, k_length, position, cache_leftpad = CALLS[call]
    tensors = inputs(q_length, k_length, dtype)
    places = {"position": position, "cache_leftpad": cache_leftpad}
    given = {name: None if place is None else torch.tensor(place) for name, place in places.items()}
    for layer in range(3):
        out = package.attention(layer, *tensors, scale=0.3, **given)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(layer)).to(dtype)
        found = torch.autograd.grad(out, tensors, grad)
        expected = expected_gradients(layer, tensors, [grad], scale=0.3, **places)
        for ours, theirs, tensor in zip(found, expected, tensors, strict=True):
            assert ours.dtype == dtype
            assert ours.shape == tensor.shape
            assert (ours.double() - theirs).norm() <= TOLERANCE[dtype] * theirs.norm() + 1e-6


def test_gradients_through_the_log_sum_exp(package: Package) -> None:
    tensors = inputs(70, 90, torch.float32)
    cache_leftpad = [0, 37, 90]
    results = package.attention_with_lse(0, *tensors, cache_leftpad=torch.tensor(cache_leftpad))
    grads = [torch.randn(result.shape, generator=torch.Generator().manual_seed(1)) for result in results]
    found = torch.autograd.grad(results, tensors, grads)
    expected = expected_gradients(0, tensors, grads, cache_leftpad=cache_leftpad)
    for ours, theirs in zip(found, expected, strict=True):
        assert reference.relative_error(ours, theirs) < TOLERANCE[torch.float32]


class _Exact(torch.autograd.Function):
    """An op with the oracle's forward pass and the backward pass under test, all in fp64."""

    @staticmethod
    def forward(ctx: Any, schedule: Any, layer: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(*tensors)
        ctx.schedule = schedule
        return reference.attention(TOPOLOGY, layer, *tensors, position=[2, 11], cache_leftpad=[0, 3])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        operands = Operands(*ctx.saved_tensors, torch.tensor([2, 11]), torch.tensor([0, 3]), 32**-0.5)
        return None, None, *gradients(ctx.schedule, 16, *grads, operands)


def test_gradcheck(folder: Path) -> None:
    schedules = read_package(folder).schedules
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(2, heads, length, 32, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads, length in ((6, 23), (2, 36), (2, 36))
    ]
    for layer in range(3):

        def attend(*tensors: torch.Tensor, layer: int = layer) -> Any:
            return _Exact.apply(schedules[layer].heads, layer, *tensors)

        assert torch.autograd.gradcheck(attend, tensors, fast_mode=True, rtol=1e-6)


def test_what_nobody_reads_has_no_gradient(package: Package) -> None:
    q, k, v = inputs(40, 150, torch.float32)
    out = package.attention(0, q, k, v, position=30, cache_leftpad=10)
    for grad in torch.autograd.grad(out.sum(), (k, v)):
        assert not grad[:, :, :10].any()
        assert grad[:, :, 10:70].any()
        assert not grad[:, :, 70:].any()


def test_two_uses_add_up(package: Package) -> None:
    """Gradients add up over two calls on the same tensors, and are the same in a second pass through the graph."""
    tensors = inputs(40, 40, torch.float32)
    singly = [torch.autograd.grad(package.attention(layer, *tensors).sum(), tensors) for layer in (0, 1)]
    both = package.attention(0, *tensors).sum() + package.attention(1, *tensors).sum()
    for _ in range(2):
        for found, *parts in zip(torch.autograd.grad(both, tensors, retain_graph=True), *singly, strict=True):
            torch.testing.assert_close(found, sum(parts))


def test_second_derivatives_are_refused(package: Package) -> None:
    q, k, v = inputs(40, 40, torch.float32)
    (grad,) = torch.autograd.grad(package.attention(0, q, k, v).sum(), q, create_graph=True)
    with pytest.raises(PatchError, match="expected first derivatives only"):
        grad.sum().backward()


def test_tensors_of_a_gpu_are_refused(package: Package) -> None:
    tensors = [on_gpu(tensor.detach()) for tensor in inputs(40, 40, torch.float32)]
    with pytest.raises(PatchError, match="expected tensors on the CPU in a backward pass, got cuda:0"):
        package.kernels.run_backward(0, tensors[0].transpose(1, 2), None, Operands(*tensors, None, None, 0.2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(package: Package, dtype: torch.dtype) -> None:
    """Under autocast, models pass rotated queries in fp32 and values in the lower dtype."""
    q, k, v = inputs(40, 40, torch.float32)
    with torch.autocast("cpu", dtype):
        out = package.attention(1, q, k, v.to(dtype))
    assert out.dtype == dtype
    found = torch.autograd.grad(out.float().sum(), (q, k, v))
    low = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
    expected = torch.autograd.grad(package.attention(1, *low).float().sum(), low)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("name", ["attention", "attention_with_lse"])
def test_opcheck_with_gradients(package: Package, name: str) -> None:
    tensors = inputs(20, 40, torch.float32)
    places = (torch.tensor([20, 3, 0]), torch.tensor([0, 2, 1]))
    torch.library.opcheck(getattr(torch.ops.surgeon, name).default, (*tensors, *places, 0.2, 0, 0, package.id, 1))


def test_compiled_training_step(package: Package) -> None:
    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return (package.attention(1, *tensors) ** 2).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (40, 23):
        tensors = inputs(length, length, torch.float32)
        expected = torch.autograd.grad(loss(*tensors), tensors)
        for ours, theirs in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
