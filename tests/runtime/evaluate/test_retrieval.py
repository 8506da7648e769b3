"""Retrieval of several models: who copies scores 1, who forgets 0, and what dense cannot do is not asked."""

import math

import pytest

from kept_steps import KeptSteps
from oracles import Oracle, filler, letters
from surgeon.runtime.evaluate.estimates import Estimate
from surgeon.runtime.evaluate.processes import Processes
from surgeon.runtime.evaluate.retrieval import (
    AskedQuestion,
    Retrieval,
    mean_score,
    mean_share,
    of_dense,
    retrieve,
    task_names,
)
from surgeon.runtime.evaluate.steps import named
from surgeon.runtime.evaluate.tasks.prompts import make_prompts

LENGTH = 1500
HALF = LENGTH // 2


@pytest.fixture(scope="module")
def found() -> Retrieval:
    """Of a model that sees all, the same again, one that sees the last half, and one that sees the question only."""
    prompts = make_prompts(letters(), [filler(LENGTH)], (LENGTH,), 1)
    models = [Oracle(LENGTH), Oracle(LENGTH), Oracle(HALF), Oracle(1)]
    return retrieve(models, letters(), prompts, Processes(), lambda *_: None)


def test_a_model_that_copies_scores_1_and_one_that_forgets_0(found: Retrieval) -> None:
    copied, again, near, forgotten = found.scores
    assert set(copied) == {1}
    assert again == copied
    assert set(forgotten) == {0}
    for question, score in zip(found.questions, near, strict=True):
        assert question.depth is not None
        assert question.depth == 0.5 or score == (question.depth > 0.5)
    shares = of_dense(found.questions, near, copied)
    assert shares.keys() == {"single number", "several keys"}
    assert all(0.3 < share.value < 0.7 for share in shares.values())
    assert {share.value for share in of_dense(found.questions, again, copied).values()} == {1}


def test_what_dense_cannot_do_is_dropped_and_named(found: Retrieval) -> None:
    assert task_names(found.questions) == ("single number", "several keys")
    assert {each.task: (each.questions, each.score) for each in found.dropped} == {
        "several queries": (3, 0),
        "several values": (3, 0),
        "variable tracking": (3, 0),
        "common words": (1, 0),
        "frequent words": (1, 0),
    }
    assert {each.asked for each in found.questions} == {"end", "later"}


def test_dropped_questions_are_asked_of_dense_alone() -> None:
    prompts = make_prompts(letters(), [filler(LENGTH)], (LENGTH,), 1)
    dense, other = Oracle(LENGTH), Oracle(LENGTH)
    retrieve([dense, other], letters(), prompts, Processes(), lambda *_: None)
    texts = [len(prompt.text) for prompt in prompts if not prompt.at_end]
    assert sum(call in texts for call in dense.calls) > sum(call in texts for call in other.calls)
    assert len(other.calls) < len(dense.calls)


def test_without_a_kept_task_the_others_are_asked_nothing() -> None:
    prompts = make_prompts(letters(), [filler(LENGTH)], (LENGTH,), 1)
    other = Oracle(LENGTH)
    found = retrieve([Oracle(1), other], letters(), prompts, Processes(), lambda *_: None)
    assert (found.questions, found.scores, len(found.dropped)) == ((), ((), ()), 7)
    assert other.calls == []


def test_a_prompt_that_was_answered_before_is_not_asked_again() -> None:
    prompts = make_prompts(letters(), [filler(LENGTH)], (LENGTH,), 1)
    kept = KeptSteps()

    def asked(models: list[Oracle]) -> Retrieval:
        each = [named(kept, model=index) for index in range(len(models))]
        return retrieve(models, letters(), prompts, Processes(), lambda *_: None, each)

    first = asked([Oracle(LENGTH), Oracle(HALF)])
    models = [Oracle(LENGTH), Oracle(HALF)]
    assert asked(models) == first
    assert [model.calls for model in models] == [[], []]
    other = Oracle(1)
    *_, forgotten = asked([Oracle(LENGTH), Oracle(HALF), other]).scores
    assert other.calls
    assert set(forgotten) == {0}


def test_errors_are_of_paired_differences_over_the_prompts() -> None:
    asked = [AskedQuestion("keys", 64, None, "later", prompt) for prompt in (0, 0, 1, 1, 2, 2)]
    dense, same, less = [1.0, 1, 0, 0, 1, 1], [1.0, 1, 0, 0, 1, 1], [1.0, 0, 0, 0, 1, 1]
    assert mean_score(asked, dense).error == pytest.approx(1 / 3)  # of three prompts with 1, 0 and 1
    assert of_dense(asked, same, dense)["keys"] == Estimate(1, 0)
    share = of_dense(asked, less, dense)["keys"]
    residuals = [1 - 0.75 * 2, 0, 2 - 0.75 * 2]
    assert share.value == 0.75
    assert share.error == pytest.approx(math.sqrt(sum(each**2 for each in residuals) * 3 / 2) / 4)


def test_the_mean_over_tasks_counts_each_once() -> None:
    assert mean_share([Estimate(1, 0.3), Estimate(0.5, 0.4)]) == Estimate(0.75, 0.25)
    assert mean_share([Estimate(1, 0.3), Estimate(0.5, None)]) == Estimate(0.75, None)
