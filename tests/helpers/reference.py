"""The oracle for every attention kernel: masked softmax in fp64, masked straight by the topology's definition."""

import math
from collections.abc import Sequence

import torch

import routing
from surgeon.compiler import Topology

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""The largest relative Frobenius error that a kernel may have."""


def token_mask(
    topology: Topology,
    layer: int,
    q_length: int,
    k_length: int,
    position: int,
    cache_leftpad: int,
    dense_rows: int = 0,
    tokens_ahead: int = 0,
) -> torch.Tensor:
    """The keys that each query of one sequence sees, bool `[heads, q_length, k_length]`."""
    block_size = topology.block_size
    query = torch.arange(q_length) + position - cache_leftpad
    key = torch.arange(k_length) - cache_leftpad
    num_blocks = max(1, math.ceil((position + q_length - cache_leftpad) / block_size))
    blocks = torch.from_numpy(topology.block_mask(layer, num_blocks))
    row = query.clamp(min=0) // block_size
    visible = blocks[:, row][:, :, key.clamp(0, num_blocks * block_size - 1) // block_size]
    if dense_rows:
        prompt_end = position - cache_leftpad + q_length + tokens_ahead
        visible = visible | ((row + 1) * block_size > prompt_end - dense_rows)[:, None]
    return visible & (key >= 0) & (key <= query[:, None])


def attention(
    topology: Topology,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position: Sequence[int] | None = None,
    cache_leftpad: Sequence[int] | None = None,
    scale: float | None = None,
    dense_rows: int = 0,
    tokens_ahead: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output `[batch, q_length, heads, head_dim]` and log-sum-exp `[batch, heads, q_length]`, both fp64.

    They are zero and minus infinity for queries before cache_leftpad, which see nothing.
    """
    batch, heads, q_length, head_dim = q.shape
    k_length = k.shape[2]
    group = heads // k.shape[1]
    routed = k
    k, v = (tensor.double().repeat_interleave(group, dim=1) for tensor in (k, v))
    out, lse = [], []
    for sequence in range(batch):
        start = k_length - q_length if position is None else position[sequence]
        first = 0 if cache_leftpad is None else cache_leftpad[sequence]
        end = start + q_length  # longer k and v may hold anything after this
        mask = token_mask(topology, layer, q_length, end, start, first, dense_rows, tokens_ahead)
        mask |= _chosen(topology, layer, q[sequence], routed[sequence], start, first, dense_rows, tokens_ahead, end)
        scores = q[sequence].double() @ k[sequence, :, :end].transpose(-1, -2) * (scale or head_dim**-0.5)
        scores = scores.masked_fill(~mask, -math.inf)
        out.append((torch.softmax(scores, dim=-1).nan_to_num(0.0) @ v[sequence, :, :end]).transpose(0, 1))
        lse.append(torch.logsumexp(scores, dim=-1))
    return torch.stack(out), torch.stack(lse)


def _chosen(
    topology: Topology,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    position: int,
    cache_leftpad: int,
    dense_rows: int,
    tokens_ahead: int,
    end: int,
) -> torch.Tensor:
    """The keys that each query of one sequence chose, bool `[heads, q_length, end]`."""
    prompt_end = position - cache_leftpad + q.shape[1] + tokens_ahead
    dense = max(0, prompt_end - dense_rows) // topology.block_size if dense_rows else None
    first = min(cache_leftpad, end)
    blocks = routing.chosen_blocks(topology, layer, q, k[:, first:end], position - cache_leftpad, dense)
    keys = blocks.repeat_interleave(topology.block_size, dim=2)[:, :, : end - first]
    return torch.nn.functional.pad(keys, (end - keys.shape[2], 0))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error in the Frobenius norm."""
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))
