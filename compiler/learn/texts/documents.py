"""Documents with facts hidden in learning text, that end with questions about them and the answers."""

import random
from dataclasses import dataclass

import torch

from surgeon.runtime.evaluate.tasks.numbers import several_keys, single_numbers, variable_tracking
from surgeon.runtime.evaluate.tasks.plan import Query
from surgeon.runtime.evaluate.tasks.prompts import Encoder, laid_out


@dataclass(frozen=True)
class Answer:
    """An answer in a document: the tokens that it is read from, and the facts that state it, as ranges of tokens.

    The token at place i of `asking` predicts an answer's token at place i + 1.
    """

    asking: range
    facts: tuple[range, ...]


@dataclass(frozen=True)
class Document:
    """A sequence `[1, length]` whose tokens from `questions` on ask and answer."""

    tokens: torch.Tensor
    questions: int
    answers: tuple[Answer, ...]


def document_of(plain: torch.Tensor, encoder: Encoder, drawn: random.Random, most: int) -> Document | None:
    """Hides facts in a sequence `[1, length]` and lets it end with at most `most` tokens of questions and answers.

    The length stays. The facts are one number, one for each of five keys, and values through chains of names. None if
    the sequence is too short for them, or the end for one question.
    """
    plans = (drawn.choice(single_numbers(drawn)), several_keys(drawn), variable_tracking(drawn))
    hidden = [(encoder.ids(fact.text), fact) for plan in plans for fact in plan.facts]
    queries = [query for plan in plans for query in plan.queries]
    drawn.shuffle(queries)
    tail: list[int] = []
    asked: list[tuple[Query, range]] = []
    for query in queries:
        question, answer = encoder.ids(query.text), encoder.ids(" " + ", ".join(query.expected))
        if len(tail) + len(question) + len(answer) <= most:
            begin = len(tail) + len(question)
            asked.append((query, range(begin - 1, begin + len(answer) - 1)))
            tail += [*question, *answer]
    room = plain.shape[1] - len(tail) - len(encoder.start) - sum(len(ids) for ids, _ in hidden)
    if not tail or room <= 0:
        return None
    text, places = laid_out(encoder.start, hidden, plain[0, :room].tolist())
    answers = []
    for query, asking in asked:
        stated = [any(item in fact.text for item in query.expected) for _, fact in hidden]
        facts = tuple(place for place, states in zip(places, stated, strict=True) if states)
        answers.append(Answer(range(len(text) + asking.start, len(text) + asking.stop), facts))
    whole = torch.cat([text, torch.tensor(tail, device="cpu")])[None]
    return Document(whole, len(text), tuple(answers))
