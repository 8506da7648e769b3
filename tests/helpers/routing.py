"""The oracle for routed heads: the blocks that each query chooses, straight from the definition, in integers.

Source: topology.json version 2: nodes of eight quantised keys, tiles of sixteen queries, the greatest dot product of a
block's nodes with the quantised sum of the queries, ties to the lower block.
"""

from collections.abc import Iterator

import torch

from surgeon.compiler import Topology

NODE, TILE, STEPS = 8, 16, 127


def nodes_of(keys: torch.Tensor, centre: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nodes of a KV head's keys `[tokens, head_dim]`, int32 `[tokens // 8, head_dim]`."""
    steps = torch.round((keys.float() - centre) / scale * STEPS).clamp(-STEPS, STEPS).to(torch.int32)
    whole = len(steps) // NODE * NODE
    return (steps[:whole].view(-1, NODE, keys.shape[1]).sum(1) + NODE // 2).div(NODE, rounding_mode="floor").int()


def question_of(queries: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What queries `[rows, head_dim]` ask for together, int32 `[head_dim]`."""
    total = torch.zeros_like(scale)
    for row in queries:
        total = total + row.float() * scale
    most = total.abs().max()
    if most == 0:
        return torch.zeros_like(total, dtype=torch.int32)
    return torch.round(total / most * STEPS).to(torch.int32)


def units(position: int, q_length: int) -> Iterator[range]:
    """The queries that choose together, in a sequence whose query 0 is token `position`; padding is before token 0."""
    query = max(0, -position)
    while query < q_length:
        aligned = (position + query) % TILE == 0 and query + TILE <= q_length
        yield range(query, query + (TILE if aligned else 1))
        query += TILE if aligned else 1


def chosen_blocks(
    topology: Topology,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    position: int,
    first_dense_row: int | None = None,
) -> torch.Tensor:
    """The blocks that the queries of a sequence choose, bool `[heads, q_length, blocks]`.

    `q` is `[heads, q_length, head_dim]` and `k` `[KV heads, tokens, head_dim]` from the first real token to the last
    query's; query 0 is token `position`. Rows of blocks from `first_dense_row` on see everything and choose nothing.
    """
    heads, q_length, _ = q.shape
    size, group = topology.block_size, heads // k.shape[0]
    num_blocks = -(-k.shape[1] // size)
    found = torch.zeros(heads, q_length, num_blocks, dtype=torch.bool)
    if topology.router is None or (router := topology.router.layers[layer]) is None:
        return found
    mask = torch.from_numpy(topology.block_mask(layer, num_blocks))
    for index, head in enumerate(topology.layers[layer]):
        route = getattr(head, "route", 0)
        if not route:
            continue
        centre, scale = (torch.tensor(each[index // group]) for each in (router.centre, router.scale))
        nodes = nodes_of(k[index // group], centre, scale)
        for unit in units(position, q_length):
            row = (position + unit[0]) // size
            if first_dense_row is not None and row >= first_dense_row:
                continue
            candidates = [block for block in range(row) if not mask[index, row, block]]
            if len(candidates) > route:
                question = question_of(q[index, unit[0] : unit[-1] + 1], scale)
                scores = {
                    block: int((nodes[block * size // NODE : (block + 1) * size // NODE] * question).sum(1).max())
                    for block in candidates
                }
                candidates = sorted(candidates, key=lambda block: (-scores[block], block))[:route]
            for block in candidates:
                found[index, unit[0] : unit[-1] + 1, block] = True
    return found


def may_read(topology: Topology, layer: int, num_blocks: int) -> torch.Tensor:
    """The blocks that each head may read, chosen ones included: bool `[heads, num_blocks, num_blocks]`."""
    mask = torch.from_numpy(topology.block_mask(layer, num_blocks))
    routed = torch.tensor([bool(getattr(head, "route", 0)) for head in topology.layers[layer]])
    return mask | (routed[:, None, None] & torch.ones(num_blocks, num_blocks, dtype=torch.bool).tril())
