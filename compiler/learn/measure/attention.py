"""Attention under a mask that is differentiable itself: for learning the mask by gradient."""

from typing import cast

import torch
from torch.utils.checkpoint import checkpoint


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention with each block's weights times the block's mask, normalised again: as `q` in shape.

    `q` is `[heads, length, head_dim]`, `k` and `v` `[KV heads, length, head_dim]`, `mask` `[heads, blocks, blocks]` of
    0 to 1 with a diagonal of 1. The weights are made again in the backward pass instead of kept.
    """
    return cast(torch.Tensor, checkpoint(_masked, q, k, v, mask, scale, use_reentrant=False))


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    length, group = q.shape[1], q.shape[0] // k.shape[0]
    size = length // mask.shape[1]
    keys, values = (tensor.repeat_interleave(group, dim=0) for tensor in (k, v))
    above = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ keys.transpose(1, 2)).float() * scale
    weights = torch.softmax(scores.masked_fill(above, -torch.inf), dim=-1)
    weights = weights * mask.float().repeat_interleave(size, dim=1).repeat_interleave(size, dim=2)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return (weights.to(values.dtype) @ values).to(q.dtype)
