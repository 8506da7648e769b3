"""Learning sequences that end with questions, and their answers, about facts hidden in their text.

Plain text hardly shows what a question about one far fact needs of the prompt, so a topology that is learned for
answers on plain text alone loses such facts first.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from surgeon.compiler.learn.measure.text import Sequences
from surgeon.runtime.evaluate.tasks.numbers import several_keys, single_numbers, variable_tracking
from surgeon.runtime.evaluate.tasks.prompts import Encoder, laid_out


def with_questions(
    sequences: Sequences, tokenizer: PreTrainedTokenizerBase, scored: int, seed: int
) -> tuple[Sequences, int]:
    """Turns about half of the sequences of every use into ones that end with questions, and counts them.

    Their length stays, and their last tokens, at most `scored`, are the questions and answers. Validation keeps its
    plain sequences and gets questions about the same text beside them. Sequences that are too short to hide the facts
    in, or to ask a question at the end, stay plain. The same seed gives the same questions.
    """
    encoder, drawn = Encoder(tokenizer), random.Random(seed)
    made = 0

    def asked(plain: torch.Tensor) -> torch.Tensor | None:
        nonlocal made
        found = _questioned(plain, encoder, drawn, scored)
        made += found is not None
        return found

    validate = [*sequences.validate, *(found for plain in sequences.validate if (found := asked(plain)) is not None)]
    return (
        dataclasses.replace(
            sequences,
            calibrate=_every_other(sequences.calibrate, 1, asked),
            validate=tuple(validate),
            refine=tuple(_every_other(fresh, number, asked) for number, fresh in enumerate(sequences.refine)),
            cuts=tuple(_every_other(part, 1, asked) for part in sequences.cuts),
        ),
        made,
    )


def _every_other(
    sequences: Sequence[torch.Tensor], first: int, asked: Callable[[torch.Tensor], torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """The sequences, every second of which has questions if it can; `first` is 0 or 1, up to a multiple of 2."""
    changed = [asked(plain) if (index + first) % 2 == 0 else None for index, plain in enumerate(sequences)]
    return tuple(plain if found is None else found for plain, found in zip(sequences, changed, strict=True))


def _questioned(plain: torch.Tensor, encoder: Encoder, drawn: random.Random, scored: int) -> torch.Tensor | None:
    """A sequence `[1, length]` of the same length whose last tokens ask for facts hidden before, and answer."""
    plans = (drawn.choice(single_numbers(drawn)), several_keys(drawn), variable_tracking(drawn))
    hidden = [(encoder.ids(fact.text), fact) for plan in plans for fact in plan.facts]
    queries = [query for plan in plans for query in plan.queries]
    drawn.shuffle(queries)
    tail: list[int] = []
    for query in queries:
        ids = encoder.ids(f"{query.text} {', '.join(query.expected)}")
        if len(tail) + len(ids) <= scored:
            tail += ids
    room = plain.shape[1] - len(tail) - len(encoder.start) - sum(len(ids) for ids, _ in hidden)
    if not tail or room <= 0:
        return None
    text = laid_out(encoder.start, hidden, plain[0, :room].tolist())
    return torch.cat([text, torch.tensor(tail, device="cpu")])[None]
