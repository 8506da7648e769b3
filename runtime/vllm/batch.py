"""The calls of attention in which a step of vLLM's engine runs: equal neighbours of a batch share one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Call:
    """Neighbouring sequences of a batch that run in one call, each with `queries` new tokens.

    Sequences `first <= i < end`; the tokens of the first begin at `token`. See `Operands` for `dense_rows` and
    `tokens_ahead`.
    """

    first: int
    end: int
    token: int
    queries: int
    dense_rows: int
    tokens_ahead: int


def calls_of(
    query_starts: Sequence[int], lengths: Sequence[int], prompt_lengths: Sequence[int], asking: int
) -> tuple[Call, ...]:
    """The calls of a batch in which sequence i has the tokens from `query_starts[i]` to `query_starts[i + 1]`.

    `lengths` are the tokens of each sequence so far, the new ones included, and `prompt_lengths` those of its prompt.
    `asking` is the number of tokens at a prompt's end that read everything, 0 if none do: they are counted from the
    prompt's end also where it comes in chunks, and where a sequence is computed again together with its answer.
    """

    def kind(sequence: int) -> tuple[int, int, int]:
        queries = query_starts[sequence + 1] - query_starts[sequence]
        beyond = lengths[sequence] - prompt_lengths[sequence]
        if not asking:
            return queries, 0, 0
        if queries == 1 and beyond >= 0:  # decoding reads everything, wherever the prompt ended
            return queries, asking, 0
        return queries, asking + max(0, beyond), max(0, -beyond)

    calls = []
    for (queries, dense_rows, ahead), group in groupby(range(len(lengths)), kind):
        sequences = list(group)
        if queries:
            first = sequences[0]
            calls.append(Call(first, sequences[-1] + 1, query_starts[first], queries, dense_rows, ahead))
    return tuple(calls)
