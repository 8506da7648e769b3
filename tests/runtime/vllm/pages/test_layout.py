"""Pages as pools of blocks: what is written through the rows is read through the table."""

import pytest
import torch

from surgeon.runtime.errors import PatchError
from surgeon.runtime.vllm.pages.layout import PageLayout

HEADS, SIZE = 3, 4
PAGES = 7


def filled(layout: PageLayout, tables: list[list[int]], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache into which every token's key and value are written, and the keys as `[sequence][token]`."""
    cache = torch.full((PAGES, HEADS, layout.page_tokens, 2 * SIZE), torch.nan)
    states = torch.arange(float(len(lengths) * max(lengths) * HEADS * SIZE)).view(len(lengths), -1, HEADS, SIZE)
    for table, length, keys in zip(tables, lengths, states, strict=True):
        token = torch.arange(length)
        page = torch.tensor(table)[token // layout.page_tokens]
        first, second = cache.view(PAGES, HEADS, 2, layout.page_tokens, SIZE).unbind(2)
        first[page, :, token % layout.page_tokens] = keys[:length]
        second[page, :, token % layout.page_tokens] = -keys[:length]
    return cache, states


@pytest.mark.parametrize("page_tokens", [16, 32, 64])
def test_tokens_are_found_where_they_were_written(page_tokens: int) -> None:
    layout = PageLayout(page_tokens, HEADS, 16)
    tables, lengths = [[5, 2, 4, 1], [3, 6, 0, 0]], [50, 17]
    cache, states = filled(layout, tables, lengths)
    keys, values = layout.pools(cache)
    assert keys.is_contiguous()
    assert values.is_contiguous()
    table = layout.block_table(torch.tensor(tables, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32))
    assert table.dtype is torch.int32
    assert table.shape == (2, HEADS, 4)
    for sequence, length in enumerate(lengths):
        for head in range(HEADS):
            slots = table[sequence, head, : -(-length // 16)].long()
            assert torch.equal(keys[slots].flatten(0, 1)[:length], states[sequence, :length, head])
            assert torch.equal(values[slots].flatten(0, 1)[:length], -states[sequence, :length, head])
            assert (table[sequence, head, -(-length // 16) :] == -1).all()


def test_page_zero_stands_for_no_page() -> None:
    layout = PageLayout(32, 1, 16)
    table = layout.block_table(torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([64]))
    assert table.tolist() == [[[-1, -1, 4, 5]]]


def test_an_empty_batch_has_an_empty_table() -> None:
    assert PageLayout(32, 1, 16).block_table(torch.empty(0, 4, dtype=torch.int32), torch.empty(0)).shape == (0, 1, 0)


@pytest.mark.parametrize("shape", [(PAGES, HEADS, 16, 2 * SIZE), (PAGES, 2, 32, 2 * SIZE), (PAGES, HEADS, 64 * SIZE)])
def test_a_cache_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PatchError, match=r"vLLM's cache: expected contiguous pages \[pages, 3, 32, keys and values\]"):
        PageLayout(32, HEADS, 16).pools(torch.empty(shape))


def test_a_cache_with_gaps_is_refused() -> None:
    with pytest.raises(PatchError, match="expected contiguous pages"):
        PageLayout(32, HEADS, 16).pools(torch.empty(PAGES, HEADS, 32, 3 * SIZE)[..., : 2 * SIZE])


def test_a_cache_of_too_many_blocks_is_refused() -> None:
    with pytest.raises(PatchError, match="expected fewer than 2147483648 blocks"):
        PageLayout(16, 2**20, 16).pools(torch.empty(2**10, 2**20, 16, 2 * SIZE, device="meta"))
