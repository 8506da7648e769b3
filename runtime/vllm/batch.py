"""The rows that ask in a step of vLLM's engine: how much of each sequence's end reads everything."""

import torch

from surgeon.runtime.operands import PATTERN_ALONE


def dense_tails(lengths: torch.Tensor, prompt_lengths: torch.Tensor, asking: int) -> torch.Tensor:
    """The dense tail of each sequence, int64 `[sequences]`; see `Operands.dense_tail`.

    `lengths` are the tokens of each sequence so far, the new ones included, and `prompt_lengths` those of its prompt.
    `asking` is the number of tokens at a prompt's end that read everything, 0 if none do: they are counted from the
    prompt's end also where it comes in chunks, and where a sequence is computed again together with its answer.
    """
    if not asking:
        return torch.full(lengths.shape, PATTERN_ALONE, dtype=torch.int64)
    return asking + lengths.long() - prompt_lengths.long()


def dense_from(prompt_lengths: torch.Tensor, asking: int) -> torch.Tensor:
    """The token after which each sequence's rows of blocks read everything, int32 `[sequences]`; see `DeviceBatch`.

    It is the same in every step of a sequence. `asking` is at least 1; the rest is as for `dense_tails`.
    """
    return (prompt_lengths.long() - asking).to(torch.int32)
