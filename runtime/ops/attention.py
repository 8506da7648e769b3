"""The torch ops that call a packaged attention kernel from eager code, `torch.compile` and `torch.export`."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from surgeon.runtime.errors import PatchError
from surgeon.runtime.operands import WITHOUT_GRADIENTS, Gradients, Nodes, Operands
from surgeon.runtime.ops.plain_inference import is_plain_inference
from surgeon.runtime.ops.registry import Runner, find
from surgeon.runtime.ops.transforms import refuse_tangents, transformable, untransformable, without_tangents

# define/impl on a Library costs a fraction of the custom_op decorator's overhead per call.
_LIBRARY = torch.library.Library("surgeon", "DEF")
_ARGUMENTS = (
    "(Tensor q, Tensor k, Tensor v, Tensor? position, Tensor? cache_leftpad, float scale, int dense_rows, "
    "int tokens_ahead, str package, int layer)"
)
_LIBRARY.define(f"attention{_ARGUMENTS} -> Tensor")
_LIBRARY.define(f"attention_with_lse{_ARGUMENTS} -> (Tensor, Tensor)")
_LIBRARY.define(
    "attention_paged(Tensor q, Tensor k, Tensor v, Tensor block_table, Tensor position, Tensor? cache_leftpad, "
    "float scale, int dense_rows, int tokens_ahead, str package, int layer) -> Tensor"
)
_LIBRARY.define(
    "attention_rotary(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? cache_leftpad, float scale, "
    "int dense_rows, int tokens_ahead, str package, int layer) -> Tensor"
)
_LIBRARY.define(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? position, "
    "Tensor? cache_leftpad, float scale, int dense_rows, int tokens_ahead, str package, int layer) "
    "-> (Tensor, Tensor, Tensor)"
)


def attention(package: Runner, layer: int, operands: Operands) -> torch.Tensor:
    """Calls the op `surgeon::attention` or, in plain inference, what it stands for: the kernel itself if possible.

    Torch's dispatcher takes some 50 µs to reach Python code that has left the CPU's caches, per layer and token.
    """
    if not is_dynamo_compiling() and may_go_directly():
        direct = package.direct(layer)
        out = None if direct is None else direct(*operands)
        if out is not None:
            return out
    if is_plain_inference(operands.q, operands.k, operands.v):
        return package.run(layer, operands)
    refuse_tangents(*operands)
    result: torch.Tensor = torch.ops.surgeon.attention(*operands, package.id, layer)
    return result


def may_go_directly() -> bool:
    """False in forward-mode differentiation, the only thing that the dispatcher does not keep from a direct call."""
    return forward_ad._current_level < 0


def attention_paged(
    package: Runner, layer: int, operands: Operands, block_table: torch.Tensor, nodes: Nodes | None = None
) -> torch.Tensor:
    """Calls the op `surgeon::attention_paged`, on pools of blocks in place of k and v; otherwise like `attention`.

    The op has no use for `nodes`, and makes its own.
    """
    q, k, v, *rest = operands
    if is_plain_inference(q, k, v, block_table):
        return package.run_paged(layer, operands, block_table, nodes=nodes)
    refuse_tangents(*operands)
    result: torch.Tensor = torch.ops.surgeon.attention_paged(q, k, v, block_table, *rest, package.id, layer)
    return result


# The implementations take their arguments as the ops define them above.


def _attention(*arguments: Any) -> torch.Tensor:
    *operands, package, layer = arguments
    runner = find(package)
    direct = runner.direct(layer)
    out = None if direct is None else direct(*operands)
    return runner.run(layer, Operands(*operands)) if out is None else out


def _attention_with_lse(q: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *operands, package, layer = arguments
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return find(package).run(layer, Operands(q, *operands), lse), lse


def _attention_paged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    *rest, package, layer = arguments
    return find(package).run_paged(layer, Operands(q, k, v, *rest), block_table)


def _attention_rotary(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    *rest, package, layer = arguments
    return find(package).run_rotary(layer, Operands(q, k, v, None, *rest), cos, sin)


def _attention_backward(grad_out: torch.Tensor, grad_lse: torch.Tensor | None, *arguments: Any) -> Gradients:
    *operands, package, layer = arguments
    return find(package).run_backward(layer, grad_out, grad_lse, Operands(*operands))


def _fake_attention(q: torch.Tensor, *_: Any) -> torch.Tensor:
    batch, heads, length, head_dim = q.shape
    return q.new_empty((batch, length, heads, head_dim))


def _fake_attention_with_lse(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_attention(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_attention_backward(
    _grad_out: torch.Tensor, _grad_lse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:  # noqa: ARG001 - torch's names
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _backward(
    ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor | None = None
) -> tuple[torch.Tensor | None, ...]:
    gradients = torch.ops.surgeon.attention_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest)
    return *gradients, *[None] * (2 + len(ctx.rest))


def _no_backward(expected: str, got: str) -> Callable[..., None]:
    def refuse(_ctx: Any, *_gradients: torch.Tensor) -> None:
        raise PatchError("surgeon.attention", expected, got, WITHOUT_GRADIENTS)

    return refuse


def _under_autocast(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The op on q, k and v in autocast's dtype, as torch's own attention: models pass mixed dtypes under autocast."""

    def cast_and_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return op(q.to(dtype), k.to(dtype), v.to(dtype), *rest)

    return cast_and_call


for _key in ("CPU", "CUDA"):  # "CUDA" is also torch's key for HIP devices
    _LIBRARY.impl("attention", without_tangents(_attention), _key)
    _LIBRARY.impl("attention_with_lse", without_tangents(_attention_with_lse), _key)
    _LIBRARY.impl("attention_backward", without_tangents(_attention_backward), _key)
_LIBRARY.impl("attention_paged", without_tangents(_attention_paged), "CPU")
_LIBRARY.impl("attention_rotary", without_tangents(_attention_rotary), "CPU")
for _name, _fake in (
    ("attention", _fake_attention),
    ("attention_with_lse", _fake_attention_with_lse),
    ("attention_paged", _fake_attention),
    ("attention_rotary", _fake_attention),
    ("attention_backward", _fake_attention_backward),
):
    torch.library.register_fake(f"surgeon::{_name}", _fake, lib=_LIBRARY)
for _name in ("attention", "attention_with_lse"):
    torch.library.register_autograd(f"surgeon::{_name}", _backward, setup_context=_save_for_backward, lib=_LIBRARY)
    transformable(_name, _save_for_backward, _backward)
    for _device in ("cpu", "cuda"):
        _op = getattr(torch.ops.surgeon, _name).default
        _LIBRARY.impl(_name, _under_autocast(_op, _device), f"Autocast{_device.upper()}")
# Without these, autograd would silently drop the gradients.
for _name, _expected, _got in (
    ("attention_paged", "a forward pass only", "a call of backward"),
    ("attention_rotary", "a forward pass only", "a call of backward"),
    ("attention_backward", "first derivatives only", "a backward pass through a backward pass"),
):
    _refuse = _no_backward(_expected, _got)
    torch.library.register_autograd(f"surgeon::{_name}", _refuse, lib=_LIBRARY)
    if _name == "attention_backward":
        transformable(_name, lambda *_: None, _refuse)
    else:
        untransformable(_name)
