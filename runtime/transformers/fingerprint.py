"""The fingerprint of a model's frozen weights: equal iff the weights are, to the bit."""

import hashlib

import torch
from torch.distributed.tensor import DTensor

from surgeon.runtime.transformers.offload import fetched


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of the model's parameters, as 64 lower-case hexadecimal digits.

    Hashed is one line of UTF-8 text a parameter, in the order of the names (by code point), tied ones under each of
    their names: `name dtype shape digest` and a line feed. dtype is PyTorch's name without "torch.", shape is the
    sizes joined by "x" (empty for a scalar), digest the SHA-256 of the elements' bytes in row-major order, as a
    little-endian machine has them. Strides, device and requires_grad do not count, nor do buffers. A traced model has
    the fingerprint of its model, and so has one that is offloaded, or sharded over processes, each of which must call
    this.

    Raises:
        ModelError: a parameter is not in memory (the meta device).
    """
    digests: dict[int, str] = {}  # tied parameters are one tensor, which is hashed once
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
    flat = whole.detach().to(device="cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
