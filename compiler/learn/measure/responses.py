"""Responses of a layer's loss to other patterns of its heads, exact in the layer's output.

For query t, block j has the share a_tj of the dense attention and the partial output p_tj; a pattern's output is
sum(p_tj) / sum(a_tj) over its visible blocks. For a loss whose gradient with respect to the output is d_t, a change of
pattern therefore needs only the scalars d_t·p_tj and a_tj: the gradient's response to *any* pattern is exact in the
output, including dropped blocks and renormalisation.
"""

from collections.abc import Iterator

import torch

from surgeon.compiler.learn.measure.decoder import Observation


def responses(observation: Observation, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and sum of squares, over the queries, of d·(candidate's output − present output): fp64 `[heads, candidates]`.

    `candidates` is bool `[candidates, blocks, blocks]` or, for different candidates in each head,
    `[heads, candidates, blocks, blocks]`; every row must see its own block.
    """
    shape, device = (observation.q.shape[0], candidates.shape[-3]), observation.q.device
    first = torch.zeros(shape, dtype=torch.float64, device=device)
    second = torch.zeros(shape, dtype=torch.float64, device=device)
    spread = (candidates if candidates.ndim == 4 else candidates[None]).to(device)
    for row, pushed, share, present in _pushes(observation, candidates.shape[-1]):
        seen = spread[:, :, row, : row + 1].transpose(1, 2).to(share.dtype)
        change = (pushed @ seen) / (share @ seen) - present
        first += change.sum(dim=1, dtype=torch.float64)
        second += change.double().square().sum(dim=1)
    return first, second


def block_responses(observation: Observation, visible: torch.Tensor) -> torch.Tensor:
    """The response of each pair of blocks: the sum of d·(change of the output) if a row also saw that block.

    `visible` holds the pairs that the heads see, bool `[heads, blocks, blocks]`; the result has the same shape,
    in fp64. Pairs that are already visible have no response.
    """
    visible = visible.to(observation.q.device)
    result = torch.zeros(visible.shape, dtype=torch.float64, device=visible.device)
    for row, pushed, share, present in _pushes(observation, visible.shape[-1]):
        seen = visible[:, row, None, : row + 1]
        top, bottom = ((part * seen).sum(dim=2, keepdim=True) for part in (pushed, share))
        change = ((top + pushed) / (bottom + share) - present).masked_fill(seen, 0.0)
        result[:, row, : row + 1] = change.sum(dim=1, dtype=torch.float64)
    return result


def output_errors(observation: Observation, candidates: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Sum over the queries of a candidate's squared error after the output projection.

    The layer must have been dense. `candidates` is bool `[candidates, blocks, blocks]`, `projection` the layer's W_o,
    `[hidden, heads · head_dim]`; the result is fp64 `[heads, candidates]`.
    """
    blocks, heads = candidates.shape[-1], observation.q.shape[0]
    size, group = observation.q.shape[1] // blocks, heads // observation.v.shape[0]
    candidates = candidates.to(observation.q.device)
    per_head = projection.unflatten(1, (heads, -1)).transpose(0, 1).to(observation.q)
    factor = torch.linalg.qr(per_head, mode="r").R  # R'R = W'W: the norm after W_o, in head_dim dimensions
    total = torch.zeros((heads, candidates.shape[0]), dtype=torch.float64, device=candidates.device)
    for row, weights in _rows(observation, blocks):
        rows = slice(row * size, (row + 1) * size)
        split = weights.unflatten(2, (row + 1, size)).transpose(1, 2)  # [heads, blocks, size, size]
        v = observation.v[:, : (row + 1) * size].unflatten(1, (row + 1, size)).repeat_interleave(group, dim=0)
        share = split.sum(dim=3)
        excess = split @ v - share[..., None] * observation.output[:, None, rows]
        seen = candidates[:, row, : row + 1].to(share.dtype)
        # The excesses of all blocks cancel, so those of the dropped blocks are those of the visible ones, negated.
        error = torch.einsum("hjtd,cj->hctd", excess @ factor[:, None].transpose(2, 3), seen).square().sum(dim=3)
        kept = torch.einsum("hjt,cj->hct", share, seen)
        total += (error / kept.square()).sum(dim=2, dtype=torch.float64)
    return total


def _pushes(observation: Observation, blocks: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields each row, its d·p_tj and a_tj, `[heads, size, row + 1]`, and d·(present output), `[heads, size, 1]`."""
    size, group = observation.q.shape[1] // blocks, observation.q.shape[0] // observation.v.shape[0]
    present = (observation.gradient * observation.output).sum(dim=2, keepdim=True)
    for row, weights in _rows(observation, blocks):
        rows = slice(row * size, (row + 1) * size)
        v = observation.v[:, : rows.stop].repeat_interleave(group, dim=0)
        inner = observation.gradient[:, rows] @ v.transpose(1, 2)
        pushed = (weights * inner).unflatten(2, (row + 1, size)).sum(dim=3)
        yield row, pushed, weights.unflatten(2, (row + 1, size)).sum(dim=3), present[:, rows]


def missed_shares(observation: Observation, candidates: torch.Tensor) -> torch.Tensor:
    """The share of the dense attention that a candidate misses, as a mean over the queries: `[heads, candidates]`.

    `candidates` is bool `[candidates, blocks, blocks]`; the result is fp64.
    """
    blocks, candidates = candidates.shape[-1], candidates.to(observation.q.device)
    total = torch.zeros((observation.q.shape[0], candidates.shape[0]), dtype=torch.float64, device=candidates.device)
    for row, weights in _rows(observation, blocks):
        share = weights.unflatten(2, (row + 1, -1)).sum(dim=(1, 3))
        total += share.double() @ (~candidates[:, row, : row + 1]).double().T
    return total / observation.q.shape[1]


def _rows(observation: Observation, blocks: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields each row of blocks with its queries' dense attention weights, `[heads, size, (row + 1) · size]`."""
    heads, length, _ = observation.q.shape
    size, group = length // blocks, heads // observation.k.shape[0]
    above = torch.ones(size, size, dtype=torch.bool, device=observation.q.device).triu(1)
    for row in range(blocks):
        end = (row + 1) * size
        k = observation.k[:, :end].repeat_interleave(group, dim=0)
        scores = observation.q[:, row * size : end] @ k.transpose(1, 2) * observation.scale
        scores[:, :, row * size :].masked_fill_(above, -torch.inf)
        yield row, torch.softmax(scores, dim=-1)
