"""The nodes beside vLLM's pages: each cache has its own, and two fill the tensor that one would half fill."""

import torch

from surgeon.runtime.vllm.pages.layout import PageLayout
from surgeon.runtime.vllm.pages.nodes import PageNodes

HEADS, SIZE, PAGES, DIM = 3, 16, 5, 32
LAYOUT = PageLayout(2 * SIZE, HEADS, SIZE)


def caches(count: int, pages: int = PAGES) -> list[torch.Tensor]:
    return list(torch.zeros(count, pages, HEADS, LAYOUT.page_tokens, 2 * DIM, dtype=torch.bfloat16))


def key_slots(pages: int = PAGES) -> torch.Tensor:
    """The slots of all pages but the first, which stands for none."""
    tables, lengths = torch.arange(1, pages).view(1, -1), torch.tensor([(pages - 1) * LAYOUT.page_tokens])
    return LAYOUT.block_table(tables, lengths).flatten().long()


def test_caches_have_their_own_nodes_for_good() -> None:
    nodes, own = PageNodes(), caches(3)
    found = [nodes.of(LAYOUT.pools(cache)[0], LAYOUT) for cache in own]
    for number, each in enumerate(found, start=1):
        assert (each.dtype, tuple(each.shape)) == (torch.int8, (len(LAYOUT.pools(own[0])[0]), SIZE // 8, DIM))
        assert each.is_contiguous()
        each[key_slots()] = number
    for number, (each, cache) in enumerate(zip(found, own, strict=True), start=1):
        assert bool((each[key_slots()] == number).all())
        assert nodes.of(LAYOUT.pools(cache)[0], LAYOUT) is each


def test_two_caches_share_a_tensor_that_is_a_thirtysecond_of_them() -> None:
    nodes, own = PageNodes(), caches(2, pages=200)
    found = [nodes.of(LAYOUT.pools(cache)[0], LAYOUT) for cache in own]
    memory = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}
    assert sum(memory.values()) <= 0.032 * sum(cache.nbytes for cache in own)


def test_caches_of_other_sizes_do_not_share() -> None:
    nodes, (small, large) = PageNodes(), (caches(1), caches(1, pages=6))
    first, second = (nodes.of(LAYOUT.pools(each[0])[0], LAYOUT) for each in (small, large))
    keys = torch.zeros(len(first), SIZE, DIM, dtype=torch.bfloat16)
    third = nodes.of(keys, PageLayout(SIZE, HEADS, SIZE))
    assert len({each.untyped_storage().data_ptr() for each in (first, second, third)}) == 3
