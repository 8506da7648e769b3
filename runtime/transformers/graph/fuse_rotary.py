"""Moves the rotary position embedding of a traced graph into the attention kernels.

Transformers rotates q and k in five passes over each. The kernel rotates a query as it loads it, and each key once.

Source: `apply_rotary_pos_emb` of `transformers.models.llama.modeling_llama`: x * cos + rotate_half(x) * sin.
"""

from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

_ATEN = torch.ops.aten
_END = 2**62  # a slice to the end has end 2^63 - 1


@dataclass(frozen=True)
class _Rotated:
    """The inputs of a rotation: x `[batch, heads, length, head_dim]`, cos and sin `[batch, length, head_dim]`."""

    x: Node
    cos: Node
    sin: Node


def fuse_rotary(graph: Graph, head_dim: int) -> int:
    """Replaces each surgeon.attention whose q and k are rotated alike by the op that rotates them; returns the count.

    Only this exact pattern, on whole sequences without a cache, is replaced; any other site stays as it is.
    """
    fused = 0
    for site in graph.find_nodes(op="call_function", target=torch.ops.surgeon.attention.default):
        q, k, v, _position, *rest = site.args
        rotated_q, rotated_k = _rotated(q, head_dim), _rotated(k, head_dim)
        if rotated_q is None or rotated_k is None:
            continue
        if (rotated_q.cos, rotated_q.sin) != (rotated_k.cos, rotated_k.sin):
            continue
        with graph.inserting_before(site):
            arguments = (rotated_q.x, rotated_k.x, v, rotated_q.cos, rotated_q.sin, *rest)
            new = graph.call_function(torch.ops.surgeon.attention_rotary.default, arguments)
        new.meta = dict(site.meta)
        site.replace_all_uses_with(new)
        graph.erase_node(site)
        fused += 1
    graph.eliminate_dead_code()
    return fused


def _rotated(node: object, head_dim: int) -> _Rotated | None:
    """Matches x * cos + cat(-x[..., half:], x[..., :half]) * sin, where cos and sin have an axis for the heads."""
    summands = _arguments(node, _ATEN.add.Tensor, 2)
    if summands is None:
        return None
    straight, turned = (_arguments(summand, _ATEN.mul.Tensor, 2) for summand in summands)
    if straight is None or turned is None:
        return None
    joined = _arguments(turned[0], _ATEN.cat.default, 2)
    if joined is None or joined[1] not in (-1, 3) or not isinstance(joined[0], list | tuple) or len(joined[0]) != 2:
        return None
    negated = _arguments(joined[0][0], _ATEN.neg.default, 1)
    second = _arguments(negated[0], _ATEN.slice.Tensor, 4) if negated else None
    first = _arguments(joined[0][1], _ATEN.slice.Tensor, 4)
    cos, sin = _arguments(straight[1], _ATEN.unsqueeze.default, 2), _arguments(turned[1], _ATEN.unsqueeze.default, 2)
    if first is None or second is None or cos is None or sin is None:
        return None
    x, half = straight[0], head_dim // 2
    if first != (x, 3, 0, half) or second[:3] != (x, 3, half) or not _reaches(second[3], head_dim):
        return None
    if cos[1] != 1 or sin[1] != 1:
        return None
    if not (isinstance(x, Node) and isinstance(cos[0], Node) and isinstance(sin[0], Node)):
        return None
    return _Rotated(x, cos[0], sin[0])


def _reaches(end: object, size: int) -> bool:
    return isinstance(end, int) and (end == size or end > _END)


def _arguments(node: object, target: object, count: int) -> tuple[object, ...] | None:
    """The arguments of a call of `target`, or None if the node is another call or has other arguments."""
    if not isinstance(node, Node) or node.target != target or len(node.args) != count or node.kwargs:
        return None
    return tuple(node.args)
