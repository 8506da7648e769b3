"""The pages that a model's layers still need: layers of like need share a block table, whose pages go for all at once.

Under recall "pattern" the topology tells the last row of blocks that reads each block. A page of a table holds blocks
of every layer and KV head of a group, so it may go once the last of these readers has passed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from surgeon.runtime.cache.liveness import Liveness

_MOST_GROUPS = 6  # each costs a block table a step
_WORTH = 0.95  # more groups are made only where this share of the pages remains

Readers = tuple[int, ...]
"""The last row of blocks that reads each block; block n after the last has its reader n rows after that."""


@dataclass(frozen=True)
class Group:
    """Layers that share a block table, and the last readers of any of them."""

    layers: tuple[int, ...]
    readers: Readers


def groups_of(liveness: Mapping[int, Liveness], num_blocks: int) -> tuple[Group, ...]:
    """Layers of like need in groups of one size, as many as save pages after `num_blocks` blocks."""
    length = max(num_blocks, *(each.last_readers.shape[1] for each in liveness.values()))
    needs = {layer: _readers(each, length) for layer, each in liveness.items()}
    layers = sorted(needs, key=lambda layer: (_kept(needs[layer], num_blocks), layer))
    sizes = [len(layers) // count for count in range(1, _MOST_GROUPS + 1) if len(layers) % count == 0]
    found: tuple[Group, ...] = ()
    for size in sizes:
        parts = [layers[begin : begin + size] for begin in range(0, len(layers), size)]
        made = tuple(Group(tuple(sorted(part)), _merged([needs[layer] for layer in part])) for part in parts)
        if not found or _pages(made, num_blocks) < _WORTH * _pages(found, num_blocks):
            found = made
    return found


def unread_pages(readers: Readers, page_blocks: int, row: int, pages: int) -> list[int]:
    """The pages, of the first so many, with no block that some row from `row` on reads."""
    last = len(readers) - 1

    def reader(block: int) -> int:
        return readers[block] if block <= last else readers[last] + block - last

    return [
        page for page in range(pages) if all(reader(page * page_blocks + block) < row for block in range(page_blocks))
    ]


def _readers(liveness: Liveness, length: int) -> Readers:
    """The last readers of a layer's blocks over all of its KV heads, of `length` blocks."""
    known = liveness.last_readers.amax(dim=0)
    behind = known[-1] + torch.arange(1, length - len(known) + 1)
    return tuple(map(int, torch.cat((known, behind)).tolist()))


def _merged(needs: Sequence[Readers]) -> Readers:
    return tuple(map(max, zip(*needs, strict=True)))


def _kept(readers: Readers, num_blocks: int) -> int:
    """The blocks that the row after `num_blocks` blocks, or a later one, still reads."""
    return sum(reader >= num_blocks for reader in readers[:num_blocks])


def _pages(groups: Sequence[Group], num_blocks: int) -> int:
    return sum(len(group.layers) * _kept(group.readers, num_blocks) for group in groups)
