"""Checks of the values in a call's inputs.

The checks are on data, so these are torch ops, which exported and compiled graphs contain too. They need no
Transformers, so that a process that only loads a package and a graph has them.
"""

from collections.abc import Sequence
from typing import cast

import torch

from surgeon.runtime.errors import PatchError, short_repr
from surgeon.runtime.ops.transforms import batched

_LIBRARY = torch.library.Library("surgeon", "FRAGMENT")
_LIBRARY.define("cache_leftpad(Tensor attention_mask, Tensor position, SymInt length) -> Tensor")
_LIBRARY.define("valid_keys(Tensor input_ids, Tensor? attention_mask) -> Tensor")
_LIBRARY.define("cache_slots(Tensor input_ids, Tensor position, Tensor kept, Tensor[] caches) -> Tensor")


def cache_leftpad(attention_mask: torch.Tensor, position: torch.Tensor, length: int) -> torch.Tensor:
    """Each sequence's first valid key, int64 `[batch]`; the number of keys so far if it has none yet.

    `attention_mask` `[batch, keys]` is true for valid keys; `position` `[batch]` is the index of the first of `length`
    queries. Padding after the last valid key is accepted: only padding queries come after it.

    Raises:
        PatchError: the mask does not cover the queries, or valid keys lie on both sides of masked ones.
    """
    return cast(torch.Tensor, torch.ops.surgeon.cache_leftpad(attention_mask, position, length))


def _cache_leftpad(attention_mask: torch.Tensor, position: torch.Tensor, length: int) -> torch.Tensor:
    first, runs = _valid_runs(attention_mask, position, length)
    end = int(position.max()) + length
    if attention_mask.shape[1] < end:
        raise too_short(attention_mask, position.shape[0], end)
    if bool((runs > 1).any()):
        raise PatchError(f"attention_mask[{int(runs.argmax())}]", *_HOLE)
    return first


def _cache_leftpad_on_gpu(attention_mask: torch.Tensor, position: torch.Tensor, length: int) -> torch.Tensor:
    """The op `cache_leftpad` without waiting for the device, so that it also runs in a captured graph.

    A fault that raises an error on the CPU triggers a device-side assertion here, which torch reports at a later call.
    """
    first, runs = _valid_runs(attention_mask, position, length)
    short = "attention_mask: expected the cached tokens, then the new ones, got fewer"
    torch._assert_async((position + length <= attention_mask.shape[1]).all(), short)
    torch._assert_async((runs <= 1).all(), str(PatchError("attention_mask", *_HOLE)))
    return first


_HOLE = (
    "valid keys in one run",
    "masked keys between valid ones",
    "pad on the left (padding_side='left'), and mask nothing else",
)


def _valid_runs(attention_mask: torch.Tensor, position: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first valid key of each sequence, and the number of runs of its valid keys, both int64 `[batch]`.

    Raises:
        PatchError: the mask is for another number of sequences.
    """
    if attention_mask.shape[0] != position.shape[0]:
        raise too_short(attention_mask, position.shape[0], length)
    end = (position + length)[:, None]
    column = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    valid = (attention_mask != 0) & (column < end)  # later keys of a static cache are not filled yet
    runs = valid[:, :1].sum(dim=1) + (valid[:, 1:] & ~valid[:, :-1]).sum(dim=1)
    return ((valid.cumsum(dim=1) == 0) & (column < end)).sum(dim=1), runs


def too_short(attention_mask: torch.Tensor, batch: int, end: int) -> PatchError:
    """The error for a mask `[batch, keys]` that ends before a sequence's last new token, or has another batch size."""
    return PatchError(
        "attention_mask",
        f"shape [{batch}, {end}]: a sequence's cached tokens, then the new ones",
        f"shape {list(attention_mask.shape)}",
        "pass the mask of all tokens so far, as generate() does",
    )


def valid_keys(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Marks the tokens that are not padding, bool like `input_ids` `[batch, length]`; all, if no mask is given.

    Raises:
        PatchError: the shapes differ.
    """
    return cast(torch.Tensor, torch.ops.surgeon.valid_keys(input_ids, attention_mask))


def _valid_keys(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    if input_ids.ndim != 2:
        raise PatchError("input_ids", "two dimensions [batch, length]", f"{input_ids.ndim}", "add the batch dimension")
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise PatchError(
            "attention_mask",
            f"shape {list(input_ids.shape)}, as input_ids",
            f"{list(attention_mask.shape)}",
            "pass 1 for every token and 0 for padding on the left",
        )
    return attention_mask != 0


def cache_slots(
    input_ids: torch.Tensor, position: torch.Tensor, kept: torch.Tensor, caches: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The slots of new tokens `[batch, new]` in a cache, int64; each sequence's first is at its `position` `[batch]`.

    `caches` are `[batch, KV heads, capacity, head_dim]` of one batch and capacity, `kept` indices along the new tokens.
    All must be contiguous, which code compiled ahead of time takes for granted.

    Raises:
        PatchError: a tensor has another shape, dtype or layout, or a token would lie outside the cache.
    """
    return cast(torch.Tensor, torch.ops.surgeon.cache_slots(input_ids, position, kept, caches))


def _cache_slots(
    input_ids: torch.Tensor, position: torch.Tensor, kept: torch.Tensor, caches: Sequence[torch.Tensor]
) -> torch.Tensor:
    batch, length = input_ids.shape
    capacity = caches[0].shape[2]
    for name, indices, shape in (
        ("input_ids", input_ids, (batch, length)),
        ("position", position, (batch,)),
        ("kept", kept, (kept.numel(),)),
    ):
        _check_given(name, indices, shape, torch.int64)
    for cache in caches:
        _check_given("cache", cache, (batch, cache.shape[1], capacity, cache.shape[3]), cache.dtype)
    if bool((position < 0).any()) or bool((position + length > capacity).any()):
        raise PatchError(
            "position",
            f"{length} new tokens within the cache's {capacity}",
            f"positions {short_repr(position.tolist())}",
            "give a larger cache, or fewer tokens",
        )
    return position[:, None] + torch.arange(length, device=position.device)


def _check_given(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        raise PatchError(
            name,
            f"{dtype} {list(shape)}, contiguous",
            f"{tensor.dtype} {list(tensor.shape)}{layout}",
            "give one batch of ids, a position per sequence, and caches of one shape; call .contiguous() on slices",
        )


def _fake_cache_leftpad(_attention_mask: torch.Tensor, position: torch.Tensor, _length: int) -> torch.Tensor:
    return torch.empty_like(position)


def _fake_valid_keys(input_ids: torch.Tensor, _attention_mask: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(input_ids, dtype=torch.bool)


def _fake_cache_slots(input_ids: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(input_ids, dtype=torch.int64)


_LIBRARY.impl("cache_leftpad", _cache_leftpad, "CompositeExplicitAutograd")
_LIBRARY.impl("cache_leftpad", _cache_leftpad_on_gpu, "CUDA")
_LIBRARY.impl("valid_keys", _valid_keys, "CompositeExplicitAutograd")
_LIBRARY.impl("cache_slots", _cache_slots, "CompositeExplicitAutograd")
torch.library.register_fake("surgeon::cache_leftpad", _fake_cache_leftpad, lib=_LIBRARY)
torch.library.register_fake("surgeon::valid_keys", _fake_valid_keys, lib=_LIBRARY)
torch.library.register_fake("surgeon::cache_slots", _fake_cache_slots, lib=_LIBRARY)
for _name in ("cache_leftpad", "valid_keys"):
    batched(_name)
