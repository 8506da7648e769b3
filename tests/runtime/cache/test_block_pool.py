"""The pool of blocks: wanted blocks are found again, dropped ones make room."""

import pytest
import torch

from surgeon.runtime.cache.block_pool import BlockPool

BLOCK, BATCH, HEADS, HEAD_DIM = 4, 2, 3, 8


def states(length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, BATCH, HEADS, length, HEAD_DIM, generator=generator)
    return keys, values


def block_table(dtype: torch.dtype = torch.float32) -> BlockPool:
    empty = torch.empty(BATCH, HEADS, 0, HEAD_DIM, dtype=dtype)
    return BlockPool(BLOCK, empty, empty)


def check(held: BlockPool, keys: torch.Tensor, values: torch.Tensor, padding: list[int], wanted: torch.Tensor) -> None:
    """Checks that the wanted blocks `[batch, heads, blocks]` hold these tokens, each sequence's after its padding."""
    for sequence, head, block in wanted.nonzero().tolist():
        slot = int(held.table[sequence, head, block])
        begin, end = padding[sequence] + block * BLOCK, min(padding[sequence] + (block + 1) * BLOCK, keys.shape[2])
        assert torch.equal(held.keys[slot, : end - begin], keys[sequence, head, begin:end])
        assert torch.equal(held.values[slot, : end - begin], values[sequence, head, begin:end])
    taken = held.table[held.table >= 0]
    assert len(taken.unique()) == len(taken) == int(wanted.sum())


@pytest.mark.parametrize("chunks", [[21], [1] * 21, [2, 9, 4, 1, 5], [5, 16]], ids=str)
def test_tokens_are_found_where_the_table_says(chunks: list[int]) -> None:
    keys, values = states(21)
    padding, held, begin = [0, 6], block_table(), 0
    for chunk in chunks:  # the first ones are padding of the second sequence
        part = slice(begin, begin + chunk)
        held.write(begin - torch.tensor(padding), keys[:, :, part], values[:, :, part])
        begin += chunk
    wanted = torch.zeros(BATCH, HEADS, 6, dtype=torch.bool)
    wanted[0, :, :6] = wanted[1, :, :4] = True  # 21 and 15 tokens
    check(held, keys, values, padding, wanted)
    assert (held.table[:, :, 6:] == -1).all()


def test_only_what_is_wanted_is_held() -> None:
    keys, values = states(21)
    wanted = torch.rand(BATCH, HEADS, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    wanted[1, :, 4:] = False
    held = block_table()
    held.write(torch.tensor([0, -6]), keys, values, wanted)
    check(held, keys, values, [0, 6], wanted)
    assert len(held.keys) <= int(wanted.sum()) * 9 // 8 + BATCH * HEADS


def test_a_batch_of_nothing_but_padding() -> None:
    keys, values = states(5)
    held = block_table()
    held.write(torch.tensor([-5, -9]), keys, values)
    assert held.nbytes == 0


def test_slots_are_taken_again_and_given_back() -> None:
    keys, values = states(400)
    held, most = block_table(), 0
    for begin in range(0, 400, BLOCK):
        part = slice(begin, begin + BLOCK)
        held.write(torch.tensor([begin] * BATCH), keys[:, :, part], values[:, :, part])
        wanted = torch.zeros(BATCH, HEADS, begin // BLOCK + 1, dtype=torch.bool)
        wanted[:, :, :1] = wanted[:, :, -2:] = True
        held.keep(wanted)
        most = max(most, len(held.keys))
        check(held, keys[:, :, : begin + BLOCK], values[:, :, : begin + BLOCK], [0, 0], wanted)
    assert most <= 2 * (3 + 1) * BATCH * HEADS  # twice what is held and a spare slot per head
    whole = block_table()
    whole.write(torch.tensor([0, 0]), keys, values)
    assert len(whole.keys) >= 100 * BATCH * HEADS
    whole.keep(wanted)
    assert len(whole.keys) <= (3 + 1) * BATCH * HEADS
    check(whole, keys, values, [0, 0], wanted)


def test_sequences_are_selected() -> None:
    keys, values = states(10)
    held = block_table()
    wanted = torch.ones(BATCH, HEADS, 3, dtype=torch.bool)
    wanted[1, 2, 1] = wanted[0, 0, 0] = False
    held.write(torch.tensor([0, 0]), keys, values, wanted)
    for chosen in ([1, 0, 1], [2, 2], [0]):
        index = torch.tensor(chosen)
        held.select(index)
        keys, values, wanted = keys[index], values[index], wanted[index]
        check(held, keys, values, [0] * len(chosen), wanted)
    more, _ = states(2, seed=5)
    held.write(torch.tensor([10]), more[:1], more[:1])  # changes to one do not show in its copies
    keys = torch.cat((keys, more[:1]), dim=2)
    check(held, keys, torch.cat((values, more[:1]), dim=2), [0], wanted)
