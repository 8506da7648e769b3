"""The attention modules of a Transformers model: their layers, layer types and own attention functions.

Source: `transformers.cache_utils` for layer types, `transformers.modeling_utils` for attention functions.
"""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IMPLEMENTATIONS = {"sdpa": "surgeon", "eager": "surgeon_eager"}
"""The names of our attention in `config._attn_implementation`, by that of the attention in layers without a kernel."""

FULL = "full_attention"
"""The layer type, as Transformers names it, of the layers that kernels can run."""


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
