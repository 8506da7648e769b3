"""Two hashes of a model's weights: a fingerprint of every bit, and an identity that outlives a change of dtype.

The fingerprint shows that weights have not changed. A topology records the identity, since the model that it was
learned on may be loaded in another dtype, quantised, or with adapters on top.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from surgeon.runtime.transformers.offload import fetched

_HALF = 32  # hexadecimal digits
_UNTOLD = "f" * _HALF
NOTHING_TOLD = 2 * _UNTOLD
"""The identity of weights that are all quantised, which is the same as any."""

SIGNS = 2**20
"""The signs of each parameter that count: so 7 billion weights take seconds, and rows that are added later do not."""

Reader = Callable[[str], torch.Tensor | None]
"""Gives the first `SIGNS` elements or more of the parameter of a name; None if it is quantised, or not there."""

_ADAPTED = ("base_layer", "original_module")  # where PEFT's layers keep the module that they stand for
_PLAIN = (torch.Tensor, torch.nn.Parameter, DTensor)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)


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


def weights_id(model: PreTrainedModel, read: Reader | None = None) -> str:
    """The identity of the model's weights, as 64 lower-case hexadecimal digits: the same in fp32, bf16 and fp16.

    It is made of signs, which no rounding changes. Digits 1 to 32 are of the input embedding, digits 33 to 64 of all
    parameters; each half begins a SHA-256. The embedding's is that of its signs: a bit for each of its first 2**20
    elements in row-major order, 1 if negative, eight in a byte with the first one highest. The other's is that of a
    line for each parameter, sorted and named as in `fingerprint`: `name digest` and a line feed, where digest is the
    SHA-256 of its signs. Adapters that PEFT put into the model do not count. Quantised weights have lost their signs: a
    half that needs them is 32 times f. Sharded and offloaded models are taken as by `fingerprint`. `read` gives the
    parameters of a model that is itself on the meta device.

    Raises:
        ModelError: a parameter is not in memory (the meta device), and there is no `read`.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    path = names[id(embedding)] + "."
    words = _signs(model, _originals(embedding, path, path), read)
    every = _signs(model, _originals(model, "", ""), read) if not _has_packed_buffers(model) else None
    lines = None if every is None else "".join(f"{name} {digest}\n" for name, digest in sorted(every.items()))
    halves = (
        next(iter(words.values())) if words else _UNTOLD,
        _UNTOLD if lines is None else hashlib.sha256(lines.encode()).hexdigest(),
    )
    return "".join(half[:_HALF] for half in halves)


def stored_weights_id(config: PreTrainedConfig, read: Reader) -> str:
    """The `weights_id` of a model of this config whose parameters are stored elsewhere, tied ones under any name."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    def read_any(path: str) -> torch.Tensor | None:
        found = map(read, names[id(model.get_parameter(path))])
        return next((tensor for tensor in found if tensor is not None), None)

    return weights_id(model, read_any)


def are_weights(model: PreTrainedModel, expected: str) -> bool:
    """True if the model's weights are those of an identity, as far as both tell, or of a fingerprint."""
    found = weights_id(model)
    if same_weights(found, expected):
        return True
    return _UNTOLD not in (found[_HALF:], expected[_HALF:]) and fingerprint(model) == expected


def same_weights(found: str, expected: str) -> bool:
    """True if two identities are of the same weights, as far as both tell."""
    halves = ((found[:_HALF], expected[:_HALF]), (found[_HALF:], expected[_HALF:]))
    return all(one == other or _UNTOLD in (one, other) for one, other in halves)


def _originals(module: torch.nn.Module, path: str, name: str) -> Iterator[tuple[str, str]]:
    """The paths of the parameters below a module, without adapters, and the names that they have without adapters."""
    for adapted in _ADAPTED:
        if (inner := module._modules.get(adapted)) is not None:
            yield from _originals(inner, f"{path}{adapted}.", name)
            return
    yield from ((path + own, name + own) for own, parameter in module._parameters.items() if parameter is not None)
    for own, child in module._modules.items():
        if child is not None:
            yield from _originals(child, f"{path}{own}.", f"{name}{own}.")


def _signs(model: torch.nn.Module, parameters: Iterable[tuple[str, str]], read: Reader | None) -> dict[str, str] | None:
    """The digest of each parameter's signs, by its name; None if one of them is quantised."""
    digests: dict[int, str] = {}
    found: dict[str, str] = {}
    for path, name in sorted(parameters, key=lambda each: each[1]):
        parameter = model.get_parameter(path)
        if type(parameter) not in _PLAIN or type(parameter.data) not in _PLAIN or parameter.dtype not in _FLOATS:
            return None
        if id(parameter) not in digests:
            tensor = read(path) if read else fetched(model, path) if parameter.is_meta else parameter
            if tensor is None:
                return None
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            negative = torch.signbit(whole.detach().reshape(-1)[:SIGNS]).cpu().numpy()
            digests[id(parameter)] = hashlib.sha256(np.packbits(negative).tobytes()).hexdigest()
        found[name] = digests[id(parameter)]
    return found


def _has_packed_buffers(model: torch.nn.Module) -> bool:
    """True if weights are packed into buffers, as GPTQ and AWQ do, and so are no parameters."""
    return any(buffer.dtype in _PACKED and buffer.dim() > 1 for buffer in model.buffers())


def _digest(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if is_traceable_wrapper_subclass(whole):
        parts, _ = whole.__tensor_flatten__()
        made_of = (f"{part} {_digest(getattr(whole, part))}\n" for part in parts)
        return hashlib.sha256("".join(made_of).encode()).hexdigest()
    flat = whole.detach().to(device="cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
