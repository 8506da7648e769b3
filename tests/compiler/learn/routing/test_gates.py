"""Gates on what heads see of far tokens: their gains are derivatives of the answers' loss, by its definition."""

import random
from functools import cache

import pytest
import torch
from transformers import LlamaForCausalLM

from models import tiny_config, tiny_llama
from oracles import filler, letters
from surgeon.compiler.learn.measure import attending
from surgeon.compiler.learn.measure.checkpoint import frozen
from surgeon.compiler.learn.routing import gates
from surgeon.compiler.learn.routing.gates import GATES, Gains, Near, measure_gains, retrieval_scores
from surgeon.compiler.learn.texts.documents import Document, document_of
from surgeon.runtime.evaluate.tasks.prompts import Encoder
from surgeon.runtime.transformers.layers import find_attention

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR = Near(block_size=16, sink=1, window=2)


@cache
def model() -> LlamaForCausalLM:
    return tiny_llama(tiny_config(vocab_size=len(letters())))


@cache
def document() -> Document:
    found = document_of(filler(1200), Encoder(letters()), random.Random(0), 300)
    assert found is not None
    return found


def loss_at(opening: torch.Tensor) -> torch.Tensor:
    text = gates._read_text(model(), document())
    with torch.no_grad(), gates._gated(model(), document(), NEAR, text, opening, torch.zeros(opening.shape)):
        return gates._loss(model(), document())


def test_an_answer_names_its_tokens_and_the_facts_that_state_it() -> None:
    text = [str(letters().decode([token])) for token in document().tokens[0].tolist()]
    assert len(document().answers) > 1
    for answer in document().answers:
        said = "".join(text[row + 1] for row in answer.asking)
        assert answer.asking.start >= document().questions
        assert said.startswith(" ")
        assert answer.facts
        for fact in answer.facts:
            assert fact.stop <= document().questions
            assert any(item in "".join(text[fact.start : fact.stop]) for item in said[1:].split(", "))


def test_open_gates_are_the_dense_model() -> None:
    shape = (len(find_attention(model())), model().config.num_attention_heads)
    rows = torch.tensor([row for answer in document().answers for row in answer.asking])
    with torch.no_grad():
        logits = model()(document().tokens).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[rows], document().tokens[0][rows + 1])
    torch.testing.assert_close(loss_at(torch.ones(shape)), expected, rtol=1e-4, atol=1e-5)
    assert abs(float(loss_at(torch.zeros(shape)) - expected)) > 1e-4


def test_gains_are_what_the_loss_falls_by() -> None:
    with frozen(model()):
        found = measure_gains(model(), document(), NEAR)
    shape = found.mass.shape
    for opening, gains in zip(GATES, found.gains, strict=True):
        for place in ((0, 0), (1, 3)):
            step = torch.zeros(shape)
            step[place] = 0.05
            centre = torch.full(shape, opening)
            slope = (loss_at(centre - step) - loss_at(centre + step)) / 0.1
            torch.testing.assert_close(gains[place], slope, rtol=0.05, atol=2e-5)
    assert (found.mass > 0).all()


def test_keeping_less_for_the_backward_pass_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with frozen(model()):
        kept = measure_gains(model(), document(), NEAR)
        monkeypatch.setattr(attending, "KEPT_BYTES", 0)
        remade = measure_gains(model(), document(), NEAR)
    assert torch.equal(remade.mass, kept.mass)
    assert all(map(torch.equal, remade.gains, kept.gains))


def test_near_is_the_sink_and_the_last_blocks() -> None:
    mask = NEAR.mask(range(70, 73), torch.device("cpu"))
    assert mask.shape == (3, 73)
    for row in range(3):
        seen = set(mask[row].nonzero().flatten().tolist())
        assert seen == {*range(16), *range(48, 70 + row + 1)}


def test_scores_are_shares_of_what_helps() -> None:
    gains = torch.tensor([[3.0, -1.0], [1.0, 0.0]])
    found = retrieval_scores([Gains((gains, gains), torch.tensor([[0.0, 0.0], [0.0, 2.0]]))])
    torch.testing.assert_close(found, torch.tensor([[1.5, 0.0], [0.5, 1.0]]))
