"""Dense attention by torch, where it computes the same as a kernel and takes less time: see `dense_rows`."""

import logging

import torch
from torch.nn.functional import scaled_dot_product_attention

_LOG = logging.getLogger("surgeon")


def visible_end(
    q: torch.Tensor, k: torch.Tensor, position: torch.Tensor | None, first_key: torch.Tensor | None
) -> int | None:
    """Where the visible keys end, if all sequences are unpadded and stand at one position; else None."""
    if first_key is not None and bool(first_key.any()):
        return None
    if position is None:
        return k.shape[2]
    start = position.tolist()
    return start[0] + q.shape[2] if start and start.count(start[0]) == len(start) else None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: int, scale: float) -> torch.Tensor:
    """Causal attention of the last queries over the first `end` keys; shapes as `Package.attention`."""
    queries = q.shape[2]
    mask = None
    if 1 < queries < end:
        mask = torch.ones(queries, end, dtype=torch.bool).tril(end - queries)
    _LOG.debug("attention of %d queries over %d keys by scaled_dot_product_attention", queries, end)
    k, v, causal = k[:, :, :end], v[:, :, :end], queries == end
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()
