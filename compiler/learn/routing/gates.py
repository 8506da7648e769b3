"""Finds heads that retrieve: a frozen model reads documents, and gates let each head's questions see far or not.

The prefix is read densely. In the rows that ask and answer, a head's output is O_window + g (O_dense - O_window), where
the window is the sink and the last blocks; what the answers' loss gains by a head's gate tells how much that head
brings back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from surgeon.compiler.learn.measure.documents import Document
from surgeon.runtime.evaluate.logits import logits_of
from surgeon.runtime.transformers.layers import find_attention
from surgeon.runtime.transformers.offload import entry_device

GATES = (0.3, 0.7)
"""The openings at which gains are measured: at one alone, heads that stand in for each other look useless."""

_IMPLEMENTATION = "surgeon_gates"
_ATTRIBUTE = "_surgeon_gates"


@dataclass(frozen=True)
class Near:
    """The part of a head that needs no routing: the first `sink` and the last `window` tokens, by whole blocks."""

    block_size: int
    sink: int
    window: int

    def mask(self, rows: range, device: torch.device) -> torch.Tensor:
        """The tokens that each of the rows sees, up to its own: bool `[rows, rows.stop]`."""
        row = torch.arange(rows.start, rows.stop, device=device)[:, None]
        token = torch.arange(rows.stop, device=device)
        block, own = token // self.block_size, row // self.block_size
        return (token <= row) & ((block < self.sink) | (own - block < self.window))


@dataclass(frozen=True)
class _Task:
    layer: int
    document: Document
    near: Near
    gates: torch.Tensor  # [layers, heads]
    mass: torch.Tensor  # [layers, heads], filled


@dataclass(frozen=True)
class Gains:
    """The evidence of one document for each head, `[layers, heads]`.

    `gains[i]` is what the answers' loss falls by as the gates open further than `GATES[i]`; `mass` is the attention
    that answers pay to the facts that they state, summed over the facts.
    """

    gains: tuple[torch.Tensor, ...]
    mass: torch.Tensor


def measure_gains(model: PreTrainedModel, document: Document, near: Near) -> Gains:
    """Reads a document with every gate at each of the openings."""
    modules = [module for _, module in find_attention(model)]
    shape = (len(modules), model.config.num_attention_heads)
    mass, gains = torch.zeros(shape), []
    for opening in GATES:
        gates = torch.full(shape, opening, requires_grad=True)
        loss = _loss(model, modules, document, near, gates, mass)
        (gradient,) = torch.autograd.grad(loss, gates)
        gains.append(-gradient.cpu())
    return Gains(tuple(gains), mass)


def retrieval_scores(found: Sequence[Gains]) -> torch.Tensor:
    """The scores of the heads, `[layers, heads]`: higher for those that bring back more from afar.

    It is the sum of the heads' shares of all gains at each opening, and of all attention to facts.
    """
    quantities = [torch.stack([each.mass for each in found]).sum(0)]
    quantities += [torch.stack([each.gains[i] for each in found]).sum(0) for i in range(len(GATES))]
    positive = [quantity.clamp(min=0) for quantity in quantities]
    return torch.stack([quantity / quantity.sum().clamp(min=1e-30) for quantity in positive]).sum(0)


def _loss(
    model: PreTrainedModel,
    modules: Sequence[torch.nn.Module],
    document: Document,
    near: Near,
    gates: torch.Tensor,
    mass: torch.Tensor,
) -> torch.Tensor:
    """The mean negative log-likelihood of the answers' tokens."""
    with _gated(model, modules, document, near, gates, mass):
        embedded = model.get_input_embeddings()(document.tokens.to(entry_device(model)))
        states = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
    rows = torch.tensor([row for answer in document.answers for row in answer.asking], device=states.device)
    expected = document.tokens[0].to(states.device)[rows + 1]
    return torch.nn.functional.cross_entropy(logits_of(model, states[rows]), expected)


@contextmanager
def _gated(
    model: PreTrainedModel,
    modules: Sequence[torch.nn.Module],
    document: Document,
    near: Near,
    gates: torch.Tensor,
    mass: torch.Tensor,
) -> Iterator[None]:
    AttentionInterface.register(_IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, _no_mask)
    before = model.config._attn_implementation
    try:
        model.config._attn_implementation = _IMPLEMENTATION
        for layer, module in enumerate(modules):
            setattr(module, _ATTRIBUTE, _Task(layer, document, near, gates, mass))
        yield
    finally:
        model.config._attn_implementation = before
        for module in modules:
            if hasattr(module, _ATTRIBUTE):
                delattr(module, _ATTRIBUTE)


def _no_mask(**_arguments: Any) -> None:
    """Returns no mask: sequences are whole and unpadded, and the attention below is causal by itself."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: None,
    scaling: float | None = None,
    **_extras: Any,
) -> tuple[torch.Tensor, None]:
    task: _Task = getattr(module, _ATTRIBUTE)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    group = query.shape[1] // key.shape[1]
    k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    first, length = task.document.questions, query.shape[2]
    prefix = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, :first], k[:, :, :first], v[:, :, :first], is_causal=True, scale=scale
    )
    asking = query[:, :, first:] @ k.transpose(2, 3) * scale  # [1, heads, rows, length]
    rows = torch.arange(first, length, device=query.device)[:, None]
    far = torch.softmax(asking.masked_fill(torch.arange(length, device=query.device) > rows, -torch.inf), dim=-1)
    near = task.near.mask(range(first, length), query.device)
    close = torch.softmax(asking.masked_fill(~near, -torch.inf), dim=-1)
    gate = task.gates[task.layer].to(query.device)[None, :, None, None]
    with torch.no_grad():
        for answer in task.document.answers:
            own = far[0, :, [row - first for row in answer.asking]]
            for fact in answer.facts:
                task.mass[task.layer] += own[:, :, fact.start : fact.stop].sum(2).mean(1).cpu()
    output = torch.cat([prefix, (close + gate * (far - close)) @ v], dim=2)
    return output.transpose(1, 2).contiguous(), None
