"""The places of keys and values in vLLM's pages, as pools of a package's blocks.

A layer's cache is `[pages, KV heads, page tokens, 2 * head_dim]`, contiguous. vLLM's own CPU kernels keep rows there in
an order of theirs; here the first half of a KV head's page holds its keys in natural order and the second its values.
Cut into slots of one block each, keys and values are two pools that differ by an offset, so one table serves both.

Source: `vllm.v1.attention.backends.cpu_attn`, the layout LBHNC.
"""

from dataclasses import dataclass

import torch

from surgeon.runtime.errors import PatchError

_MOST_SLOTS = 2**31  # of a table of int32


@dataclass(frozen=True)
class PageLayout:
    """The pages of a group of layers: their tokens, the KV heads of this process, and the package's block in tokens."""

    page_tokens: int
    kv_heads: int
    block_size: int

    @property
    def page_blocks(self) -> int:
        """The blocks of one KV head's keys in a page."""
        return self.page_tokens // self.block_size

    def pools(self, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a layer's cache as pools of blocks, `[slots, block_size, head_dim]`, uncopied.

        Raises:
            PatchError: the cache has another shape, or is too large for a table of int32.
        """
        expected = (self.kv_heads, self.page_tokens)
        if cache.dim() != 4 or cache.shape[1:3] != expected or not cache.is_contiguous():
            raise PatchError(
                "vLLM's cache",
                f"contiguous pages [pages, {expected[0]}, {expected[1]}, keys and values]",
                str(list(cache.shape)),
                "report this with the version of vLLM",
            )
        slots = cache.view(-1, self.block_size, cache.shape[3] // 2)
        if len(slots) >= _MOST_SLOTS:
            raise PatchError("vLLM's cache", f"fewer than {_MOST_SLOTS} blocks", str(len(slots)), "make it smaller")
        return slots[: -self.page_blocks], slots[self.page_blocks :]

    def block_table(self, pages: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The slots of each block of each KV head, int32 `[sequences, KV heads, blocks]`; -1 where there is none.

        `pages`, integers `[sequences, n]`, are the pages of each sequence, of which page 0 stands for none; `lengths`,
        `[sequences]`, are their tokens.
        """
        size, each = self.block_size, self.page_blocks
        block = torch.arange(-(-int(lengths.max()) // size) if len(lengths) else 0)
        page = pages[:, block // each].long()[:, None]
        head = torch.arange(self.kv_heads)[:, None]
        slots = (page * self.kv_heads + head) * (2 * each) + block % each
        missing = (block * size >= lengths[:, None])[:, None] | (page == 0)
        return slots.masked_fill_(missing, -1).to(torch.int32)
