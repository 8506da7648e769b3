"""Attention over visible blocks in plain torch, differentiable: in q, k and v, or in the mask itself.

The compiled kernels need a package, and have a backward pass only on a CPU. This works wherever torch does and takes
any pattern of blocks. Its backward pass uses the formula of `runtime/kernels/backward.py`, which goes through padded
sequences and chunks one tile at a time; here the rows of a head that see similarly many blocks are one batch, a few
launches on a GPU instead of hundreds.

Source: the backward pass of FlashAttention-2 (arXiv 2307.08691), a head at a time instead of a tile at a time.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention over the visible blocks: `[heads, length, head_dim]`, differentiable in q, k and v.

    `q` is `[heads, length, head_dim]`, `k` and `v` `[KV heads, length, head_dim]`, `visible` bool
    `[heads, blocks, blocks]`, lower triangular with a full diagonal; the blocks divide the length equally.
    """
    return cast(torch.Tensor, _BlockSparse.apply(q, k, v, visible, scale))  # type: ignore[no-untyped-call]


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention with each block's weights times the block's mask, renormalised: differentiable in the mask.

    Shapes as in `block_sparse_attention`; `mask` holds numbers from 0 to 1 with a diagonal of 1. The backward pass
    recomputes the weights instead of keeping them.
    """
    return cast(torch.Tensor, checkpoint(_masked, q, k, v, mask, scale, use_reentrant=False))


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
    ) -> torch.Tensor:
        group, blocks = q.shape[0] // k.shape[0], visible.shape[1]
        output = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=q.dtype, device=q.device)
        for head in range(q.shape[0]):
            queries, out, sums = (_split(tensor[head], blocks) for tensor in (q, output, lse))
            for rows, keys, hidden in _gathered(visible[head], q.shape[1] // blocks):
                scores = _scores(queries[rows], _split(k[head // group], blocks), keys, hidden, scale)
                total = torch.logsumexp(scores, dim=-1)
                weights = torch.exp(scores - total[..., None])
                out[rows] = weights @ _take(_split(v[head // group], blocks), keys)
                sums[rows] = total
        ctx.save_for_backward(q, k, v, output, lse, visible)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, lse, visible = ctx.saved_tensors
        (upstream,) = gradients
        group, blocks = q.shape[0] // k.shape[0], visible.shape[1]
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for head in range(q.shape[0]):
            shared = head // group
            parts = (q[head], upstream[head], output[head], lse[head], dq[head])
            all_queries, all_gradients, out, sums, to = (_split(tensor, blocks) for tensor in parts)
            for rows, keys, hidden in _gathered(visible[head], q.shape[1] // blocks):
                queries, gradient = all_queries[rows], all_gradients[rows]
                k_seen, v_seen = _take(_split(k[shared], blocks), keys), _take(_split(v[shared], blocks), keys)
                scores = _scores(queries, _split(k[shared], blocks), keys, hidden, ctx.scale)
                weights = torch.exp(scores - sums[rows][..., None])
                mean = (gradient * out[rows]).sum(dim=-1, keepdim=True)
                inner = weights * (gradient @ v_seen.transpose(1, 2) - mean) * ctx.scale
                to[rows] = inner @ k_seen
                _add(_split(dk[shared], blocks), keys, inner.transpose(1, 2) @ queries)
                _add(_split(dv[shared], blocks), keys, weights.transpose(1, 2) @ gradient)
        return dq, dk, dv, None, None


def _gathered(visible: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields groups of rows of blocks that see similarly many blocks: the rows, their visible blocks, the hidden keys.

    Those are `[rows]`, `[rows, most]`, and a mask, bool `[rows, size, most, size]`. A row with fewer blocks than the
    fullest of its group repeats its own block, hidden. The own block is hidden above the diagonal.
    """
    counts = visible.sum(dim=1)
    order = visible.int().argsort(dim=1, descending=True, stable=True)
    above = torch.ones(size, size, dtype=torch.bool, device=visible.device).triu(1)
    level = (counts - 1).clamp(min=1).log2().floor()
    for value in level.unique():
        rows = (level == value).nonzero()[:, 0]
        most = int(counts[rows].max())
        absent = torch.arange(most, device=visible.device) >= counts[rows, None]
        keys = torch.where(absent, rows[:, None], order[rows, :most])
        diagonal = (keys == rows[:, None])[:, None, :, None] & above[:, None, :]
        yield rows, keys, absent[:, None, :, None] | diagonal


def _split(tensor: torch.Tensor, blocks: int) -> torch.Tensor:
    return tensor.reshape(blocks, -1, *tensor.shape[1:])


def _take(tensor: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return tensor[keys].flatten(1, 2)


def _add(target: torch.Tensor, keys: torch.Tensor, gathered: torch.Tensor) -> None:
    target.index_add_(0, keys.flatten(), gathered.reshape(keys.numel(), *target.shape[1:]))


def _scores(
    queries: torch.Tensor, k: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor, scale: float
) -> torch.Tensor:
    scores = queries @ _take(k, keys).transpose(1, 2) * scale
    return scores.masked_fill_(hidden.flatten(2, 3), -torch.inf)


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
