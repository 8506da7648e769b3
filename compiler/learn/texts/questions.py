"""Learning sequences that end with questions, and their answers, about facts hidden in their text.

Plain text hardly shows what a question about one far fact needs of the prompt.
"""

import dataclasses
import random
from collections.abc import Sequence

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
    made: list[torch.Tensor] = []

    def asked(plain: torch.Tensor) -> torch.Tensor:
        """The sequence with questions, if it can have any."""
        document = document_of(plain, encoder, drawn, scored)
        if document is None:
            return plain
        made.append(document.tokens)
        return document.tokens

    def half(plain: Sequence[torch.Tensor], first: int) -> tuple[torch.Tensor, ...]:
        """Every second sequence with questions, from the one with this number on."""
        return tuple(asked(each) if index % 2 == first else each for index, each in enumerate(plain))

    beside = [found for plain in sequences.validate if (found := asked(plain)) is not plain]
    changed = dataclasses.replace(
        sequences,
        validate=(*sequences.validate, *beside),
        calibrate=half(sequences.calibrate, 1),
        refine=tuple(half(fresh, number % 2) for number, fresh in enumerate(sequences.refine)),
        cuts=tuple(half(part, 1) for part in sequences.cuts),
    )
    return changed, len(made)
