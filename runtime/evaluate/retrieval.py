"""Retrieval of several models on the same tasks: who is asked what, and the scores beside the dense model's."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgeon.runtime.evaluate.answers import scores
from surgeon.runtime.evaluate.estimates import Estimate, ratio
from surgeon.runtime.evaluate.processes import Processes
from surgeon.runtime.evaluate.steps import Once, anew
from surgeon.runtime.evaluate.tasks.prompts import Prompt

KEPT = 0.5  # a task says something about a patched model only if the dense one scores this on average

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AskedQuestion:
    """A question of a task: the length of its prompt in tokens, and the depth of what it asks for, if it is one fact.

    `asked` is "end" for a question that ends the prompt, and "later" for a turn of its own after it. Questions with the
    same `prompt`, a number, share a text, so that their scores are not independent.
    """

    task: str
    length: int
    depth: float | None
    asked: str
    prompt: int


@dataclass(frozen=True)
class DroppedTask:
    """A task that tells nothing here: the dense model's mean score on this many questions is too low."""

    task: str
    questions: int
    score: float


@dataclass(frozen=True)
class Retrieval:
    """The questions of the kept tasks with the score of each, for each model; and the tasks that were dropped."""

    questions: tuple[AskedQuestion, ...]
    scores: tuple[tuple[float, ...], ...]
    dropped: tuple[DroppedTask, ...]


def retrieve(
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    processes: Processes,
    progress: Progress,
    once: Sequence[Once] | None = None,
) -> Retrieval:
    """Asks all models, the dense one first, the questions of the tasks on which the dense one scores at least `KEPT`.

    The processes share the prompts. The others are not asked what the dense model cannot answer. Each prompt is a step
    of each model's `once`.
    """
    dense, *others = models
    dense_once, *others_once = once or [anew] * len(models)
    asked = [
        AskedQuestion(
            question.query.task, prompt.length, question.query.depth, "end" if prompt.at_end else "later", index
        )
        for index, prompt in enumerate(prompts)
        for question in prompt.questions
    ]
    found = _ask(
        dense, tokenizer, prompts, processes, lambda done: progress("tasks: dense", done, len(prompts)), dense_once
    )
    dropped = tuple(
        DroppedTask(task, len(own), math.fsum(own) / len(own))
        for task in task_names(asked)
        if math.fsum(own := _own(asked, found, task)) < KEPT * len(own)
    )
    names = {each.task for each in dropped}
    kept = [index for index, question in enumerate(asked) if question.task not in names]
    rows = [tuple(found[index] for index in kept)]
    places = {index: at for at, index in enumerate(sorted({asked[index].prompt for index in kept}))}
    left = [_without(prompts[index], names) for index in places]
    for number, (model, model_once) in enumerate(zip(others, others_once, strict=True)):
        done_before = number * len(left)

        def told(done: int, before: int = done_before) -> None:
            progress("tasks", before + done, len(others) * len(left))

        rows.append(tuple(_ask(model, tokenizer, left, processes, told, model_once)))
    return Retrieval(tuple(asked[index] for index in kept), tuple(rows), dropped)


def task_names(questions: Iterable[AskedQuestion]) -> tuple[str, ...]:
    """The tasks of the questions, in their order."""
    return tuple(dict.fromkeys(question.task for question in questions))


def mean_score(questions: Sequence[AskedQuestion], found: Sequence[float]) -> Estimate:
    """The mean score; its standard error is over the prompts, which several questions may share."""
    return ratio(_by_prompt(questions, found), _by_prompt(questions, [1.0] * len(found)))


def of_dense(questions: Sequence[AskedQuestion], found: Sequence[float], dense: Sequence[float]) -> dict[str, Estimate]:
    """A model's score over the dense model's on each task; errors are of the paired differences, over the prompts."""
    shares = {}
    for task in task_names(questions):
        own = [question for question in questions if question.task == task]
        pair = (_by_prompt(own, _own(questions, scored, task)) for scored in (found, dense))
        shares[task] = ratio(*pair)
    return shares


def mean_share(shares: Iterable[Estimate]) -> Estimate:
    """The mean over the tasks, whose errors are taken to be independent."""
    each = tuple(shares)
    errors = [share.error for share in each]
    known = [error for error in errors if error is not None]
    error = math.sqrt(math.fsum(error**2 for error in known)) / len(each) if len(known) == len(each) else None
    return Estimate(math.fsum(share.value for share in each) / len(each), error)


def _ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    processes: Processes,
    told: Callable[[int], None],
    once: Once,
) -> list[float]:
    """The score of every question of the prompts, in order."""
    if not prompts:
        return []
    width = max(len(prompt.questions) for prompt in prompts)
    rows = {}
    for item in processes.own(len(prompts)):
        told(item)
        own = once(_described(prompts[item]), partial(scores, model, tokenizer, prompts[item]))
        rows[item] = (*own, *[0.0] * (width - len(own)))
    table = processes.gather(rows, len(prompts), width)
    return [score for row, prompt in zip(table, prompts, strict=True) for score in row[: len(prompt.questions)]]


def _described(prompt: Prompt) -> dict[str, object]:
    questions = []
    for question in prompt.questions:
        query = asdict(question.query) | {"item": question.query.item.pattern}
        questions.append({"tokens": question.tokens.tolist(), "budget": question.budget, "query": query})
    return {"step": "answers", "text": prompt.text.tolist(), "questions": questions, "at_end": prompt.at_end}


def _without(prompt: Prompt, tasks: set[str]) -> Prompt:
    kept = tuple(question for question in prompt.questions if question.query.task not in tasks)
    return Prompt(prompt.length, prompt.text, kept, prompt.at_end)


def _own(questions: Sequence[AskedQuestion], found: Sequence[float], task: str) -> list[float]:
    return [score for question, score in zip(questions, found, strict=True) if question.task == task]


def _by_prompt(questions: Sequence[AskedQuestion], found: Sequence[float]) -> list[float]:
    """The sum over the questions of each prompt."""
    sums: dict[int, float] = {}
    for question, score in zip(questions, found, strict=True):
        sums[question.prompt] = sums.get(question.prompt, 0.0) + score
    return list(sums.values())
