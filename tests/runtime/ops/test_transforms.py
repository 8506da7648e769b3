"""The ops under torch.func: gradients as by torch.autograd, batches as in a loop; forward mode is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from models import Compiled
from surgeon.runtime import Package, load
from surgeon.runtime.errors import PatchError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # which torch's own forward mode uses
]

Values = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def package(compiled: dict[str, Compiled]) -> Package:
    return compiled["sparse"].package


def loss(package: Package, *values: torch.Tensor) -> torch.Tensor:
    out, lse = package.attention_with_lse(1, *values, cache_leftpad=3)
    return package.attention(1, *values, cache_leftpad=3).square().sum() + out.sum() + lse[:, :, 3:].sin().sum()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def gradients(package: Package, values: Values) -> tuple[torch.Tensor, ...]:
    leaves = [value.clone().requires_grad_() for value in values]
    return torch.autograd.grad(loss(package, *leaves), leaves)


def test_grad(package: Package, values: Values) -> None:
    close(torch.func.grad(lambda *v: loss(package, *v), argnums=(0, 1, 2))(*values), gradients(package, values))


def test_grad_with_gradients_of_its_own_outside(package: Package, values: Values) -> None:
    """A transform within torch.autograd: tensors require gradients at both levels."""
    q = values[0].clone().requires_grad_()
    found = torch.func.grad(lambda k: loss(package, q, k, values[2]))(values[1])
    close(found, gradients(package, values)[1])


def test_vjp_and_jacrev(package: Package, values: Values) -> None:
    q, k, v = values
    wanted = torch.stack([gradients(package, values)[0]] * 2)
    (by_vjp,) = torch.func.vjp(lambda q: loss(package, q, k, v), q)[1](torch.tensor(1.0))
    by_jacrev = torch.func.jacrev(lambda q: loss(package, q, k, v).expand(2))(q)
    close(by_vjp, wanted[0])
    close(by_jacrev, wanted)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 2, 2), (4, 0, None)], ids=str)
def test_vmap(package: Package, values: Values, in_dims: tuple[int | None, ...]) -> None:
    rows = [tuple(torch.randn_like(value) for value in values) for _ in range(3)]
    stacked = [
        value if place is None else torch.stack([row[name] for row in rows], dim=place)
        for name, (value, place) in enumerate(zip(values, in_dims, strict=True))
    ]

    def of(row: tuple[torch.Tensor, ...]) -> Any:
        given = [v if place is None else own for v, own, place in zip(values, row, in_dims, strict=True)]
        return package.attention_with_lse(0, *given, position=0)

    found = torch.func.vmap(lambda *v: package.attention_with_lse(0, *v, position=0), in_dims)(*stacked)
    close(found, tuple(map(torch.stack, zip(*map(of, rows), strict=True))))


def test_positions_and_paddings_may_be_mapped(package: Package, values: Values) -> None:
    q, k, v = values
    starts, pads = torch.tensor([[0, 5], [30, 2], [9, 9]]), torch.tensor([[0, 1], [7, 0], [2, 2]])
    found = torch.func.vmap(lambda p, c: package.attention(0, q[:, :, :10], k, v, None, p, c))(starts, pads)
    rows = [package.attention(0, q[:, :, :10], k, v, None, p, c) for p, c in zip(starts, pads, strict=True)]
    close(found, torch.stack(rows))


def test_gradients_of_each_sequence(package: Package, values: Values) -> None:
    rows = torch.func.vmap(torch.func.grad(lambda *v: loss(package, *(x[None] for x in v)), (0, 1, 2)))(*values)
    close(rows, gradients(package, values))


def test_under_autocast(package: Package, values: Values) -> None:
    """Mixed dtypes, as models pass them there, become autocast's own."""
    q, k, v = values
    loose = load(package._files.folder)  # runs bf16, in fp32 kernels
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.func.vmap(lambda q: loose.attention(0, q, k.bfloat16(), v))(q[None])[0]
        assert found.dtype == torch.bfloat16
        close(found, loose.attention(0, q, k, v))
        gradient = torch.func.grad(lambda q: loose.attention(0, q, k.bfloat16(), v).float().square().sum())(q)
    expected = torch.func.grad(lambda q: package.attention(0, q, k, v).square().sum())(q)
    torch.testing.assert_close(gradient, expected, atol=0.2, rtol=0.05)


def forward_mode(call: Callable[[torch.Tensor], Any], value: torch.Tensor, requires_grad: bool) -> None:
    with forward_ad.dual_level(), torch.set_grad_enabled(requires_grad):
        call(forward_ad.make_dual(value.clone().requires_grad_(requires_grad), torch.ones_like(value)))


WAYS: dict[str, Callable[[Callable[[torch.Tensor], Any], torch.Tensor], Any]] = {
    "jvp": lambda call, value: torch.func.jvp(call, (value,), (torch.ones_like(value),)),
    "jacfwd": lambda call, value: torch.func.jacfwd(call)(value),
    "hessian": lambda call, value: torch.func.hessian(lambda x: call(x).sum())(value),
    "linearize": lambda call, value: torch.func.linearize(call, value),
    "jvp of grad": lambda call, value: torch.func.jvp(
        torch.func.grad(lambda x: call(x).sum()), (value,), (torch.ones_like(value),)
    ),
    "grad of jvp": lambda call, value: torch.func.grad(
        lambda x: torch.func.jvp(call, (x,), (torch.ones_like(x),))[1].sum()
    )(value),
    "dual numbers": lambda call, value: forward_mode(call, value, False),
    "dual numbers and gradients": lambda call, value: forward_mode(call, value, True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", ["attention", "attention_with_lse"])
def test_forward_mode_is_refused(package: Package, values: Values, way: str, op: str) -> None:
    q, k, v = values

    def call(v: torch.Tensor) -> torch.Tensor:
        out = getattr(package, op)(0, q, k, v)
        result: torch.Tensor = out if op == "attention" else out[0]
        return result

    with pytest.raises(PatchError, match=r"expected reverse-mode gradients, got a tensor with a tangent .*; use grad"):
        WAYS[way](call, v)


def test_a_level_without_tangents_changes_nothing(package: Package, values: Values) -> None:
    expected = package.attention(0, *values)
    with forward_ad.dual_level():
        assert torch.equal(package.attention(0, *values), expected)


def test_second_derivatives_are_refused(package: Package, values: Values) -> None:
    q, k, v = values

    def gradient(q: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda q: loss(package, q, k, v))(q).sum()

    with pytest.raises(PatchError, match="expected first derivatives only"):
        torch.func.grad(gradient)(q)


def test_ops_without_gradients_are_refused(package: Package, values: Values) -> None:
    q, k, v = values
    cos, sin = torch.ones(1, 40, 32), torch.zeros(1, 40, 32)

    def rotary(q: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.surgeon.attention_rotary(q, k, v, cos, sin, None, 1.0, 0, 0, package.id, 0)
        return result

    for way in (lambda q: torch.func.grad(lambda q: rotary(q).sum())(q), lambda q: torch.func.vmap(rotary)(q[None])):
        with pytest.raises(PatchError, match=r"surgeon.attention_rotary: expected a call outside of torch.func's"):
            way(q)
