"""Attention sites: the modules of a model that attend, and the attention function that a patched one calls.

Source: `transformers.modeling_utils`, AttentionInterface and the arguments that attention modules give.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import eager_mask, sdpa_mask

from surgeon.runtime.errors import PatchError, short_repr
from surgeon.runtime.loading import Package
from surgeon.runtime.operands import Operands
from surgeon.runtime.ops.attention import attention as attend_with
from surgeon.runtime.transformers import masks
from surgeon.runtime.transformers.config_view import is_view
from surgeon.runtime.transformers.layers import IMPLEMENTATIONS, own_attention
from surgeon.runtime.transformers.paged_layer import PagedStates

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
    config = cast(PreTrainedConfig, module.config)
    if site is None and not is_view(config):
        raise PatchError(
            type(module).__name__,
            "an attention module bound to a kernel package",
            "one that is not",
            "call surgeon.runtime.patch instead of choosing the attention by name",
        )
    if (
        site is None or site.package is None
    ):  # not covered, or of another model that was made from a patched one's config
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
                f"{name}={short_repr(extra, 40)}",
                f"call the model without {name}, or unpatch it for such calls",
            )
    position, cache_leftpad = masks.unpack(attention_mask, key.shape[2])
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if isinstance(key, PagedStates) and value is key:
        operands = Operands(query, key.new_keys, key.new_values, position, cache_leftpad, scale)
        return key.layer.attend(operands, site.package), None
    operands = Operands(query, key, value, position, cache_leftpad, scale)
    return attend_with(site.package.kernels, site.layer, operands), None
