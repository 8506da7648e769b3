"""Asks workers in turn, judges their answers, and sums up the times."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.tasks.plan import Query
from workers.process import Worker
from workers.protocol import Answer


@dataclass(frozen=True)
class Question:
    """A prompt that ends in a question, as token ids; `query` judges its answer."""

    prompt: tuple[int, ...]
    query: Query


@dataclass
class Record:
    """A worker's timed answers, and of all its answers those that are right."""

    timed: list[Answer] = field(default_factory=list)
    asked: int = 0
    right: int = 0


@dataclass
class Rounds:
    """Workers by name, each of which continues every question by `new_tokens`, and what is known of them so far.

    `words` makes text of tokens, and `say` gets a line for each answer. `left_out` says why a worker does not count.
    """

    workers: Mapping[str, Worker]
    new_tokens: int
    words: Callable[[Sequence[int]], str]
    say: Callable[[str], None]
    records: dict[str, Record] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def run(self, questions: Sequence[Question], must_find: bool) -> None:
        """Has each question answered by one worker after the other, whose order rotates.

        The first question warms up and is not timed. With `must_find`, who has no right answer is left out if another
        has no wrong one.
        """
        self.records |= {name: Record() for name in self.workers}
        for turn, question in enumerate(questions):
            names = [name for name in self.workers if name not in self.left_out]
            first = turn % max(1, len(names))
            for name in names[first:] + names[:first]:
                self._ask(name, question, timed=turn > 0)
        perfect = must_find and any(record.asked == record.right == len(questions) for record in self.records.values())
        for name, record in self.records.items():
            if perfect and not record.right and name not in self.left_out:
                self._leave_out(name, f"none of its {record.asked} answers was right, where another's all were")

    def _ask(self, name: str, question: Question, timed: bool) -> None:
        try:
            answer = self.workers[name].ask(question.prompt, self.new_tokens)
        except ModelError as error:
            self._leave_out(name, error.got)
            return
        record, text = self.records[name], self.words(answer.tokens)
        record.asked += 1
        record.right += question.query.score(text) == 1
        if timed:
            record.timed.append(answer)
        times = f"first token {answer.first_s:.2f} s, all {answer.whole_s:.2f} s"
        self.say(f"{len(question.prompt):,} tokens, {name}: {times}{'' if timed else ', untimed'}: {text!r}")

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out[name] = reason
        self.say(f"{name}: left out: {reason}")


def times_of(answers: Sequence[Answer]) -> dict[str, float]:
    """Medians of the times, and the fastest of each.

    Seconds until the first token, and tokens a second after it; the CPU seconds of the first, and of a later token.
    """
    first = [answer.first_s for answer in answers]
    rates = [(len(answer.tokens) - 1) / (answer.whole_s - answer.first_s) for answer in answers]
    later_cpu = [(answer.whole_cpu_s - answer.first_cpu_s) / (len(answer.tokens) - 1) for answer in answers]
    return {
        "first_s": statistics.median(first),
        "first_min_s": min(first),
        "first_cpu_s": statistics.median(answer.first_cpu_s for answer in answers),
        "tokens_s": statistics.median(rates),
        "tokens_max_s": max(rates),
        "token_cpu_s": statistics.median(later_cpu),
    }
