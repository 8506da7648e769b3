"""Finds heads that retrieve: a frozen model reads documents, and gates let each head's questions see far or not.

The text before the questions is read densely, and once: no gate changes it. In the rows that ask and answer, a head's
output is O_window + g (O_dense - O_window), where the window is the sink and the last blocks; what the answers' loss
gains by a head's gate tells how much that head brings back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from surgeon.compiler.learn.measure.attending import attending, bounded, dense_attention, last_states
from surgeon.compiler.learn.texts.documents import Document
from surgeon.runtime.evaluate.logits import logits_of
from surgeon.runtime.transformers.layers import find_attention

GATES = (0.3, 0.7)
"""The openings at which gains are measured: at one alone, heads that stand in for each other look useless."""


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
class Gains:
    """The evidence of one document for each head, `[layers, heads]`.

    `gains[i]` is what the answers' loss falls by as the gates open further than `GATES[i]`; `mass` is the attention
    that answers pay to the facts that they state, summed over the facts.
    """

    gains: tuple[torch.Tensor, ...]
    mass: torch.Tensor


def measure_gains(model: PreTrainedModel, document: Document, near: Near) -> Gains:
    """Reads a document, and its questions and answers with every gate at each of the openings."""
    shape = (len(find_attention(model)), model.config.num_attention_heads)
    text = _read_text(model, document)
    mass, gains = torch.zeros(shape), []
    for opening in GATES:
        gates = torch.full(shape, opening, requires_grad=True)
        found = torch.zeros(shape)
        with _gated(model, document, near, text, gates, found):
            (gradient,) = torch.autograd.grad(_loss(model, document), gates)
        gains.append(-gradient.cpu())
        mass += found
    return Gains(tuple(gains), mass)


def retrieval_scores(found: Sequence[Gains]) -> torch.Tensor:
    """The scores of the heads, `[layers, heads]`: higher for those that bring back more from afar.

    It is the sum of the heads' shares of all gains at each opening, and of all attention to facts.
    """
    quantities = [torch.stack([each.mass for each in found]).sum(0)]
    quantities += [torch.stack([each.gains[i] for each in found]).sum(0) for i in range(len(GATES))]
    positive = [quantity.clamp(min=0) for quantity in quantities]
    return torch.stack([quantity / quantity.sum().clamp(min=1e-30) for quantity in positive]).sum(0)


def _read_text(model: PreTrainedModel, document: Document) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values `[1, KV heads, tokens, head_dim]` of each layer, of the text before the questions."""
    read: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(_layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        read.append((k, v))
        return dense_attention(q, k, v, scale)

    with torch.no_grad(), attending(model, attend):
        last_states(model, document.tokens[:, : document.questions])
    return read


def _loss(model: PreTrainedModel, document: Document) -> torch.Tensor:
    """The mean negative log-likelihood of the answers' tokens; the model is to be gated."""
    first = document.questions
    states = last_states(model, document.tokens[:, first:], start=first)
    rows = torch.tensor([row for answer in document.answers for row in answer.asking], device=states.device)
    expected = document.tokens[0].to(states.device)[rows + 1]
    return torch.nn.functional.cross_entropy(logits_of(model, states[rows - first]), expected)


@contextmanager
def _gated(
    model: PreTrainedModel,
    document: Document,
    near: Near,
    text: Sequence[tuple[torch.Tensor, torch.Tensor]],
    gates: torch.Tensor,
    mass: torch.Tensor,
) -> Iterator[None]:
    """Lets the rows from the questions on, which the model reads, see far as their head's gate lets them.

    `text` is what `_read_text` found; `mass` `[layers, heads]` is filled.
    """
    first, length = document.questions, document.tokens.shape[1]

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        k, v = (torch.cat([before, own], dim=2) for before, own in zip(text[layer], (k, v), strict=True))
        group = q.shape[1] // k.shape[1]
        k, v = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v))
        scores = q @ k.transpose(2, 3) * scale  # [1, heads, rows, length]
        rows = torch.arange(first, length, device=q.device)[:, None]
        far = torch.softmax(scores.masked_fill(torch.arange(length, device=q.device) > rows, -torch.inf), dim=-1)
        close = torch.softmax(scores.masked_fill(~near.mask(range(first, length), q.device), -torch.inf), dim=-1)
        mass[layer] = _mass_on_facts(document, far[0].detach())
        gate = gates[layer].to(q.device)[None, :, None, None]
        return (close + gate * (far - close)) @ v

    with attending(model, attend), bounded(model, length - first):
        yield


def _mass_on_facts(document: Document, weights: torch.Tensor) -> torch.Tensor:
    """The part of attention `[heads, rows, length]` that answers pay to their facts, summed over these: `[heads]`."""
    found = torch.zeros(weights.shape[0])
    for answer in document.answers:
        own = weights[:, [row - document.questions for row in answer.asking]]
        for fact in answer.facts:
            found += own[:, :, fact.start : fact.stop].sum(2).mean(1).cpu()
    return found
