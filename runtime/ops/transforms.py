"""The ops under the transforms of `torch.func` and under forward-mode differentiation.

`grad`, `vjp`, `jacrev` and `vmap`, also nested, give what the ops give by themselves. Forward mode (`jvp`, `jacfwd`,
`linearize`, `torch.autograd.forward_ad`) is refused: torch would take the tangent of an op that has no rule for zero.

Source: torch's notes "Extending torch.func with autograd.Function".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from surgeon.runtime.errors import PatchError

_LIBRARY = torch.library.Library("surgeon", "FRAGMENT")
Implementation = Callable[..., Any]


def refuse_tangents(*arguments: object) -> None:
    """Refuses tensors that have a tangent.

    Raises:
        PatchError: there is one.
    """
    if forward_ad._current_level >= 0:
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
                raise _no_forward_mode()


def without_tangents(implementation: Implementation) -> Implementation:
    """The implementation of an op, which refuses tensors that have a tangent."""

    def checked(*arguments: Any) -> Any:
        refuse_tangents(*arguments)
        return implementation(*arguments)

    return checked


def transformable(name: str, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Lets `torch.func` transform an op whose tensors all have the batch first; `save` and `backward` are its autograd.

    `backward` may raise what it raises without transforms.
    """
    op = getattr(torch.ops.surgeon, name).default

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            return op(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

        @staticmethod
        def jvp(*_: Any) -> Any:
            raise _no_forward_mode()

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
            return _over_batch(op, info, in_dims, *arguments)

    def apply(first: torch.Tensor, *rest: Any) -> Any:
        device = first.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        cast = [
            argument.to(dtype) if isinstance(argument, torch.Tensor) and argument.is_floating_point() else argument
            for argument in (first, *rest)
        ]
        with torch.autocast(device, enabled=False):
            return Transformed.apply(*cast)  # type: ignore[no-untyped-call]

    # This key comes first while a transform is active, whoever calls the op; Function goes on to the op itself.
    _LIBRARY.impl(name, apply, "FuncTorchDynamicLayerFrontMode")


def untransformable(name: str) -> None:
    """Refuses an op under any transform of `torch.func`."""

    def refuse(*_: Any) -> Any:
        raise PatchError(
            f"surgeon.{name}",
            "a call outside of torch.func's transforms",
            "one inside of grad, vmap or jvp",
            "transform the patched model, not a traced one",
        )

    _LIBRARY.impl(name, refuse, "FuncTorchDynamicLayerFrontMode")


def batched(name: str) -> None:
    """Lets `torch.func.vmap` call an op of no gradients whose tensors all have the batch first."""
    op = getattr(torch.ops.surgeon, name).default
    torch.library.register_vmap(
        f"surgeon::{name}",
        lambda info, in_dims, *arguments: _over_batch(op, info, in_dims, *arguments),
        lib=_LIBRARY,
    )


def _over_batch(op: Callable[..., Any], info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """Calls an op once for all of the mapped dimension, which becomes part of the batch."""
    size = info.batch_size

    def folded(argument: Any, dimension: int | None) -> Any:
        if not isinstance(argument, torch.Tensor):
            return argument
        first = argument.expand(size, *argument.shape) if dimension is None else argument.movedim(dimension, 0)
        return first.flatten(0, 1)

    results = op(*map(folded, arguments, in_dims))
    if isinstance(results, torch.Tensor):
        return results.unflatten(0, (size, -1)), 0
    return tuple(result.unflatten(0, (size, -1)) for result in results), (0,) * len(results)


def _no_forward_mode() -> PatchError:
    return PatchError(
        "surgeon.attention",
        "reverse-mode gradients",
        "a tensor with a tangent (forward mode: jvp, jacfwd, hessian)",
        "use grad, vjp or jacrev, or unpatch the model",
    )
