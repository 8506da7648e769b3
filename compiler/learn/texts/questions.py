"""Learning sequences that end with questions, and their answers, about facts hidden in their text.

Plain text hardly shows what a question about one far fact needs of the prompt.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from surgeon.compiler.learn.texts.documents import document_of
from surgeon.compiler.learn.texts.text import Sequences
from surgeon.runtime.evaluate.tasks.prompts import Encoder


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
        found = document_of(plain, encoder, drawn, scored)
        made += found is not None
        return None if found is None else found.tokens

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
