"""The calls that a step of the engine becomes, and the rows that ask in each."""

import itertools

import pytest

from surgeon.runtime.operands import Operands
from surgeon.runtime.vllm.batch import Call, calls_of

ASKING = 100


def test_decodes_of_a_batch_are_one_call_wherever_their_prompts_ended() -> None:
    assert calls_of([0, 1, 2, 3], [500, 7, 201], [400, 6, 200], ASKING) == (Call(0, 3, 0, 1, ASKING, 0),)


def test_a_mixed_batch() -> None:
    calls = calls_of([0, 1, 2, 66, 130, 230], [500, 7, 64, 64, 300], [400, 6, 64, 64, 300], ASKING)
    assert calls == (Call(0, 2, 0, 1, ASKING, 0), Call(2, 4, 2, 64, ASKING, 0), Call(4, 5, 130, 100, ASKING, 0))


def test_a_chunk_of_a_prompt_is_told_what_comes_after_it() -> None:
    assert calls_of([0, 256], [256], [700], ASKING) == (Call(0, 1, 0, 256, ASKING, 444),)


def test_a_chunk_of_one_token_is_no_decoding() -> None:
    calls = calls_of([0, 1, 2], [257, 300], [700, 200], ASKING)
    assert calls == (Call(0, 1, 0, 1, ASKING, 443), Call(1, 2, 1, 1, ASKING, 0))


def test_a_sequence_computed_again_has_the_dense_rows_that_it_had() -> None:
    assert calls_of([0, 350], [350], [300], ASKING) == (Call(0, 1, 0, 350, ASKING + 50, 0),)


def test_under_the_pattern_only_the_number_of_new_tokens_counts() -> None:
    calls = calls_of([0, 1, 2, 34, 66], [257, 300, 64, 400], [700, 200, 300, 380], 0)
    assert calls == (Call(0, 2, 0, 1, 0, 0), Call(2, 4, 2, 32, 0, 0))


def test_a_sequence_without_new_tokens_is_left_out() -> None:
    assert calls_of([0, 1, 1, 1], [9, 0, 0], [5, 0, 0], ASKING) == (Call(0, 1, 0, 1, ASKING, 0),)


@pytest.mark.parametrize("chunk", [1, 33, 64, 100, 700])
def test_chunks_have_the_dense_rows_of_the_whole_prompt(chunk: int) -> None:
    prompt, block = 700, 64
    for first, end in itertools.pairwise([*range(0, prompt, chunk), prompt]):
        (call,) = calls_of([0, end - first], [end], [prompt], ASKING)
        operands = Operands(None, None, None, None, None, 1.0, call.dense_rows, call.tokens_ahead)  # type: ignore[arg-type]
        assert operands.first_dense_row(end, block) == (prompt - ASKING) // block
