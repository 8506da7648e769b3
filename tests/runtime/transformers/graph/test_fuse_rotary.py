"""Rotary position embedding inside the kernels: the op against the formula, and the matcher on graphs."""

from collections.abc import Callable

import pytest
import torch

import reference
from models import Compiled, sparse_topology, tiny_llama
from surgeon.compiler import compile_package
from surgeon.runtime import load, trace
from surgeon.runtime.errors import PatchError
from surgeon.runtime.transformers.graph.fuse_rotary import fuse_rotary

HEAD_DIM = 32
Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The formula of Transformers, written as there."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos.unsqueeze(1)) + (turned * sin.unsqueeze(1))


@pytest.fixture(scope="module")
def every_dtype(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    topology = sparse_topology()
    return Compiled(topology, load(compile_package(topology, tmp_path_factory.mktemp("package") / "kernels")))


def tensors(length: int, batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(batch, length, 4, HEAD_DIM, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, batch, length, 2, HEAD_DIM, generator=generator).to(dtype).transpose(2, 3)
    # The two halves differ, unlike Llama's, so that a mix-up shows.
    cos, sin = torch.randn(2, batch, length, HEAD_DIM, generator=generator).to(dtype)
    return q, k, v, cos, sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 3, 20, 150])
def test_the_op_is_the_formula_and_the_attention(every_dtype: Compiled, length: int, dtype: torch.dtype) -> None:
    topology, package = every_dtype.topology, every_dtype.package
    q, k, v, cos, sin = tensors(length, 2, dtype)
    cache_leftpad = [0, length // 3]
    found = torch.ops.surgeon.attention_rotary(q, k, v, cos, sin, torch.tensor(cache_leftpad), 0.2, 0, 0, package.id, 1)
    rotated = (rotate(x.double(), cos.double(), sin.double()) for x in (q, k))
    expected, _ = reference.attention(topology, 1, *rotated, v, cache_leftpad=cache_leftpad, scale=0.2)
    assert reference.relative_error(found, expected) < 2 * reference.TOLERANCE[dtype]  # keys are rounded one more time
    one = torch.ops.surgeon.attention_rotary(q[:1], k[:1], v[:1], cos[:1], sin[:1], None, 0.2, 0, 0, package.id, 1)
    shared = torch.ops.surgeon.attention_rotary(q, k, v, cos[:1], sin[:1], None, 0.2, 0, 0, package.id, 1)
    assert torch.equal(one, shared[:1])


def test_opcheck(compiled: dict[str, Compiled]) -> None:
    q, k, v, cos, sin = tensors(40, 2, torch.float32)
    arguments = (q, k, v, cos, sin, torch.tensor([0, 3]), 0.2, 0, 0, compiled["sparse"].package.id, 0)
    torch.library.opcheck(torch.ops.surgeon.attention_rotary.default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, cos, sin: (q[:, :, :5], k, v, cos, sin), r"k: expected \[2, 2, 5, 32\], a key for each query"),
        (lambda q, k, v, cos, sin: (q, k, v, cos[:, :5], sin), r"cos: expected \[2, 40, 32\], got \[2, 5, 32\]"),
        (lambda q, k, v, cos, sin: (q, k, v, cos, sin[0]), r"sin: expected \[2, 40, 32\], got \[40, 32\]"),
        (lambda q, k, v, cos, sin: (q, k, v, cos.bfloat16(), sin), r"cos: expected torch\.float32 on cpu, as q"),
    ],
)
def test_tensors_that_do_not_fit(compiled: dict[str, Compiled], change: object, message: str) -> None:
    arguments = change(*tensors(40, 2, torch.float32))  # type: ignore[operator]
    with pytest.raises(PatchError, match=message):
        torch.ops.surgeon.attention_rotary(*arguments, None, 0.2, 0, 0, compiled["sparse"].package.id, 0)


def test_every_site_of_a_traced_llama_rotates_in_the_kernel(compiled: dict[str, Compiled]) -> None:
    graph = trace(tiny_llama(), compiled["sparse"].package, recall="pattern")
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.surgeon.attention_rotary.default) == 3
    assert torch.ops.surgeon.attention.default not in targets
    assert torch.ops.aten.neg.default not in targets


def fused(q_rotate: Rotate, k_rotate: Rotate) -> int:
    """The number of sites that match in a graph with one attention, rotated by these functions."""

    class Site(torch.nn.Module):
        def forward(
            self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
        ) -> torch.Tensor:
            rotated_q, rotated_k = q_rotate(q, cos, sin), k_rotate(k, cos, sin)
            return torch.ops.surgeon.attention(rotated_q, rotated_k, v, None, None, 0.2, 0, 0, "any", 0)  # type: ignore[no-any-return]

    example = tensors(40, 2, torch.float32)
    graph = torch.export.export(Site(), example).module().graph
    return fuse_rotary(graph, HEAD_DIM)


def _half_kept(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = torch.cat((x[..., 16:], x[..., :16]), dim=-1)
    return (x * cos.unsqueeze(1)) + (turned * sin.unsqueeze(1))


def _partial(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = torch.cat((-x[..., 8:], x[..., :8]), dim=-1)
    return (x * cos.unsqueeze(1)) + (turned * sin.unsqueeze(1))


def _other_axis(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = torch.cat((-x[..., 16:], x[..., :16]), dim=-1)
    return (x * cos.unsqueeze(1)) + (turned * sin[:, :1].unsqueeze(2))


def _of_another(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    other = x + 1
    turned = torch.cat((-other[..., 16:], other[..., :16]), dim=-1)
    return (x * cos.unsqueeze(1)) + (turned * sin.unsqueeze(1))


def _scaled(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = torch.cat((-x[..., 16:], x[..., :16]), dim=-1)
    return torch.add(x * cos.unsqueeze(1), turned * sin.unsqueeze(1), alpha=2)


def test_the_very_pattern_is_fused() -> None:
    assert fused(rotate, rotate) == 1


@pytest.mark.parametrize("other", [_half_kept, _partial, _other_axis, _of_another, _scaled, lambda x, cos, sin: x])
def test_anything_else_is_left_alone(other: Rotate) -> None:
    assert fused(other, other) == 0
    assert fused(rotate, other) == 0
    assert fused(other, rotate) == 0


def test_different_cosines_for_q_and_k_are_left_alone() -> None:
    assert fused(rotate, lambda x, cos, sin: rotate(x, sin, cos)) == 0
