"""The departure of models from the dense one on prompts and on what follows them, read with a cache as a user does."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from surgeon.runtime.evaluate.comparison import (
    DEPARTURE_WIDTH,
    Comparison,
    check_inputs,
    departure,
    departure_from,
)
from surgeon.runtime.evaluate.logits import continued_states
from surgeon.runtime.evaluate.processes import Processes, processes_of
from surgeon.runtime.evaluate.steps import Once, anew

CONTINUATION = 256  # tokens, or half of a short sequence


@dataclass(frozen=True)
class Continued:
    """A model beside the dense one, on prompts and on what follows them."""

    prompt: Comparison
    continuation: Comparison


@torch.inference_mode()
def compare_continued(
    models: Sequence[PreTrainedModel],
    sequences: Sequence[torch.Tensor],
    step: int,
    processes: Processes | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    once: Once = anew,
) -> tuple[Continued, ...]:
    """Compares each model but the first, the dense one, with it on sequences `[1, length]`; weights may be shared.

    The last tokens of a sequence, `CONTINUATION` or half of it, are its continuation. Everything before is read in one
    call, as a prompt is; then the continuation, the text's own tokens, `step` at a time with the prompt's cache. Its
    first token is predicted by the prompt's last row. With a `step` of at most the dense rows of a model's recall,
    all rows of the continuation read everything, as decoding does. Each sequence is a step of `once`, which knows the
    models.

    Raises:
        ModelError: as in `perplexity`.
    """
    dense, *others = models
    for model in models:
        check_inputs(model, sequences)
    shared = processes_of(dense) if processes is None else processes
    rows: dict[int, Sequence[float]] = {}
    for item in shared.own(len(sequences)):
        if progress:
            progress("prompts and continuations", item, len(sequences))
        tokens = sequences[item]
        described = {"step": "continuation", "tokens": tokens[0].tolist(), "read_at_a_time": step}
        rows[item] = once(described, partial(_departures, models, tokens, step))
    table = shared.gather(rows, len(sequences), 2 * len(others) * DEPARTURE_WIDTH)

    def comparison(place: int) -> Comparison:
        begin = place * DEPARTURE_WIDTH
        return Comparison(tuple(departure_from(row[begin : begin + DEPARTURE_WIDTH]) for row in table))

    return tuple(Continued(comparison(2 * index), comparison(2 * index + 1)) for index in range(len(others)))


def _departures(models: Sequence[PreTrainedModel], tokens: torch.Tensor, step: int) -> list[float]:
    """The departures of each model but the first from it, on the prompt and on its continuation, one after another."""
    dense, *others = models
    prompt = prompt_length(tokens.shape[1])
    targets = tokens[0, 1:].split([prompt - 1, tokens.shape[1] - prompt])
    dense_states, *other_states = [continued_states(model, tokens, prompt, step) for model in models]
    row: list[float] = []
    for model, found in zip(others, other_states, strict=True):
        parts = zip(*(states.split(list(map(len, targets))) for states in (dense_states, found)), strict=True)
        for both, wanted in zip(parts, targets, strict=True):
            row += astuple(departure((dense, model), both, wanted))
    return row


def prompt_length(length: int) -> int:
    """The tokens of a sequence of this length that come before its continuation."""
    return length - min(CONTINUATION, length // 2)
