"""Attention sites, the attention modules of a model, and the attention function that patched ones call.

Source: `transformers.modeling_utils`, AttentionInterface and the arguments that attention modules pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import eager_mask, sdpa_mask

from surgeon.runtime.errors import PatchError, short_repr
from surgeon.runtime.kernels.cpu.direct import DirectCall
from surgeon.runtime.loading import Package
from surgeon.runtime.operands import Operands
from surgeon.runtime.ops.attention import attention as attend_with
from surgeon.runtime.ops.attention import may_go_directly
from surgeon.runtime.transformers import masks, recall
from surgeon.runtime.transformers.config_view import is_view
from surgeon.runtime.transformers.layers import IMPLEMENTATIONS, own_attention
from surgeon.runtime.transformers.paged_layer import PagedStates

_ATTRIBUTE = "_surgeon_site"
_OWN_MASKS: dict[str, masks.MaskFunction] = {"sdpa": sdpa_mask, "eager": eager_mask}
# Arguments that modules pass along but that do not change the attention itself.
_HARMLESS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict", "num_items_in_batch"}
)


@dataclass(frozen=True)
class Site:
    """The binding of a full-attention layer's attention module in a patched model.

    It keeps `package` loaded; None means that the package does not cover the layer, which then attends as before.
    `dense_rows`, in tokens, are those at a prompt's end that read every block; 0 leaves all to the topology. `direct`
    is the layer's call without Python, if there is one.
    """

    package: Package | None
    layer: int
    dense_rows: int
    direct: DirectCall | None = None


def bind(module: torch.nn.Module, site: Site) -> None:
    """Binds an attention module, so that its calls go to the package's kernels."""
    setattr(module, _ATTRIBUTE, site)


def release(module: torch.nn.Module) -> None:
    """Undoes `bind`."""
    delattr(module, _ATTRIBUTE)


def is_bound(module: torch.nn.Module) -> bool:
    """True if the module is bound by `bind`."""
    return hasattr(module, _ATTRIBUTE)


def runs_kernel(module: torch.nn.Module) -> bool:
    """True if the module's attention is a kernel of a package."""
    site: Site | None = getattr(module, _ATTRIBUTE, None)
    return site is not None and site.package is not None


def register() -> None:
    """Makes our attention and mask functions known to Transformers; repeated calls do no harm."""
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

    query is `[batch, heads, queries, head_dim]`, key and value are `[batch, KV heads, keys, head_dim]`,
    `attention_mask` comes from our mask function; the output is `[batch, queries, heads, head_dim]`. Kernels return no
    attention weights.

    Raises:
        PatchError: the module is not bound, or asks for something that the kernels do not do; nothing is silently
            ignored.
    """
    site: Site | None = getattr(module, _ATTRIBUTE, None)
    if site is None or site.package is None:
        # Not covered, or part of another model that was made from a patched model's config.
        config = cast(PreTrainedConfig, module.config)
        if site is None and not is_view(config):
            raise PatchError(
                type(module).__name__,
                "an attention module bound to a kernel package",
                "one that is not",
                "call surgeon.runtime.patch instead of choosing the attention by name",
            )
        own = "eager" if config._attn_implementation == IMPLEMENTATIONS["eager"] else "sdpa"
        mask = masks.dense(attention_mask, query, key, _OWN_MASKS[own])
        attend = cast(Callable[..., tuple[torch.Tensor, torch.Tensor | None]], own_attention(module, own))
        return attend(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **extras)
    if dropout > 0.0:
        raise PatchError(_where(site), "no dropout", f"dropout {dropout}", "call model.eval()")
    if is_causal is False:
        raise PatchError(_where(site), "causal attention", "is_causal=False", "unpatch the model for such calls")
    for name, extra in extras.items():
        if name not in _HARMLESS and extra is not None and extra is not False:
            raise PatchError(
                _where(site),
                "plain causal attention",
                f"{name}={short_repr(extra, 40)}",
                f"call the model without {name}, or unpatch it for such calls",
            )
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    placed = masks.known(attention_mask)
    # From here to the kernel a short call's time is that of the Python in between, in a model many times what it looks.
    if placed is not None and site.direct is not None and type(key) is not PagedStates and may_go_directly():
        position, cache_leftpad, keys, ahead = placed
        out = site.direct(query, key, value, position, cache_leftpad, scale, site.dense_rows, ahead, keys)
        if out is not None:
            return out, None
    if placed is None or placed.keys != key.shape[2]:
        placed = _place(attention_mask, extras.get("position_ids"), query.shape[2], key.shape[2])
    rest = (placed.position, placed.cache_leftpad, scale, site.dense_rows, placed.tokens_ahead)
    if isinstance(key, PagedStates) and value is key:
        return key.layer.attend(Operands(query, key.new_keys, key.new_values, *rest), site.package), None
    return attend_with(site.package.kernels, site.layer, Operands(query, key, value, *rest)), None


def _where(site: Site) -> str:
    return f"attention of layer {site.layer}"


def _place(mask: object, position_ids: object, queries: int, keys: int) -> masks.Placed:
    """Reads and checks a layer's placement, for the other layers of its forward pass too."""
    position, cache_leftpad = pair = masks.unpack(mask, keys)
    masks.check_positions(position_ids, queries, pair)
    placed = masks.Placed(position, cache_leftpad, keys, recall.tokens_ahead(position, queries))
    masks.keep(mask, placed)
    return placed
