"""The fingerprint of a model's frozen weights: equal if and only if the weights are equal, bit for bit."""

import hashlib

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from surgeon.runtime.transformers.offload import fetched


def fingerprint(model: torch.nn.Module) -> str:
    """The SHA-256 of the model's parameters, as 64 lower-case hexadecimal digits.

    The hashed text is UTF-8 and has one line per parameter, sorted by name (by code point), with tied parameters under
    each of their names: `name dtype shape digest` and a line feed. dtype is PyTorch's name without "torch.", shape is
    the sizes joined by "x" (empty for a scalar), and digest is the SHA-256 of the elements' little-endian bytes in
    row-major order. Strides, device, requires_grad and buffers do not count. A traced model has the fingerprint of its
    original, and so has one that is offloaded, or sharded over processes, each of which must call this. A quantised
    weight that is a tensor subclass counts by the tensors that it is made of.

    Raises:
        ModelError: a parameter is not in memory (the meta device).
    """
    digests: dict[int, str] = {}  # tied parameters are one tensor, hashed once
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in digests:
            digests[id(parameter)] = _digest(fetched(model, name) if parameter.is_meta else parameter)
        dtype = str(parameter.dtype).removeprefix("torch.")
        shape = "x".join(map(str, parameter.shape))
        total.update(f"{name} {dtype} {shape} {digests[id(parameter)]}\n".encode())
    return total.hexdigest()


def _digest(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if is_traceable_wrapper_subclass(whole):
        parts, _ = whole.__tensor_flatten__()
        made_of = (f"{part} {_digest(getattr(whole, part))}\n" for part in parts)
        return hashlib.sha256("".join(made_of).encode()).hexdigest()
    flat = whole.detach().to(device="cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
