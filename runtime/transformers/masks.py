"""The mask of a patched model, which gives each sequence's position; the kernels know the visible pairs themselves.

Transformers calls a mask function once per forward pass for each layer type, and passes the result to every layer of
that type as `attention_mask`. Ours returns an int64 *placement* `[batch, 1, 2, keys]`: the position of the first query
and the first valid key, repeated along the keys (without taking memory), so that its shape tells the number of keys
that it was made for. Every real mask there is bool or float.

Source: `transformers.masking_utils`, AttentionMaskInterface and the arguments that create_causal_mask passes.
"""

from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import causal_mask_function

from surgeon.runtime.errors import PatchError
from surgeon.runtime.ops import input_checks
from surgeon.runtime.ops.plain_inference import is_traced, is_transformed

MaskFunction = Callable[..., torch.Tensor | None]
"""The type of the functions in Transformers' AttentionMaskInterface."""


def beside(own: MaskFunction) -> MaskFunction:
    """The mask function of a patched model: placements, but masks by `own` for layers that no kernel runs.

    Those are sliding and chunked layers, the only ones with a `local_size`.
    """

    def mask(*, local_size: int | None = None, **arguments: Any) -> torch.Tensor | None:
        return placement(**arguments) if local_size is None else own(local_size=local_size, **arguments)

    return mask


def placement(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None,
    device: torch.device,
    **_unused: Any,
) -> torch.Tensor:
    """Makes a placement, int64 `[batch, 1, 2, keys]` (see the module), from the arguments of a mask function.

    Raises:
        PatchError: the model asks for anything other than plain causal attention over all keys so far.
    """
    if is_traced():  # it would keep this call's sizes and positions as constants
        raise PatchError(
            "torch.jit.trace",
            "a graph that holds for other inputs",
            "a tracer of one call",
            "use surgeon.runtime.trace(model, package), torch.export or torch.compile",
        )
    if mask_function is not causal_mask_function:
        raise PatchError(
            "mask",
            "plain causal attention",
            f"{getattr(mask_function, '__qualname__', 'another mask')}: sliding, packed, bidirectional or overlaid",
            "pass an attention_mask and no packed position_ids, or unpatch the model for such calls",
        )
    if kv_offset != 0:
        raise PatchError(
            "past_key_values",
            "a cache that holds every token since the first",
            f"one whose first key is token {kv_offset}",
            "use a DynamicCache or StaticCache without a sliding window",
        )
    if isinstance(q_offset, torch.Tensor):
        position = q_offset.to(device=device, dtype=torch.int64).expand(batch_size)
    else:
        position = torch.full((batch_size,), q_offset, dtype=torch.int64, device=device)
    if attention_mask is None:
        cache_leftpad = torch.zeros_like(position)
    elif attention_mask.ndim == 2 and attention_mask.shape[1] > kv_length:
        raise PatchError(
            "attention_mask",
            f"at most {kv_length} keys, as there are",
            f"{attention_mask.shape[1]}",
            "pass the cache that the mask belongs to",
        )
    elif attention_mask.ndim == 2:
        if isinstance(q_offset, int) and attention_mask.shape[1] < q_offset + q_length:
            raise input_checks.too_short(attention_mask, batch_size, q_offset + q_length)
        cache_leftpad = input_checks.cache_leftpad(attention_mask, position, q_length)
    else:
        raise PatchError(
            "attention_mask",
            "two dimensions [batch, keys]",
            f"{attention_mask.ndim} dimensions",
            "pass 1 for tokens and 0 for padding on the left",
        )
    # The stack copies: a static cache goes on counting in the tensor that it passes as the offset.
    pair = torch.stack((position, cache_leftpad), dim=1)
    return pair[:, None, :, None].expand(batch_size, 1, 2, kv_length)


