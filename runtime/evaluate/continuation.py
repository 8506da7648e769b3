"""The departure of models from the dense one on prompts and on what follows them, read with a cache as a user does."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

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
) -> tuple[Continued, ...]:
    """Compares each model but the first, the dense one, with it on sequences `[1, length]`; weights may be shared.

    The last tokens of a sequence, `CONTINUATION` or half of it, are its continuation. Everything before is read in one
    call, as a prompt is; then the continuation, the text's own tokens, `step` at a time with the prompt's cache. Its
    first token is predicted by the prompt's last row. With a `step` of at most the dense rows of a model's recall,
    all rows of the continuation read everything, as decoding does.

    Raises:
        ModelError: as in `perplexity`.
    """
    dense, *others = models
    for model in models:
        check_inputs(model, sequences)
    shared = processes_of(dense) if processes is None else processes
    rows: dict[int, list[float]] = {}
    for item in shared.own(len(sequences)):
        if progress:
            progress("prompts and continuations", item, len(sequences))
        tokens = sequences[item]
        prompt = prompt_length(tokens.shape[1])
        targets = tokens[0, 1:].split([prompt - 1, tokens.shape[1] - prompt])
        states = [continued_states(model, tokens, prompt, step) for model in models]
        rows[item] = []
        for model, found in zip(others, states[1:], strict=True):
            parts = zip(states[0].split(list(map(len, targets))), found.split(list(map(len, targets))), strict=True)
            for both, wanted in zip(parts, targets, strict=True):
                rows[item] += astuple(departure((dense, model), both, wanted))
    table = shared.gather(rows, len(sequences), 2 * len(others) * DEPARTURE_WIDTH)

    def comparison(place: int) -> Comparison:
        begin = place * DEPARTURE_WIDTH
        return Comparison(tuple(departure_from(row[begin : begin + DEPARTURE_WIDTH]) for row in table))

    return tuple(Continued(comparison(2 * index), comparison(2 * index + 1)) for index in range(len(others)))


def prompt_length(length: int) -> int:
    """The tokens of a sequence of this length that come before its continuation."""
    return length - min(CONTINUATION, length // 2)
