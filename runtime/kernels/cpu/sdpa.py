"""Dense attention by torch, used where it computes the same as a kernel in less time; see `dense_rows`."""

import logging

import torch
from torch.nn.functional import scaled_dot_product_attention

from surgeon.runtime.operands import Operands

_LOG = logging.getLogger("surgeon")


def visible_end(operands: Operands) -> int | None:
    """The end of the visible keys if all sequences are unpadded and at the same position, else None."""
    if operands.cache_leftpad is not None and bool(operands.cache_leftpad.any()):
        return None
    if operands.position is None:
        return operands.k.shape[2]
    start = operands.position.tolist()
    return start[0] + operands.q.shape[2] if start and start.count(start[0]) == len(start) else None


def attend(operands: Operands, end: int) -> torch.Tensor:
    """Causal attention of the last queries over the first `end` keys, with the result of `Package.attention`."""
    q, k, v = operands[:3]
    queries = q.shape[2]
    mask = None
    if 1 < queries < end:
        mask = torch.ones(queries, end, dtype=torch.bool, device="cpu").tril(end - queries)
    _LOG.debug("attention of %d queries over %d keys by scaled_dot_product_attention", queries, end)
    k, v, causal = k[:, :, :end], v[:, :, :end], queries == end
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=operands.scale, enable_gqa=True)
    return out.transpose(1, 2).contiguous()


def rotated(operands: Operands, cos: torch.Tensor, sin: torch.Tensor) -> Operands:
    """The operands with q and k rotated as a kernel does it; cos and sin are `[B, length, D]`."""
    cos, sin = cos[:, None], sin[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return operands._replace(q=rotate(operands.q), k=rotate(operands.k))
