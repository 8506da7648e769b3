"""The gradients of block-sparse attention, over visible blocks only, whose attention weights are recomputed.

For one row of blocks, S = scale Q Kᵀ over the keys that it reads and P = softmax(S); then, with the gradients dO of the
output and dL of the log-sum-exp, dV = Pᵀ dO, dS = P (dO Vᵀ − rowsum(P dO Vᵀ) + dL), dQ = scale dS K, dK = scale dSᵀ Q.
Only that much is held at a time, and nothing but its inputs needs to be kept from the forward pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from surgeon.runtime.kernels.choice import Choice, choose, nodes_of
from surgeon.runtime.operands import Gradients, Operands
from surgeon.runtime.package.schedule import HeadSchedule
from surgeon.runtime.package.topology_facts import PackagedRouter

_Choices = Mapping[int, Mapping[int, Sequence[Choice]]]  # by head and row of blocks


def gradients(
    heads: Sequence[HeadSchedule],
    block_size: int,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    operands: Operands,
    router: PackagedRouter | None = None,
) -> Gradients:
    """The gradients of q, k and v from those of the output `[B,Sq,Hq,D]` and the log-sum-exp `[B,Hq,Sq]`.

    They are computed in fp32, or in fp64 if q is fp64. They are zero for queries before `cache_leftpad` and for keys
    that no query reads. Routed heads choose by `router`, of these KV heads, the blocks that they chose in the forward
    pass; a choice has no gradient.
    """
    q, k, v, position, cache_leftpad, scale, *_ = operands
    batch, length = q.shape[0], q.shape[2]
    positions = [k.shape[2] - length] * batch if position is None else position.tolist()
    cache_leftpads = [0] * batch if cache_leftpad is None else cache_leftpad.tolist()
    accumulated = torch.float64 if q.dtype == torch.float64 else torch.float32
    if grad_lse is None:
        grad_lse = torch.zeros((), dtype=accumulated, device=q.device).expand(q.shape[:3])
    given = (q, k, v, grad_out.transpose(1, 2), grad_lse)
    results = [torch.zeros(tensor.shape, dtype=accumulated, device=q.device) for tensor in (q, k, v)]
    places: dict[tuple[int, int, int], list[int]] = {}
    for sequence, place in enumerate(zip(positions, cache_leftpads, strict=True)):
        alone = 0 if router is None else sequence  # each chooses by itself
        places.setdefault((*place, alone), []).append(sequence)
    shared = list(_shared_schedules(heads, len(heads) // k.shape[1]))
    for (start, first, alone), sequences in places.items():
        whole = len(sequences) == batch  # the usual case, which copies nothing
        parts = given if whole else tuple(tensor[sequences] for tensor in given)
        sums = results if whole else [torch.zeros_like(result[sequences]) for result in results]
        dense = operands.first_dense_row(start + length - first, block_size)
        choices: _Choices = {}
        if router is not None:
            choices = _chosen(heads, block_size, start, first, dense, q[alone].detach(), k[alone].detach(), router)
        for tile in _tiles(shared, block_size, range(start, start + length), first, dense, choices):
            _accumulate(tile, start, scale, *parts, *sums)
        if not whole:
            for result, part in zip(results, sums, strict=True):
                result[sequences] = part
    grad_q, grad_k, grad_v = (result.to(q.dtype) for result in results)
    return grad_q, grad_k, grad_v


@dataclass(frozen=True)
class _Tile:
    """Queries `[begin, end)` of one block, counted as keys, for query heads that share a KV head and a schedule.

    `keys` are the intervals of keys that they read; the last ends at `end`.
    """

    kv_head: int
    heads: list[int]
    begin: int
    end: int
    keys: list[slice]


def _shared_schedules(heads: Sequence[HeadSchedule], group: int) -> Iterator[tuple[int, list[int], HeadSchedule]]:
    """Yields each KV head's distinct schedules, with the query heads that follow them."""
    shared: dict[tuple[int, int], list[int]] = {}
    for head, schedule in enumerate(heads):
        shared.setdefault((head // group, id(schedule)), []).append(head)
    for (kv_head, _), followers in shared.items():
        yield kv_head, followers, heads[followers[0]]


def _tiles(
    shared: Sequence[tuple[int, list[int], HeadSchedule]],
    block_size: int,
    queries: range,
    first: int,
    first_dense_row: int | None,
    choices: _Choices,
) -> Iterator[_Tile]:
    """Yields the tiles of a sequence's `queries`, whose blocks are counted from the key `first`.

    Queries that choose together are a tile of their own.
    """
    begin = max(queries.start, first)
    while begin < queries.stop:
        row = (begin - first) // block_size
        end = min(queries.stop, first + (row + 1) * block_size)
        dense = first_dense_row is not None and row >= first_dense_row
        for kv_head, heads, schedule in shared:
            runs = [(0, row + 1)] if dense else schedule.row(row)
            for followers, queries_of_tile, chosen in _deciding(heads, range(begin - first, end - first), row, choices):
                keys = [
                    slice(first + block_size * a, first + min(block_size * b, queries_of_tile.stop))
                    for a, b in (*((block, block + 1) for block in chosen), *runs)
                ]
                yield _Tile(kv_head, followers, first + queries_of_tile.start, first + queries_of_tile.stop, keys)
        begin = end


def _deciding(
    heads: list[int], queries: range, row: int, choices: _Choices
) -> Iterator[tuple[list[int], range, Sequence[int]]]:
    """Yields heads of one schedule and queries of one row that read the same blocks, and those that they chose."""
    free = [head for head in heads if row not in choices.get(head, {})]
    if free:
        yield free, queries, ()
    for head in heads:
        for choice in choices.get(head, {}).get(row, ()):
            yield [head], choice.queries, choice.blocks


def _chosen(
    heads: Sequence[HeadSchedule],
    block_size: int,
    start: int,
    first: int,
    first_dense_row: int | None,
    q: torch.Tensor,
    k: torch.Tensor,
    router: PackagedRouter,
) -> _Choices:
    """The choices of a sequence's routed heads; q is `[heads, queries, head_dim]`, query 0 is the key `start`."""
    group, padding = len(heads) // len(k), max(0, first - start)
    end = start + q.shape[1]
    chosen = {}
    for kv_head, (centre, width) in enumerate(zip(*map(torch.from_numpy, router), strict=True)):
        routed = [head for head in range(kv_head * group, (kv_head + 1) * group) if heads[head].route]
        nodes = nodes_of(k[kv_head, first:end], centre, width) if routed else k
        for head in routed:
            own = q[head, padding:]
            chosen[head] = choose(heads[head], block_size, start + padding - first, own, nodes, width, first_dense_row)
    return chosen


def _accumulate(
    tile: _Tile,
    start: int,
    scale: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
) -> None:
    """Sets a tile's part of `grad_q` and adds its part to `grad_k` and `grad_v`; all tensors `[batch, heads, …]`."""
    rows = slice(tile.begin - start, tile.end - start)
    size = tile.end - tile.begin
    # The queries of all heads are the rows of one matrix.
    queries, grads = (tensor[:, tile.heads, rows].to(grad_q.dtype).flatten(1, 2) for tensor in (q, grad_out))
    keys, values = (
        torch.cat([tensor[:, tile.kv_head, part] for part in tile.keys], dim=1).to(grad_q.dtype) for tensor in (k, v)
    )
    scores = torch.matmul(queries, keys.transpose(1, 2)).mul_(scale)
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    scores.unflatten(1, (-1, size))[..., -size:].masked_fill_(later, -torch.inf)
    weights = torch.softmax(scores, dim=2)
    added_v = torch.matmul(weights.transpose(1, 2), grads)
    grad_weights = torch.matmul(grads, values.transpose(1, 2))
    shift = torch.linalg.vecdot(weights, grad_weights) - grad_lse[:, tile.heads, rows].flatten(1)
    grad_scores = grad_weights.sub_(shift.unsqueeze(2)).mul_(weights).mul_(scale)
    grad_q[:, tile.heads, rows] = torch.matmul(grad_scores, keys).unflatten(1, (-1, size))
    added_k = torch.matmul(grad_scores.transpose(1, 2), queries)
    done = 0
    for part in tile.keys:
        covered = slice(done, done + part.stop - part.start)
        grad_k[:, tile.kv_head, part] += added_k[:, covered]
        grad_v[:, tile.kv_head, part] += added_v[:, covered]
        done = covered.stop
