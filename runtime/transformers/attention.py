"""Attention sites: the modules of a model that attend, and the attention function that a patched one calls.

Source: `transformers.modeling_utils`, AttentionInterface and the arguments that attention modules give.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from surgeon.runtime.errors import PatchError, shown
from surgeon.runtime.loading import Package
from surgeon.runtime.operands import Operands
from surgeon.runtime.ops import attention as ops
from surgeon.runtime.transformers import masks
from surgeon.runtime.transformers.paged_states import PagedStates

IMPLEMENTATIONS = {"sdpa": "surgeon", "eager": "surgeon_eager"}
"""The name of our attention in `config._attn_implementation`, by that of the one in the layers that no kernel runs."""

FULL = "full_attention"
"""The layer type, as Transformers names it, of the layers that kernels can run."""

_ATTRIBUTE = "_surgeon_site"
_OWN_MASKS: dict[str, masks.MaskFunction] = {"sdpa": sdpa_mask, "eager": eager_mask}
# What modules pass along that changes nothing about attention itself.
_HARMLESS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict", "num_items_in_batch"}
)


@dataclass(frozen=True)
class Site:
    """What an attention module of a full-attention layer is bound to in a patched model.

    `package` is kept loaded; None where it does not cover the layer, which then attends as it did before.
    """

    package: Package | None
    layer: int


def layer_type(config: PreTrainedConfig, layer: int) -> str:
    """What a layer attends to, in Transformers' words: FULL, "sliding_attention", "linear_attention" and so on.

    Source: `transformers.cache_utils`, which makes a cache's layers by the same rules.
    """
    types = getattr(config, "layer_types", None)
    if types is not None:
        return str(types[layer]) if layer < len(types) else FULL
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    return FULL if getattr(config, "attention_chunk_size", None) is None else "chunked_attention"


def find(model: torch.nn.Module) -> tuple[tuple[str, torch.nn.Module], ...]:
    """The model's attention modules and their names, in the order of the modules.

    Known by what every decoder's attention in Transformers has: a layer's index and whether it is causal.
    """
    return tuple(
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal")
    )


def layer_of(module: torch.nn.Module) -> int:
    """The layer that an attention module is in."""
    return cast(int, module.layer_idx)


def bind(module: torch.nn.Module, site: Site) -> None:
    """Binds an attention module, whose calls then go to the package's kernels."""
    setattr(module, _ATTRIBUTE, site)


def release(module: torch.nn.Module) -> None:
    """Undoes `bind`."""
    delattr(module, _ATTRIBUTE)


def is_bound(module: torch.nn.Module) -> bool:
    """Whether the module is bound to a package."""
    return hasattr(module, _ATTRIBUTE)


def runs_kernel(module: torch.nn.Module) -> bool:
    """Whether the module's attention is a kernel of a package."""
    site: Site | None = getattr(module, _ATTRIBUTE, None)
    return site is not None and site.package is not None


def own_attention(module: torch.nn.Module, implementation: str) -> Callable[..., Any] | None:
    """The attention function that a module calls under "sdpa" or "eager"; None for any other, or if it has none."""
    if implementation == "eager":  # Transformers has it in no registry: it stands beside the module's class
        names: dict[str, Any] = inspect.unwrap(type(module).forward).__globals__
        return names.get("eager_attention_forward")
    return cast(Callable[..., Any], sdpa_attention_forward) if implementation == "sdpa" else None


def register() -> None:
    """Makes our attention and mask functions known to Transformers; again is no harm."""
    for own, name in IMPLEMENTATIONS.items():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, masks.beside(_OWN_MASKS[own]))


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of a patched model.

    query `[batch, heads, queries, head_dim]`, key and value `[batch, KV heads, keys, head_dim]`, `attention_mask` from
    our mask function; the output is `[batch, queries, heads, head_dim]`, and kernels have no attention weights to give.

    Raises:
        PatchError: the module is not bound, or asks for what the kernels do not do; nothing is dropped silently.
    """
    site: Site | None = getattr(module, _ATTRIBUTE, None)
    if site is None:
        raise PatchError(
            type(module).__name__,
            "an attention module bound to a kernel package",
            "one that is not",
            "call surgeon.runtime.patch instead of choosing the attention by name",
        )
    if site.package is None:
        config = cast(PreTrainedConfig, module.config)
        own = "eager" if config._attn_implementation == IMPLEMENTATIONS["eager"] else "sdpa"
        mask = masks.dense(attention_mask, query, key, _OWN_MASKS[own])
        attend = cast(Callable[..., tuple[torch.Tensor, torch.Tensor | None]], own_attention(module, own))
        return attend(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **extras)
    where = f"attention of layer {site.layer}"
    if dropout > 0.0:
        raise PatchError(where, "no dropout", f"dropout {dropout}", "call model.eval()")
    if is_causal is False:
        raise PatchError(where, "causal attention", "is_causal=False", "unpatch the model for such calls")
    for name, extra in extras.items():
        if name not in _HARMLESS and extra is not None and extra is not False:
            raise PatchError(
                where,
                "plain causal attention",
                f"{name}={shown(extra, 40)}",
                f"call the model without {name}, or unpatch it for such calls",
            )
    position, first_key = masks.unpack(attention_mask, key.shape[2])
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if isinstance(key, PagedStates) and value is key:
        operands = Operands(query, key.new_keys, key.new_values, position, first_key, scale)
        return key.layer.attend(operands, site.package), None
    operands = Operands(query, key, value, position, first_key, scale)
    return ops.attention(site.package, site.layer, operands), None
