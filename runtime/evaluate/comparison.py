"""Perplexity of a model, and the departure of a patched model from the dense one on the same sequences.

Several processes may share the sequences; the result is the same as if one had read them all. The models are not
changed.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.estimates import Estimate, exponential, ratio
from surgeon.runtime.evaluate.logits import hidden_states, logits_of
from surgeon.runtime.evaluate.processes import Processes, processes_of

_LOGITS = 2**24  # computed at a time, 64 MB of them
_LATE = 0.75  # a token is late after this share of its sequence


@dataclass(frozen=True)
class Departure:
    """The departure on one sequence: sums in nats over its predicted tokens, all but the first.

    `divergence` is KL(dense ‖ patched); late tokens are those of the last quarter; `agreements` counts the tokens where
    both models rank the same token first.
    """

    tokens: int
    dense_loss: float
    patched_loss: float
    divergence: float
    late_tokens: int
    late_divergence: float
    agreements: int


DEPARTURE_WIDTH = len(fields(Departure))


@dataclass(frozen=True)
class Comparison:
    """A dense and a patched model on the same sequences."""

    sequences: tuple[Departure, ...]

    @property
    def dense_perplexity(self) -> Estimate:
        """The exponential of the dense model's mean loss per token."""
        return exponential(self._mean([each.dense_loss for each in self.sequences]))

    @property
    def patched_perplexity(self) -> Estimate:
        """The exponential of the patched model's mean loss per token."""
        return exponential(self._mean([each.patched_loss for each in self.sequences]))

    @property
    def perplexity_ratio(self) -> Estimate:
        """Patched over dense; its error comes from the difference on each sequence, so it is small beside theirs."""
        return exponential(self._mean([each.patched_loss - each.dense_loss for each in self.sequences]))

    @property
    def divergence(self) -> Estimate:
        """Mean KL(dense ‖ patched) in nats per token."""
        return self._mean([each.divergence for each in self.sequences])

    @property
    def late_divergence(self) -> Estimate:
        """The divergence over the last quarter of each sequence."""
        late = [each.late_divergence for each in self.sequences]
        return ratio(late, [each.late_tokens for each in self.sequences])

    @property
    def agreement(self) -> Estimate:
        """The share of tokens where both models rank the same token first."""
        return self._mean([each.agreements for each in self.sequences])

    def _mean(self, sums: Sequence[float]) -> Estimate:
        return ratio(sums, [each.tokens for each in self.sequences])


@torch.inference_mode()
def perplexity(model: PreTrainedModel, sequences: Sequence[torch.Tensor], processes: Processes | None = None) -> float:
    """The exponential of the mean negative log-likelihood (nats per token) of every token but each sequence's first.

    `sequences` are token ids `[1, length]`, the same in every process. `processes` share them; the default is all that
    torch.distributed knows of, if any. Logits are computed for some positions at a time.

    Raises:
        ModelError: the model is in training mode or does not compute its logits as expected; there is no sequence, or
            one has fewer than two tokens.
    """
    shared = _prepared(model, sequences, processes)
    rows = {item: (_loss_sum(model, sequences[item]),) for item in shared.own(len(sequences))}
    losses = shared.gather(rows, len(sequences), 1)
    tokens = sum(sequence.shape[1] - 1 for sequence in sequences)
    return math.exp(math.fsum(loss for (loss,) in losses) / tokens)


@torch.inference_mode()
def compare(
    dense: PreTrainedModel,
    patched: PreTrainedModel,
    sequences: Sequence[torch.Tensor],
    processes: Processes | None = None,
) -> Comparison:
    """Reads each sequence with both models, which may share weights; arguments and errors are those of `perplexity`."""
    check_inputs(patched, sequences)
    shared = _prepared(dense, sequences, processes)
    rows = {}
    for item in shared.own(len(sequences)):
        states = tuple(hidden_states(model, sequences[item])[:-1] for model in (dense, patched))
        rows[item] = astuple(departure((dense, patched), states, sequences[item][0, 1:]))
    found = shared.gather(rows, len(sequences), DEPARTURE_WIDTH)
    return Comparison(tuple(departure_from(row) for row in found))


def departure(
    models: tuple[PreTrainedModel, ...], states: tuple[torch.Tensor, ...], targets: torch.Tensor
) -> Departure:
    """The departure of the second model from the first, on the targets `[tokens]` that their states predict.

    `states` are each model's last hidden states `[tokens, hidden_size]`.
    """
    dense, patched = models
    count = targets.numel()
    late = int(count * _LATE)
    chunk = _chunk(dense)
    dense_losses, patched_losses, divergences, agreements = [], [], [], 0
    for dense_states, patched_states, wanted in zip(*(each.split(chunk) for each in (*states, targets)), strict=True):
        expected, found = logits_of(dense, dense_states), logits_of(patched, patched_states)
        dense_losses.append(_loss(expected, wanted))
        patched_losses.append(_loss(found, wanted))
        agreements += int((expected.argmax(dim=-1) == found.to(expected.device).argmax(dim=-1)).sum())
        divergences.append(_divergence(expected, found.to(expected.device)))
    divergence = torch.cat(divergences)
    return Departure(
        tokens=count,
        dense_loss=math.fsum(dense_losses),
        patched_loss=math.fsum(patched_losses),
        divergence=float(divergence.sum()),
        late_tokens=count - late,
        late_divergence=float(divergence[late:].sum()),
        agreements=agreements,
    )


def departure_from(row: Sequence[float]) -> Departure:
    """The departure whose fields are these numbers."""
    tokens, dense_loss, patched_loss, divergence, late_tokens, late_divergence, agreements = row
    return Departure(
        int(tokens), dense_loss, patched_loss, divergence, int(late_tokens), late_divergence, int(agreements)
    )


def _prepared(model: PreTrainedModel, sequences: Sequence[torch.Tensor], processes: Processes | None) -> Processes:
    check_inputs(model, sequences)
    return processes_of(model) if processes is None else processes


def check_inputs(model: PreTrainedModel, sequences: Sequence[torch.Tensor]) -> None:
    """Checks that a model can be measured on the sequences.

    Raises:
        ModelError: the model is in training mode, there is no sequence, or one has fewer than two tokens.
    """
    if model.training:
        raise ModelError(type(model).__name__, "a model for inference", "one in training mode", "call model.eval()")
    if not sequences:
        raise ModelError("sequences", "one or more", "none", "give more text, or a shorter length")
    for index, sequence in enumerate(sequences):
        if sequence.ndim != 2 or sequence.shape[0] != 1 or sequence.shape[1] < 2:
            raise ModelError(
                f"sequences[{index}]",
                "token ids [1, length] of two tokens or more",
                f"a tensor {list(sequence.shape)}",
                "give more text, or one sequence at a time",
            )


def _loss_sum(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    states, targets = hidden_states(model, tokens)[:-1], tokens[0, 1:]
    chunk = _chunk(model)
    losses = []
    for part, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
        losses.append(_loss(logits_of(model, part), wanted))
    return math.fsum(losses)


def _chunk(model: PreTrainedModel) -> int:
    return max(1, _LOGITS // int(model.config.get_text_config().vocab_size))


def _loss(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(cross_entropy(logits, wanted.to(logits.device), reduction="none").double().sum())


def _divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(expected ‖ found) of each position's distribution, in nats."""
    each = kl_div(log_softmax(found, dim=-1), log_softmax(expected, dim=-1), reduction="none", log_target=True)
    return each.sum(dim=-1).double()
