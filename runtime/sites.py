"""Attention sites: the modules of a model that attend, and the attention function that a patched one calls.

Source: `transformers.modeling_utils`, AttentionInterface and the arguments that attention modules give.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from surgeon.runtime import masks, ops
from surgeon.runtime.errors import PatchError, shown
from surgeon.runtime.loading import Package

IMPLEMENTATION = "surgeon"
"""The name of our attention in `config._attn_implementation`."""

_ATTRIBUTE = "_surgeon_site"
# What modules pass along that changes nothing about attention itself.
_HARMLESS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict", "num_items_in_batch"}
)


@dataclass(frozen=True)
class Site:
    """What a patched attention module is bound to: a layer of a loaded package, which it keeps loaded."""

    package: Package
    layer: int


def find(model: torch.nn.Module) -> tuple[tuple[str, torch.nn.Module], ...]:
    """The model's attention modules and their names, in the order of the modules.

    Known by what every decoder's attention in Transformers has: a layer's index and whether it is causal.
    """
    return tuple(
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal")
    )


def bind(module: torch.nn.Module, site: Site) -> None:
    """Binds an attention module, whose calls then go to the package's kernels."""
    setattr(module, _ATTRIBUTE, site)


def release(module: torch.nn.Module) -> None:
    """Undoes `bind`."""
    delattr(module, _ATTRIBUTE)


def is_bound(module: torch.nn.Module) -> bool:
    """Whether the module is bound to a package."""
    return hasattr(module, _ATTRIBUTE)


def register() -> None:
    """Makes our attention and mask functions known to Transformers; again is no harm."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, masks.placement)


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
) -> tuple[torch.Tensor, None]:
    """The attention function "surgeon" of Transformers.

    query `[batch, heads, queries, head_dim]`, key and value `[batch, KV heads, keys, head_dim]`, `attention_mask` from
    our mask function; the output is `[batch, queries, heads, head_dim]`, and there are no attention weights to give.

    Raises:
        PatchError: the module is not bound, or asks for what the kernels do not do; nothing is dropped silently.
    """
    site: Site | None = getattr(module, _ATTRIBUTE, None)
    if site is None:
        raise PatchError(
            type(module).__name__,
            "an attention module bound to a kernel package",
            "one that is not",
            f"call surgeon.runtime.patch instead of choosing the attention {IMPLEMENTATION!r} by name",
        )
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
    output = ops.attention(site.package, site.layer, query, key, value, position, first_key, scale)
    return output, None
