"""Attention by definition, in fp64, at a sample of the queries: the reference for a fast kernel's output."""

import torch


def sampled_error(
    mask: torch.Tensor,
    block_size: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    samples: int = 16,
) -> float:
    """The relative Frobenius error of one sequence's output, `[1, queries, heads, head_dim]`.

    `mask` `[heads, rows, blocks]` holds the visible blocks; q, k and v have the shapes of `Package.attention`. The
    queries are the last ones.
    """
    position = k.shape[2] - q.shape[2]
    found, expected = [], []
    for query in torch.linspace(0, q.shape[2] - 1, min(samples, q.shape[2])).long().tolist():
        own = position + query
        visible = mask[:, own // block_size].repeat_interleave(block_size, dim=1)[:, : own + 1]
        for head in range(q.shape[1]):
            kv_head = head * k.shape[1] // q.shape[1]
            keys, values = (tensor[0, kv_head, : own + 1][visible[head]].double() for tensor in (k, v))
            weights = torch.softmax(keys @ q[0, head, query].double() * q.shape[3] ** -0.5, dim=0)
            expected.append(weights @ values)
            found.append(out[0, query, head].double())
    reference = torch.stack(expected)
    return float((torch.stack(found) - reference).norm() / reference.norm())
