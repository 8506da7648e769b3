"""Rounds of questions: who is asked when, which answers count as right, who is left out, and the sums of times."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.tasks.plan import Query
from workers.protocol import Answer
from workers.rounds import Question, Rounds, times_of

RIGHT, WRONG = 42, 41


@dataclass
class Scripted:
    """A worker whose answers are one token each, and which ends when they do; the calls of all go to one list."""

    name: str
    tokens: list[int]
    calls: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    def ask(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        self.calls.append((self.name, tuple(prompt)))
        if not self.tokens:
            raise ModelError(self.name, "an answer", "it ended", "read its log")
        return Answer((self.tokens.pop(0),), 1.0, 2.0, 3.0, 4.0)


def question(number: int) -> Question:
    return Question((number,), Query("number", 0.5, "which?", (str(RIGHT),)))


def rounds_of(*workers: Scripted) -> tuple[Rounds, list[tuple[str, tuple[int, ...]]]]:
    calls: list[tuple[str, tuple[int, ...]]] = []
    for worker in workers:
        worker.calls = calls
    named: Any = {worker.name: worker for worker in workers}
    return Rounds(named, 1, lambda tokens: " ".join(map(str, tokens)), lambda line: None), calls


def test_all_are_asked_in_turn_and_each_is_first_once() -> None:
    rounds, calls = rounds_of(*(Scripted(name, [RIGHT] * 3) for name in "abc"))
    rounds.run([question(1), question(2), question(3)], must_find=True)
    assert "".join(name for name, _ in calls) == "abcbcacab"
    assert [prompt for _, prompt in calls] == [(1,)] * 3 + [(2,)] * 3 + [(3,)] * 3


def test_the_first_answer_is_judged_and_not_timed() -> None:
    rounds, _ = rounds_of(Scripted("a", [RIGHT, WRONG, RIGHT]))
    rounds.run([question(1), question(2), question(3)], must_find=True)
    record = rounds.records["a"]
    assert (record.asked, record.right) == (3, 2)
    assert [answer.tokens for answer in record.timed] == [(WRONG,), (RIGHT,)]


def test_who_ends_is_left_out_and_asked_no_more() -> None:
    rounds, calls = rounds_of(Scripted("a", [RIGHT]), Scripted("b", [RIGHT] * 3))
    rounds.run([question(1), question(2), question(3)], must_find=True)
    assert rounds.left_out == {"a": "it ended"}
    assert [name for name, _ in calls].count("a") == 2
    assert rounds.records["b"].asked == 3


def test_who_has_no_right_answer_where_all_of_another_are_is_left_out() -> None:
    rounds, _ = rounds_of(Scripted("a", [RIGHT] * 2), Scripted("b", [WRONG] * 2), Scripted("c", [WRONG, RIGHT]))
    rounds.run([question(1), question(2)], must_find=True)
    assert rounds.left_out == {"b": "none of its 2 answers was right, where another's all were"}


def test_nobody_is_left_out_of_what_nobody_is_sure_of() -> None:
    rounds, _ = rounds_of(Scripted("a", [WRONG] * 2), Scripted("b", [WRONG, RIGHT]))
    rounds.run([question(1), question(2)], must_find=True)
    assert rounds.left_out == {}


def test_nobody_is_left_out_where_nothing_must_be_found() -> None:
    rounds, _ = rounds_of(Scripted("a", [RIGHT] * 2), Scripted("b", [WRONG] * 2))
    rounds.run([question(1), question(2)], must_find=False)
    assert rounds.left_out == {}
    assert rounds.records["b"].right == 0


def test_times_are_the_medians_and_the_fastest() -> None:
    answers = [
        Answer((0,) * 5, first, first + later, 2 * first, 2 * first + later)
        for first, later in ((1, 4), (2, 2), (9, 8))
    ]
    assert times_of(answers) == pytest.approx(
        {"first_s": 2, "first_min_s": 1, "first_cpu_s": 4, "tokens_s": 1, "tokens_max_s": 2, "token_cpu_s": 1}
    )
