"""Prompts have their length, facts their depth, and what does not fit is refused."""

import re

import pytest
import torch

from oracles import filler, letters
from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.tasks.numbers import DEPTHS, single_numbers
from surgeon.runtime.evaluate.tasks.prompts import Prompt, fitting_lengths, make_prompts

LENGTH = 1500


@pytest.fixture(scope="module")
def prompts() -> tuple[Prompt, ...]:
    return make_prompts(letters(), [filler(LENGTH)], (LENGTH - 400, LENGTH), rounds=2)


def text_of(ids: torch.Tensor) -> str:
    return str(letters().decode(ids))


def test_text_question_and_answer_fill_the_length(prompts: tuple[Prompt, ...]) -> None:
    for prompt in prompts:
        whole = [len(prompt.text) + len(each.tokens) + each.budget for each in prompt.questions]
        assert max(whole) <= prompt.length
        assert prompt.text[0] == 0, "the token that starts a text"
        for question in prompt.questions:
            assert text_of(question.tokens) == question.query.text
            assert question.budget > len(" ".join(question.query.expected))
    assert {prompt.length for prompt in prompts} == {LENGTH - 400, LENGTH}


def test_a_fact_stands_at_its_depth(prompts: tuple[Prompt, ...]) -> None:
    single = [prompt for prompt in prompts if prompt.questions[0].query.task == "single number"]
    assert [prompt.questions[0].query.depth for prompt in single] == [*DEPTHS] * 4
    for prompt in single:
        text = text_of(prompt.text)
        before = text.index("\n") - len("<s>")
        after = len(text) - text.rindex("\n") - 1
        assert text.count(prompt.questions[0].query.expected[0]) == 2
        assert before / (before + after) == pytest.approx(prompt.questions[0].query.depth, abs=0.01)


def test_every_task_is_asked_at_the_end_and_later(prompts: tuple[Prompt, ...]) -> None:
    for length in (LENGTH - 400, LENGTH):
        own = [prompt for prompt in prompts if prompt.length == length]
        asked = {(each.query.task, prompt.at_end) for prompt in own for each in prompt.questions}
        assert len(asked) == 2 * 7
        assert all(len(prompt.questions) == 1 for prompt in own if prompt.at_end)
        later = max((prompt for prompt in own if not prompt.at_end), key=lambda prompt: len(prompt.questions))
        assert [question.query.depth for question in later.questions] == [*DEPTHS, None, None]


def test_the_same_seed_makes_the_same_prompts(prompts: tuple[Prompt, ...]) -> None:
    def numbers(seed: int) -> list[str]:
        made = make_prompts(letters(), [filler(LENGTH)], (LENGTH,), 1, seed)
        return [number for prompt in made for number in re.findall(r"\d+", text_of(prompt.text))]

    assert numbers(0) == numbers(0) != numbers(1)


def test_tasks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match=r"the task '.*': expected prompts of at least \d+ tokens, got 400; choose"):
        make_prompts(letters(), [filler(400)], (400,), 1)
    assert make_prompts(letters(), [filler(400)], (400,), 0) == ()
    assert fitting_lengths(letters(), 900) == (900,)
    assert fitting_lengths(letters(), 2 * LENGTH) == (LENGTH, 2 * LENGTH)


def test_a_tokenizer_without_tokens_is_refused() -> None:
    silent = type("Silent", (), {"bos_token_id": None, "__call__": lambda *_, **__: {"input_ids": []}})()
    with pytest.raises(ModelError, match=r"Silent: expected tokens for ' \d+', got none; use"):
        make_prompts(silent, [filler(400)], (400,), 1)


def test_plans_can_be_chosen() -> None:
    made = make_prompts(letters(), [filler(400)], (400,), 1, plans=single_numbers)  # too short for every task
    assert [question.query.depth for prompt in made for question in prompt.questions] == list(DEPTHS)
    assert [prompt.at_end for prompt in made] == [True, False, True, False, True]


def test_only_the_tasks_that_are_named_are_asked(prompts: tuple[Prompt, ...]) -> None:
    few = make_prompts(
        letters(), [filler(LENGTH)], (LENGTH - 400, LENGTH), rounds=2, tasks=("single number", "several keys")
    )
    assert {each.query.task for prompt in few for each in prompt.questions} == {"single number", "several keys"}
    for task in ("single number", "several keys"):
        asked, found = (
            [
                (prompt.length, prompt.at_end, each.query)
                for prompt in made
                for each in prompt.questions
                if each.query.task == task
            ]
            for made in (prompts, few)
        )
        assert asked == found, "the same questions as among all tasks"


def test_tasks_that_are_not_asked_need_not_fit() -> None:
    assert make_prompts(letters(), [filler(400)], (400,), 1, tasks=("single number",))
    assert fitting_lengths(letters(), 900, ("single number",)) == (450, 900)