def unpack(mask: object, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The position of the first query and the first valid key, each int64 `[batch]`, from a layer's placement.

    Raises:
        PatchError: the mask is not a placement, or was made for another number of keys.
    """
    if mask is None:
        raise PatchError(
            "attention_mask",
            "the placement that the model makes in its forward",
            "None",
            "call the model, not one of its layers",
        )
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.int64 or mask.ndim != 4 or mask.shape[2] != 2:
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise PatchError(
            "attention_mask",
            "a mask of two dimensions [batch, keys]",
            f"a mask of its own: {got}",
            "pass 1 for tokens and 0 for padding on the left, or unpatch the model for such calls",
        )
    if mask.shape[3] != num_keys:
        raise PatchError(
            "attention_mask",
            f"{num_keys} keys, as the layer has",
            f"{mask.shape[3]}",
            "pass the cache that the mask belongs to, and one whose layers have equal lengths",
        )
    position, cache_leftpad = mask[..., 0].squeeze(1).unbind(dim=1)
    return position, cache_leftpad


class Placed(NamedTuple):
    """The content of a placement: the position of the first query and the first valid key, each int64 `[batch]`.

    `keys` is the number of keys that it was made for, `tokens_ahead` the prompt's tokens that later calls bring.
    """

    position: torch.Tensor
    cache_leftpad: torch.Tensor
    keys: int
    tokens_ahead: int


_KEPT = "_surgeon_placed"


def known(mask: object) -> Placed | None:
    """Finds what another layer of a forward pass has read of its placement; None in compiled graphs."""
    return None if is_dynamo_compiling() else getattr(mask, _KEPT, None)


def keep(mask: object, placed: Placed) -> None:
    """Keeps what a layer has read of a placement, and checked, for the others of its forward pass."""
    if not (torch.compiler.is_compiling() or is_traced() or is_transformed()):
        # Copies: a placement that held views of itself would never be freed.
        pair = placed.position.clone(), placed.cache_leftpad.clone()
        setattr(mask, _KEPT, Placed(*pair, placed.keys, placed.tokens_ahead))


def check_positions(position_ids: object, queries: int, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Refuses tokens that stand further on than their cache reaches, since others have taken keys out of it.

    `position_ids` `[batch or 1, queries]` are the model's own, and may or may not count padding on the left; `pair`
    comes from `unpack`. Tokens that start a cache may stand anywhere. On a GPU the check is made without waiting for
    it; in compiled and exported graphs it is left out.

    Raises:
        PatchError: the cache holds fewer keys than the positions say.
    """
    if not isinstance(position_ids, torch.Tensor) or position_ids.ndim != 2 or position_ids.shape[1] != queries:
        return
    if torch.compiler.is_compiling() or is_traced() or is_transformed():
        return
    position, cache_leftpad = pair
    last, end = position_ids[:, -1], position + queries
    fits = (last < end - cache_leftpad) | (last == end - 1) | (position == 0) | (cache_leftpad >= end)
    if fits.device.type != "cpu":
        torch._assert_async(fits.all(), str(PatchError("position_ids", *_EVICTED)))
    elif not bool(fits.all()):
        row = int(fits.long().argmin())
        expected = f"at most {int(end[row]) - 1}, since the cache holds {int(position[row])} keys"
        given = int(last.expand(len(fits))[row])
        raise PatchError(f"position_ids[{row}, -1]", expected, str(given), _EVICTED[2])


_EVICTED = (
    "positions that the cache reaches",
    "later ones: keys were taken out of it",
    "keep every key (a SurgeonCache drops those that are not read), or unpatch the model",
)


def dense(mask: object, query: torch.Tensor, key: torch.Tensor, own: MaskFunction) -> torch.Tensor | None:
    """The mask that `own` makes for full attention, for a layer without a kernel that was given a placement.

    Raises:
        PatchError: as `unpack`.
    """
    if not isinstance(mask, torch.Tensor) or torch.compiler.is_compiling():
        return _dense(mask, query, key, own)
    made = _MADE.setdefault(mask, {})
    wanted = own, query.shape[2], key.shape[2], query.dtype
    if wanted not in made:
        made[wanted] = _dense(mask, query, key, own)
    return made[wanted]


# A forward pass gives all its layers one placement; the mask made from it is kept as long as the placement.
_MADE: MutableMapping[torch.Tensor, dict[object, torch.Tensor | None]] = WeakTensorKeyDictionary()


def _dense(mask: object, query: torch.Tensor, key: torch.Tensor, own: MaskFunction) -> torch.Tensor | None:
    queries, keys = query.shape[2], key.shape[2]
    position, cache_leftpad = unpack(mask, keys)
    column = torch.arange(keys, device=position.device)
    return own(
        batch_size=position.shape[0],
        q_length=queries,
        kv_length=keys,
        q_offset=position[0],  # the same for all sequences, as Transformers counts it
        attention_mask=(column >= cache_leftpad[:, None]) & (column < position[:, None] + queries),
        dtype=query.dtype,
        device=position.device,
    )
