"""The attention modules of a Transformers model: their layers, layer types, own attention functions and dtypes.

A quantised layer stores integers or eight-bit floats and returns the dtype of its input or one of its own, so its
weights do not tell the dtype of queries, keys and values: it is called once, with one token of zeros.

Source: `transformers.cache_utils` for layer types, `transformers.modeling_utils` for attention functions.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from surgeon.runtime.errors import PatchError, short_repr
from surgeon.runtime.transformers.offload import running_device

IMPLEMENTATIONS = {"sdpa": "surgeon", "eager": "surgeon_eager"}
"""The names of our attention in `config._attn_implementation`, by that of the attention in layers without a kernel."""

FULL = "full_attention"
"""The layer type, as Transformers names it, of the layers that kernels can run."""

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj")
_NORMS = ("input_layernorm", "operator_norm")
"""The names that decoder layers give the norm before their attention; LFM2 has the second."""


def layer_type(config: PreTrainedConfig, layer: int) -> str:
    """The type of a layer, as Transformers names it: FULL, "sliding_attention", "linear_attention" and so on.

    Source: `transformers.cache_utils`, which makes a cache's layers by the same rules.
    """
    types = getattr(config, "layer_types", None)
    if types is not None:
        return str(types[layer]) if layer < len(types) else FULL
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    return FULL if getattr(config, "attention_chunk_size", None) is None else "chunked_attention"


def find_attention(model: torch.nn.Module) -> tuple[tuple[str, torch.nn.Module], ...]:
    """The model's attention modules and their names, in the order of the modules.

    They are recognized by two attributes of every decoder's attention in Transformers: the layer's index and whether
    it is causal.
    """
    return tuple(
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal")
    )


def layer_of(module: torch.nn.Module) -> int:
    """The index of an attention module's layer."""
    return cast(int, module.layer_idx)


def own_attention(module: torch.nn.Module, implementation: str) -> Callable[..., Any] | None:
    """The attention function that a module calls under "sdpa" or "eager"; None under any other, or if it has none."""
    if implementation == "eager":  # in none of Transformers' registries: it is defined beside the module's class
        names: dict[str, Any] = inspect.unwrap(type(module).forward).__globals__
        return names.get("eager_attention_forward")
    return cast(Callable[..., Any], sdpa_attention_forward) if implementation == "sdpa" else None


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
