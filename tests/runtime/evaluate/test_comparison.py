"""Perplexity and the comparison of two models follow their definitions, in one process and in two."""

import math
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedModel

from models import VOCABULARY, Compiled, tiny_config, tiny_llama, tokens
from processes import torchrun
from surgeon.runtime import fingerprint, patch
from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate import comparison
from surgeon.runtime.evaluate.comparison import Comparison, Departure, compare, perplexity

LENGTHS = (60, 45, 70)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Sets chunks to 16 positions, so that a sequence has several and a shorter last one."""
    monkeypatch.setattr(comparison, "_LOGITS", 16 * VOCABULARY)


@pytest.fixture
def sequences() -> list[torch.Tensor]:
    return [tokens(1, length, seed=length) for length in LENGTHS]


def log_probabilities(model: PreTrainedModel, sequence: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, fp64 `[tokens, vocabulary]`, of a sequence's predicted tokens, by the model's own forward."""
    with torch.no_grad():
        return torch.log_softmax(model(sequence).logits[0, :-1].double(), dim=-1)


def loss(model: PreTrainedModel, sequence: torch.Tensor) -> float:
    return -float(log_probabilities(model, sequence).gather(1, sequence[0, 1:, None]).sum())


def test_perplexity_is_that_of_all_predicted_tokens(sequences: list[torch.Tensor]) -> None:
    model = tiny_llama()
    expected = math.exp(sum(loss(model, sequence) for sequence in sequences) / (sum(LENGTHS) - len(LENGTHS)))
    assert perplexity(model, sequences) == pytest.approx(expected, rel=1e-6)


def test_logits_that_a_family_scales_or_caps() -> None:
    shape = tiny_config().to_dict()
    wanted = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    common = {name: shape[name] for name in (*wanted, "num_key_value_heads", "head_dim", "initializer_range")}
    torch.manual_seed(0)
    models: tuple[PreTrainedModel, ...] = (
        GraniteForCausalLM(GraniteConfig(**common, logits_scaling=3.0)),
        Gemma2ForCausalLM(Gemma2Config(**common, final_logit_softcapping=2.0)),
    )
    sequence = tokens(1, 40)
    for model in models:
        expected = math.exp(loss(model.eval(), sequence) / 39)
        assert perplexity(model, [sequence]) == pytest.approx(expected, rel=1e-6)


def test_logits_made_in_another_way_are_refused(sequences: list[torch.Tensor]) -> None:
    model = tiny_llama()
    head = model.lm_head.forward
    model.lm_head.forward = lambda states: head(states) * (2.0 if states.ndim == 3 else 1.0)
    with pytest.raises(ModelError, match="cannot be evaluated or learned on"):
        perplexity(model, sequences)


def test_a_comparison_is_what_its_definitions_say(sequences: list[torch.Tensor]) -> None:
    dense, patched = tiny_llama(), tiny_llama(seed=5)
    comparison = compare(dense, patched, sequences)
    for sequence, found in zip(sequences, comparison.sequences, strict=True):
        expected, other = (log_probabilities(model, sequence) for model in (dense, patched))
        divergence = (expected.exp() * (expected - other)).sum(dim=1)
        count = sequence.shape[1] - 1
        late = count - int(count * 0.75)
        same = (expected.argmax(dim=1) == other.argmax(dim=1)).sum()
        losses = (loss(dense, sequence), loss(patched, sequence))
        whole = (count, *losses, float(divergence.sum()), late, float(divergence[-late:].sum()), int(same))
        assert astuple(found) == pytest.approx(whole, rel=1e-5)


def test_a_model_beside_itself(sequences: list[torch.Tensor]) -> None:
    model = tiny_llama()
    comparison = compare(model, model, sequences)
    assert (comparison.perplexity_ratio.value, comparison.perplexity_ratio.error) == (1.0, 0.0)
    assert (comparison.agreement.value, comparison.divergence.value) == (1.0, 0.0)
    assert comparison.dense_perplexity.value == pytest.approx(perplexity(model, sequences), rel=1e-12)


def test_a_patched_model_and_its_weights(compiled: dict[str, Compiled], sequences: list[torch.Tensor]) -> None:
    dense, patched = tiny_llama(), tiny_llama()
    before = fingerprint(patched)
    patch(patched, compiled["one cluster"].package, recall="pattern")
    same = compare(dense, patched, sequences)
    assert same.divergence.value < 1e-9
    assert same.agreement.value == 1.0
    assert fingerprint(patched) == before


def test_errors_over_sequences() -> None:
    """The error is the textbook's for sequences of equal length, and None for a single one."""
    divergences = (3.0, 5.0, 10.0)
    comparison = Comparison(tuple(Departure(10, 20.0, 20.0, value, 2, value / 2, 7) for value in divergences))
    means = torch.tensor(divergences, dtype=torch.float64) / 10
    assert comparison.divergence.value == pytest.approx(float(means.mean()))
    assert comparison.divergence.error == pytest.approx(float(means.std() / 3**0.5))
    assert comparison.late_divergence.value == pytest.approx(1.5)
    assert comparison.agreement.value == pytest.approx(0.7)
    assert comparison.agreement.error == pytest.approx(0.0, abs=1e-12)
    assert Comparison(comparison.sequences[:1]).divergence.error is None


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [((), "one or more, got none"), ((5, 1), r"sequences\[1\]: expected token ids \[1, length\]")],
)
def test_sequences_that_predict_nothing(lengths: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ModelError, match=expected):
        perplexity(tiny_llama(), [tokens(1, length) for length in lengths])


def test_a_model_in_training_mode(sequences: list[torch.Tensor]) -> None:
    with pytest.raises(ModelError, match=r"call model.eval\(\)"):
        compare(tiny_llama(), tiny_llama().train(), sequences)


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path, sequences: list[torch.Tensor]) -> None:
    torchrun(Path(__file__).with_name("evaluation_process.py"), tmp_path)
    found: list[dict[str, Any]] = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert [process["own"] for process in found] == [range(0, 3, 2), range(1, 3, 2)]
    assert found[0]["comparison"] == found[1]["comparison"]

    dense = tiny_llama()
    alone = compare(dense, tiny_llama(seed=5), sequences)
    for process in found:
        for ours, theirs in zip(alone.sequences, process["comparison"].sequences, strict=True):
            assert astuple(theirs) == pytest.approx(astuple(ours), rel=1e-6)
        assert process["perplexity"] == pytest.approx(perplexity(dense, sequences), rel=1e-6)
        assert process["perplexity by accelerate"] == pytest.approx(perplexity(dense, sequences[:1]), rel=1e-6)
        assert process["rows"] == [[1 / 3 + index, -(10.0**-300)] for index in range(5)]
        assert process["totals"] == [3.0, 1.0]
        assert process["shared"] == [(item, item % 2) for item in range(5)]
        assert process["first"] == 0
        assert process["failed"] == ([0, 1, 2], "item 3: expected no fault, got one in process 1; try again")
        assert process["left"]
        assert process["again"] == [[1.0], [2.0]]
        assert process["still there"]
