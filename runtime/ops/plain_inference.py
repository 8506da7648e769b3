"""Detects calls of attention that may bypass torch's dispatcher, which takes longer than a short kernel."""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad


def _hook(path: str) -> Callable[[], object] | None:
    """A function in `torch._C`, or None if this version of torch has no such private function."""
    found: object = torch._C
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if callable(found) else None


_HOOKS = tuple(
    map(
        _hook,
        (
            "_len_torch_dispatch_stack",
            "_are_functorch_transforms_active",
            "_get_tracing_state",
            "_autograd._profiler_enabled",
        ),
    )
)
"""Torch's tests for active modes, function transforms, tracer and profiler; private, so they are looked up once."""

_IS_TRANSFORMED = _hook("_are_functorch_transforms_active")
_TRACER = _hook("_get_tracing_state")


def is_traced() -> bool:
    """True while `torch.jit.trace` records."""
    return _TRACER is not None and _TRACER() is not None


def is_transformed() -> bool:
    """True inside of a transform of `torch.func`, such as grad or vmap."""
    return _IS_TRANSFORMED is not None and bool(_IS_TRANSFORMED())


def is_plain_inference(*tensors: torch.Tensor) -> bool:
    """True if nothing that hooks into torch's dispatcher needs to see a call; False if torch cannot tell."""
    return not (
        torch.compiler.is_compiling()
        or tensors[0].is_meta
        or forward_ad._current_level >= 0  # tensors may have tangents
        or torch.is_autocast_enabled(tensors[0].device.type)
        or any(hook is None or hook() for hook in _HOOKS)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or any(type(tensor) is not torch.Tensor for tensor in tensors)
    )
