"""Answers are those of greedy decoding, for a question at the end and for later turns with the prompt's cache."""

import dataclasses
import re

import pytest
import torch

from models import VOCABULARY, tiny_llama, tokens
from oracles import Oracle, filler, letters
from surgeon.runtime.evaluate.answers import score_later, scores
from surgeon.runtime.evaluate.tasks.plan import Query
from surgeon.runtime.evaluate.tasks.prompts import Prompt, Question, make_prompts

pytestmark = pytest.mark.usefixtures("one_thread")


class Names:
    """Decodes each token of the tiny model as a word."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(chr(97 + token // 10) + chr(97 + token % 10) for token in ids)


def question(ids: torch.Tensor, answer: torch.Tensor) -> Question:
    """A question whose answer is to be exactly these tokens."""
    whole = re.compile(".+")
    return Question(Query("copy", None, "", (Names().decode(answer.tolist()),), whole), ids, len(answer))


def greedy(ids: torch.Tensor, count: int) -> torch.Tensor:
    return tiny_llama().generate(ids[None], max_new_tokens=count, do_sample=False)[0, len(ids) :]


@pytest.mark.parametrize("at_end", [True, False])
def test_an_answer_is_what_generate_writes(at_end: bool) -> None:
    text, asked = tokens(1, 40)[0], tokens(1, 7, seed=2)[0]
    written = greedy(torch.cat([text, asked]), 4)
    right = question(asked, written)
    assert scores(tiny_llama(), Names(), Prompt(60, text, (right,), at_end)) == (1,)
    wrong = question(asked, (written + 1) % VOCABULARY)
    assert scores(tiny_llama(), Names(), Prompt(60, text, (wrong,), at_end)) == (0,)


def test_later_turns_know_nothing_of_each_other() -> None:
    text = tokens(1, 40)[0]
    asked = [tokens(1, size, seed)[0] for seed, size in ((2, 5), (3, 9), (4, 1))]
    questions = tuple(question(each, greedy(torch.cat([text, each]), 3)) for each in asked)
    assert scores(tiny_llama(), Names(), Prompt(60, text, questions, at_end=False)) == (1, 1, 1)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_later_turn_can_be_read_token_by_token(size: int) -> None:
    text, asked = tokens(1, 40)[0], tokens(1, size, seed=2)[0]
    model = tiny_llama()
    with torch.inference_mode():
        read = model(input_ids=text[None], use_cache=True).past_key_values
    written = greedy(torch.cat([text, asked]), 4)
    widths = []
    model.register_forward_pre_hook(lambda _m, _a, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True)
    for answer, expected in ((written, 1), ((written + 1) % VOCABULARY, 0)):
        assert score_later(model, Names(), question(asked, answer), read, by_token=True) == expected
        assert read.get_seq_length() == 40, "the cache is copied"
    assert set(widths) == {1}
    assert len(widths) == 2 * (size - 1 + 4)


def test_decoding_ends_with_the_text_and_with_the_answer() -> None:
    text, asked = tokens(1, 40)[0], tokens(1, 7, seed=2)[0]
    written = greedy(torch.cat([text, asked]), 4)
    prompt = Prompt(60, text, (question(asked, written),), at_end=True)
    model = tiny_llama()
    for ends in (int(written[0]), [VOCABULARY - 1, int(written[0])]):
        model.generation_config.eos_token_id = ends
        assert scores(model, Names(), prompt) == (0,)
    oracle = Oracle(sight=10_000)
    (single, *_) = make_prompts(letters(), [filler(1500)], (1500,), 1)
    assert scores(oracle, letters(), single) == (1,)
    assert oracle.calls == [len(single.text) + len(single.questions[0].tokens), *[1] * 6], (
        "a space, digits, a full stop"
    )
    later = dataclasses.replace(single, at_end=False)
    oracle.calls.clear()
    assert scores(oracle, letters(), later) == (1,)
    assert oracle.calls == [len(single.text), len(single.questions[0].tokens), *[1] * 6]
