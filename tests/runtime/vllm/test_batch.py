"""The rows that ask in each sequence of a step, wherever the step begins and ends."""

import itertools

import pytest
import torch

from surgeon.runtime.operands import PATTERN_ALONE
from surgeon.runtime.vllm.batch import dense_from, dense_tails

ASKING, BLOCK = 100, 64


def first_dense_row(length: int, prompt: int) -> int:
    """The first row that reads everything in a step that ends at this length, as kernels find it."""
    tail = int(dense_tails(torch.tensor([length]), torch.tensor([prompt]), ASKING))
    return 0 if length <= tail else (length - tail) // BLOCK


@pytest.mark.parametrize("chunk", [1, 33, 64, 100, 700])
def test_chunks_have_the_dense_rows_of_the_whole_prompt(chunk: int) -> None:
    prompt = 700
    for end in [*range(chunk, prompt, chunk), prompt]:
        assert first_dense_row(end, prompt) == (prompt - ASKING) // BLOCK


def test_a_sequence_computed_again_has_the_dense_rows_that_it_had() -> None:
    assert first_dense_row(350, 300) == first_dense_row(300, 300) == 3


def test_decoding_reads_everything_wherever_the_prompt_ended() -> None:
    for length, prompt in itertools.product((5, 201, 500), (5, 150, 200)):
        if length >= prompt:
            assert first_dense_row(length, prompt) <= (length - 1) // BLOCK


def test_every_sequence_has_its_own() -> None:
    found = dense_tails(torch.tensor([500, 7, 256], dtype=torch.int32), torch.tensor([400, 7, 700]), ASKING)
    assert found.tolist() == [200, 100, -344]
    assert found.dtype == torch.int64


def test_under_the_pattern_nobody_asks() -> None:
    assert dense_tails(torch.tensor([500, 7]), torch.tensor([400, 6]), 0).tolist() == [PATTERN_ALONE] * 2


@pytest.mark.parametrize("prompt", [1, 99, 100, 300])
def test_a_gpus_batch_has_the_dense_rows_of_a_cpus(prompt: int) -> None:
    (first,) = dense_from(torch.tensor([prompt], dtype=torch.int32), ASKING)
    assert first.dtype is torch.int32
    for length in (1, 64, prompt, prompt + 50):
        assert length - int(dense_tails(torch.tensor([length]), torch.tensor([prompt]), ASKING)) == int(first)
