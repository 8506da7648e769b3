"""The dtype of a model's queries, keys and values, which quantised weights are not stored in.

A quantised layer stores integers or eight-bit floats and returns the dtype of its input or one of its own, so its
weights tell nothing: it is called once, with one token of zeros.
"""

from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from surgeon.runtime.errors import PatchError, short_repr
from surgeon.runtime.transformers.offload import running_device

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj")
_NORMS = ("input_layernorm", "operator_norm")
"""The names that decoder layers give the norm before their attention; LFM2 has the second."""


def computed_dtypes(model: PreTrainedModel, name: str) -> Iterator[tuple[str, torch.dtype]]:
    """Yields the name of each projection of the attention module `name` and the dtype of its output.

    A projection may be fused. Of a module without any of the usual names, all weights count.

    Raises:
        PatchError: a quantised projection cannot be called.
    """
    module = model.get_submodule(name)
    found = [(f"{name}.{child}", layer) for child, layer in module.named_children() if child in _PROJECTIONS]
    if not found:
        yield from ((f"{name}.{path}", weight.dtype) for path, weight in module.named_parameters())
    for path, projection in found:
        stored = _plain_dtype(projection, torch.nn.Linear)
        yield path, _called(path, projection, _entering_dtype(model, name), model) if stored is None else stored


def _plain_dtype(layer: torch.nn.Module, kind: type[torch.nn.Module]) -> torch.dtype | None:
    """The dtype of a layer of torch's own `kind` over plain weights, which is also that of its output; else None."""
    weight = getattr(layer, "weight", None)
    if type(layer) is not kind or not isinstance(weight, torch.Tensor):
        return None
    plain = isinstance(weight, DTensor) or type(weight) in (torch.Tensor, torch.nn.Parameter)
    return weight.dtype if plain and weight.is_floating_point() and weight.itemsize > 1 else None


def _entering_dtype(model: PreTrainedModel, name: str) -> torch.dtype:
    """The dtype of the hidden states that enter an attention module: that of embeddings, after the layer's norm."""
    embedding = model.get_input_embeddings()
    dtype = _plain_dtype(embedding, torch.nn.Embedding)
    if dtype is None:
        dtype = _called("the embedding", embedding, torch.int64, model)
    layer = model.get_submodule(name.rpartition(".")[0])
    for child in _NORMS:
        if (norm := getattr(layer, child, None)) is not None:
            return _called(f"the {child} of {name}", norm, dtype, model)
    return dtype


@torch.no_grad()
def _called(path: str, layer: torch.nn.Module, dtype: torch.dtype, model: PreTrainedModel) -> torch.dtype:
    """The dtype of a layer's output for one token: of zeros, or of token 0 if the layer takes integers."""
    width = getattr(layer, "in_features", None) or model.config.hidden_size
    shape = (1, 1, width) if dtype.is_floating_point else (1, 1)
    device = running_device(layer)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # an adapter may have dropout
            output: torch.Tensor = layer(torch.zeros(shape, dtype=dtype, device=device))
    except Exception as error:  # a library's own layers raise whatever they like
        raise PatchError(
            path,
            f"a layer that takes {dtype} on {device}",
            f"{type(error).__name__}: {short_repr(str(error), 100)}",
            "make the model itself run there first; or patch it, then quantise it",
        ) from error
    return output.dtype
