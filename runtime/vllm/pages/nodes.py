"""The nodes that routed heads choose blocks by, kept beside vLLM's pages for as long as these.

A node belongs to the place of its keys: whoever writes a page's keys completes its nodes, and whoever is given the page
with them, as by a prefix hit, finds them there.
"""

import torch

from surgeon.runtime.package.schedule import NODE
from surgeon.runtime.vllm.pages.layout import PageLayout


class PageNodes:
    """The nodes of a worker's layers, made when a layer's cache is first seen.

    Half of a cache's slots hold values, which have no nodes: two caches share a tensor, one of them shifted by the
    slots of a page's values. Layers that share a cache, since their pages differ, share its nodes.
    """

    def __init__(self) -> None:
        self._nodes: dict[tuple[int, int], torch.Tensor] = {}  # by a cache's address and slots
        self._half_used: dict[int, tuple[torch.Tensor, PageLayout]] = {}  # by the slots

    def of(self, keys: torch.Tensor, pages: PageLayout) -> torch.Tensor:
        """The nodes, as `run_packed` takes them, of a cache with `keys` in a pool `[slots, block_size, head_dim]`."""
        slots, size, head_dim = keys.shape
        place = keys.data_ptr(), slots
        if place not in self._nodes:
            half = self._half_used.pop(slots, None)
            if half is not None and half[1] == pages:
                self._nodes[place] = half[0][pages.page_blocks :]
            else:
                both = keys.new_zeros((slots + pages.page_blocks, size // NODE, head_dim), dtype=torch.int8)
                self._half_used[slots] = both, pages
                self._nodes[place] = both[:slots]
        return self._nodes[place]
