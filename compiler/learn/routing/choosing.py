"""Attention under a topology in plain torch, whose routed heads choose the blocks that the compiled kernels choose."""

from collections.abc import Callable, Sequence
from functools import cache

import torch

from surgeon.compiler.learn.measure.attending import Attend
from surgeon.compiler.schedule.schedule import LayerSchedule, schedule_layers
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.kernels.choice import choose, nodes_of


def attending_as(topology: Topology) -> Attend:
    """Attention of a whole sequence, from its first token on, in which every row follows the topology.

    Its length is a multiple of the block. A KV head's query heads are computed together, with their whole mask.
    """
    layers = schedule_layers(topology)

    @cache
    def constant(layer: int, blocks: int) -> torch.Tensor:
        return torch.from_numpy(topology.block_mask(layer, blocks))

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        seen = constant(layer, q.shape[2] // topology.block_size)
        return _attended(q, k, v, scale, layers[layer], lambda head: seen[head])

    return attend


def _attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layer: LayerSchedule,
    constant: Callable[[int], torch.Tensor],
) -> torch.Tensor:
    """Attention `[1, heads, length, head_dim]`; `constant` gives a head's pairs of blocks without chosen ones."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    output = torch.empty_like(q)
    for kv_head in range(k.shape[1]):
        heads = range(kv_head * group, (kv_head + 1) * group)
        rows = [constant(head).repeat_interleave(layer.block_size, dim=0) for head in heads]
        add_chosen(rows, layer, kv_head, q[0, heads.start : heads.stop], k[0, kv_head])
        seen = torch.stack(rows).to(q.device).repeat_interleave(layer.block_size, dim=2) & causal
        own = slice(heads.start, heads.stop)
        keys, values = (states[:, kv_head : kv_head + 1].expand(-1, group, -1, -1) for states in (k, v))
        output[:, own] = torch.nn.functional.scaled_dot_product_attention(
            q[:, own], keys, values, attn_mask=seen[None], scale=scale
        )
    return output


def add_chosen(
    rows: Sequence[torch.Tensor],
    layer: LayerSchedule,
    kv_head: int,
    q: torch.Tensor,
    keys: torch.Tensor,
    first_query: int = 0,
) -> None:
    """Adds to the rows, bool `[queries, blocks]` of each of a KV head's query heads, the blocks that these choose.

    q is `[query heads, queries, head_dim]`, its first query the token `first_query` of the keys `[length, head_dim]`.
    """
    first = kv_head * len(rows)
    schedules = layer.heads[first : first + len(rows)]
    if layer.router is None or not any(schedule.route for schedule in schedules):
        return
    centre, width = (torch.tensor(channels[kv_head]) for channels in (layer.router.centre, layer.router.scale))
    nodes = nodes_of(keys.cpu(), centre, width)
    for mask, schedule, queries in zip(rows, schedules, q.cpu(), strict=True):
        if schedule.route:
            for choices in choose(schedule, layer.block_size, first_query, queries, nodes, width, None).values():
                for choice in choices:
                    own = slice(choice.queries.start - first_query, choice.queries.stop - first_query)
                    mask[own, list(choice.blocks)] = True
