"""Prompt and continuation are compared as they are read: the prompt at once, what follows with its cache."""

import pytest
import torch

from models import Compiled, tiny_llama, tokens
from surgeon.runtime import patch
from surgeon.runtime.errors import ModelError
from surgeon.runtime.evaluate.comparison import Comparison, compare
from surgeon.runtime.evaluate.continuation import compare_continued, prompt_length
from surgeon.runtime.evaluate.logits import continued_states, hidden_states
from surgeon.runtime.evaluate.pilot.run import twin

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 96


@pytest.fixture
def sequences() -> list[torch.Tensor]:
    return [tokens(1, LENGTH, seed) for seed in range(2)]


def sums(*parts: Comparison) -> list[float]:
    return [
        sum(getattr(each, name) for part in parts for each in part.sequences)
        for name in ("tokens", "dense_loss", "patched_loss", "divergence", "agreements")
    ]


@pytest.mark.parametrize("step", [1, 7, 64])
def test_states_with_a_cache_are_those_of_one_call(step: int) -> None:
    model, sequence = tiny_llama(), tokens(1, LENGTH)
    with torch.no_grad():
        found = continued_states(model, sequence, 50, step)
        torch.testing.assert_close(found, hidden_states(model, sequence)[:-1], rtol=1e-4, atol=1e-4)


def test_under_the_pattern_both_parts_are_the_whole(
    compiled: dict[str, Compiled], sequences: list[torch.Tensor]
) -> None:
    dense = tiny_llama()
    patched = twin(dense)
    patch(patched, compiled["sparse"].package, recall="pattern")
    (found,) = compare_continued([dense, patched], sequences, 7)
    whole = compare(dense, patched, sequences)
    assert sums(found.prompt, found.continuation) == pytest.approx(sums(whole), rel=1e-4)
    assert [each.tokens for each in found.continuation.sequences] == [LENGTH // 2] * 2
    assert found.continuation.divergence.value > 0.01


def test_under_recall_dense_what_follows_reads_everything(
    compiled: dict[str, Compiled], sequences: list[torch.Tensor]
) -> None:
    dense = tiny_llama()
    recalling, pattern = twin(dense), twin(dense)
    patch(recalling, compiled["sparse"].package, recall="dense", dense_rows=16)
    patch(pattern, compiled["sparse"].package, recall="pattern")
    recalled, forgotten = compare_continued([dense, recalling, pattern], sequences, 16)
    assert 0 < recalled.continuation.divergence.value < forgotten.continuation.divergence.value / 2
    (one_by_one,) = compare_continued([dense, recalling], sequences, 1)
    assert one_by_one.continuation.divergence.value == pytest.approx(recalled.continuation.divergence.value, rel=1e-3)


def test_the_continuation_has_256_tokens_or_half() -> None:
    assert [prompt_length(length) for length in (4, 96, 512, 2048)] == [2, 48, 256, 1792]


def test_a_model_in_training_mode_is_refused(sequences: list[torch.Tensor]) -> None:
    with pytest.raises(ModelError, match="call model"):
        compare_continued([tiny_llama(), tiny_llama().train()], sequences, 8)
