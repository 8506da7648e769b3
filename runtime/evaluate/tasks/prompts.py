"""Turns plans of tasks into prompts of a length: token ids, with the facts hidden in filler text."""

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from transformers import PreTrainedTokenizerBase

from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.tasks.every import TASKS, every_task
from surgeon.runtime.evaluate.tasks.plan import Fact, Plan, Query

_SPARE = 6  # tokens of an answer beyond those of the expected items


@dataclass(frozen=True)
class Question:
    """A query as token ids `[tokens]`; its answer has at most `budget` tokens."""

    query: Query
    tokens: torch.Tensor
    budget: int


@dataclass(frozen=True)
class Prompt:
    """A text with hidden facts, as token ids `[tokens]`, and the questions about it.

    With `at_end` there is one question, and it ends the prompt. Otherwise each question is a later turn of its own,
    which knows nothing of the others. Text, the longest question and its answer have at most `length` tokens.
    """

    length: int
    text: torch.Tensor
    questions: tuple[Question, ...]
    at_end: bool


def make_prompts(
    tokenizer: PreTrainedTokenizerBase,
    fillers: Sequence[torch.Tensor],
    lengths: Sequence[int],
    rounds: int,
    seed: int = 0,
    plans: Callable[[random.Random], Sequence[Plan]] = every_task,
    tasks: Collection[str] = TASKS,
) -> tuple[Prompt, ...]:
    """Makes `rounds` times every task, or those of `plans`, for each length; the same for the same seed.

    Questions of other than these `tasks` are left out, as are texts that no question is left for.

    Fillers are token ids `[1, tokens]` of text, taken in turn, each as long as the greatest length. A text with one
    question is asked at its end and later in turn; of a text with several, all are asked later, and at its end one of
    each task.

    Raises:
        ModelError: a task does not fit a length, or the tokenizer has no tokens for a text.
    """
    encoder, drawn, made = Encoder(tokenizer), random.Random(seed), count()
    prompts: list[Prompt] = []
    for length in lengths:
        for turn in range(rounds):
            for index, plan in enumerate(plans(drawn)):
                filler = fillers[next(made) % len(fillers)][0]
                queries = tuple(query for query in plan.queries if query.task in tasks)
                if queries:
                    prompts += _prompts(encoder, Plan(plan.facts, queries), filler, length, turn + index)
    return tuple(prompts)


def fitting_lengths(tokenizer: PreTrainedTokenizerBase, length: int, tasks: Collection[str] = TASKS) -> tuple[int, ...]:
    """The length, preceded by half of it where all of these tasks fit that."""
    filler = torch.zeros(1, length, dtype=torch.long, device="cpu")
    try:
        make_prompts(tokenizer, [filler], (length // 2,), 1, tasks=tasks)
    except ModelError:
        return (length,)
    return (length // 2, length)


class Encoder:
    """A tokenizer without special tokens, except those that it puts before every text, which are in `start`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        first = tokenizer("a")["input_ids"][:1]
        self.start: list[int] = list(first) if first == [tokenizer.bos_token_id] else []

    def ids(self, text: str) -> list[int]:
        """The text's token ids; raises a ModelError where there are none."""
        found = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if not found:
            remedy = "use the model's own tokenizer, or --tasks 0"
            raise ModelError(type(self._tokenizer).__name__, f"tokens for {text!r}", "none", remedy)
        return found

    def question(self, query: Query) -> Question:
        """The query's token ids, with room for its answer."""
        answer = self.ids(" " + ", ".join(query.expected))
        return Question(query, torch.tensor(self.ids(query.text), device="cpu"), len(answer) + _SPARE)


def _prompts(encoder: Encoder, plan: Plan, filler: torch.Tensor, length: int, turn: int) -> Iterator[Prompt]:
    questions = tuple(encoder.question(query) for query in plan.queries)
    by_task: dict[str, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.query.task, []).append(question)
    hidden = [(encoder.ids(fact.text), fact) for fact in plan.facts]
    room = length - max(len(question.tokens) + question.budget for question in questions)
    least = len(encoder.start) + sum(len(ids) for ids, _ in hidden)
    if room < least:
        raise ModelError(
            f"the task {', '.join(by_task)!r}",
            f"prompts of at least {length + least - room} tokens",
            f"{length}",
            "choose a larger --length, or --tasks 0",
        )
    text, _ = laid_out(encoder.start, hidden, filler[: room - least].tolist())
    if len(questions) == 1:
        yield Prompt(length, text, questions, at_end=turn % 2 == 0)
        return
    yield Prompt(length, text, questions, at_end=False)
    for asked in by_task.values():
        yield Prompt(length, text, (asked[turn % len(asked)],), at_end=True)


def laid_out(
    start: list[int], hidden: Sequence[tuple[list[int], Fact]], filler: list[int]
) -> tuple[torch.Tensor, tuple[range, ...]]:
    """The filler with each fact's tokens at its depth, after the tokens that start every text, and its place."""
    whole, place = list(start), 0
    places: dict[int, range] = {}
    for index in sorted(range(len(hidden)), key=lambda index: hidden[index][1].depth):
        ids, fact = hidden[index]
        upto = round(fact.depth * len(filler))
        whole += filler[place:upto]
        places[index] = range(len(whole), len(whole) + len(ids))
        whole += ids
        place = upto
    return torch.tensor([*whole, *filler[place:]], device="cpu"), tuple(places[index] for index in range(len(hidden)))
