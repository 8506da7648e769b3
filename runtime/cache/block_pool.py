"""A pool of blocks for one layer's keys and values, in which each KV head of each sequence holds only some blocks.

Each block lies in a slot of the pool; `table`, the block table, says which. Freed slots are used again. The pool grows
and shrinks in steps of a fraction of what it holds, so that it stays near that size and is seldom copied.
"""

from collections.abc import Callable

import torch

from surgeon.runtime.operands import Nodes
from surgeon.runtime.package.schedule import NODE

_SPARE = 32  # one spare slot for this many in use; once these are taken, the pool is copied
_CPU = torch.device("cpu")


class BlockPool:
    """The pool of blocks of one layer and its block table, both in the layout of `LayerKernels.run_paged`.

    Blocks are counted from each sequence's first valid key. Rows of a block after its last written token are undefined.
    The tensors outlive the calls that make them, so none is an inference tensor, whatever mode the caller is in.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, block_size: int, keys: torch.Tensor, values: torch.Tensor, routed: bool = False) -> None:
        """Makes an empty pool for a layer with keys and values like these, `[batch, KV heads, tokens, head_dim]`.

        A routed layer's pool also has `nodes`, which its kernels write.
        """
        self.table = torch.empty((*keys.shape[:2], 0), dtype=torch.int32, device=_CPU)
        self.keys = keys.new_empty((0, block_size, keys.shape[3]))
        self.values = values.new_empty((0, block_size, values.shape[3]))
        self.nodes = None
        if routed:
            nodes = torch.empty((0, block_size // NODE, keys.shape[3]), dtype=torch.int8, device=_CPU)
            self.nodes = Nodes(nodes, torch.zeros(len(keys), dtype=torch.int64, device=_CPU))

    @property
    def nbytes(self) -> int:
        """The size in bytes of all slots, in use or not, and of the block table."""
        nodes = 0 if self.nodes is None else self.nodes.values.nbytes
        return self.keys.nbytes + self.values.nbytes + self.table.nbytes + nodes

    @torch.inference_mode(False)
    @torch.no_grad()
    def write(
        self, first: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> None:
        """Writes new tokens `[batch, KV heads, tokens, head_dim]`, the first of them at `first` `[batch]`.

        Tokens at negative places are padding and are not written. `wanted`, bool `[batch, KV heads, blocks]`, marks the
        blocks to hold; None means all.
        """
        size = self.keys.shape[1]
        places = first[:, None] + torch.arange(keys.shape[2], device=_CPU)  # [batch, tokens]
        end = int(places[:, -1].max()) // size + 1
        if end <= 0:
            return
        self._widen(end)
        blocks = torch.arange(end, device=_CPU)
        new = (blocks >= places[:, :1] // size) & (blocks <= places[:, -1:] // size)  # [batch, blocks]
        new = new[:, None] & (self.table[:, :, :end] < 0)
        if wanted is not None:
            new &= wanted
        self._hold(new)
        slots = self.table.gather(2, (places.clamp(min=0) // size)[:, None].expand(-1, keys.shape[1], -1))
        rows = slots.long() * size + (places % size)[:, None]  # [batch, KV heads, tokens]
        written = (slots >= 0) & (places >= 0)[:, None]
        everything = bool(written.all())
        for held, states in ((self.keys, keys), (self.values, values)):
            given = states.flatten(0, 2) if everything else states[written]
            held.flatten(0, 1).index_copy_(0, rows.flatten() if everything else rows[written], given)

    @torch.inference_mode(False)
    @torch.no_grad()
    def keep(self, wanted: torch.Tensor) -> None:
        """Drops every held block that `wanted`, bool `[batch, KV heads, blocks]`, does not mark."""
        blocks = wanted.shape[2]
        self.table[:, :, :blocks].masked_fill_(~wanted, -1)
        self.table[:, :, blocks:] = -1
        if len(self.keys) > 2 * self._with_spare(int((self.table >= 0).sum())):
            self.select(torch.arange(len(self.table), device=_CPU))

    @torch.inference_mode(False)
    @torch.no_grad()
    def crop_nodes(self, lengths: torch.Tensor) -> None:
        """Forgets the nodes of tokens from each sequence's length on, `[batch]`."""
        if self.nodes is not None:
            self.nodes.written.clamp_(max=lengths.clamp(min=0) // NODE)

    @torch.inference_mode(False)
    @torch.no_grad()
    def select(self, sequences: torch.Tensor) -> None:
        """Keeps these sequences, in this order and possibly repeated; neighbouring blocks are moved together."""
        table = self.table.index_select(0, sequences)
        is_held = table >= 0
        slots = table[is_held].long()
        spare = self._with_spare(len(slots)) - len(slots)
        self._replace(lambda held: torch.cat((held.index_select(0, slots), held.new_empty(spare, *held.shape[1:]))))
        if self.nodes is not None:
            self.nodes = self.nodes._replace(written=self.nodes.written.index_select(0, sequences))
        table[is_held] = torch.arange(len(slots), dtype=torch.int32, device=_CPU)
        self.table = table

    def _hold(self, new: torch.Tensor) -> None:
        """Gives a slot to each block that has none: adjacent slots to adjacent blocks where possible."""
        count = int(new.sum())
        if not count:
            return
        table = self.table[:, :, : new.shape[2]]
        taken = torch.zeros(len(self.keys), dtype=torch.bool, device=_CPU)
        taken[self.table[self.table >= 0].long()] = True
        free = (~taken).nonzero()[:count, 0]
        if len(free) < count:
            more = self._with_spare(len(self.keys) + count - len(free)) - len(self.keys)
            free = torch.cat((free, torch.arange(len(self.keys), len(self.keys) + more, device=_CPU)))[:count]
            self._replace(lambda held: torch.cat((held, held.new_empty(more, *held.shape[1:]))))
        table[new] = free.to(torch.int32)

    def _replace(self, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces everything that the slots hold."""
        self.keys, self.values = of(self.keys), of(self.values)
        if self.nodes is not None:
            self.nodes = self.nodes._replace(values=of(self.nodes.values))

    def _with_spare(self, slots: int) -> int:
        batch, kv_heads = self.table.shape[:2]
        return slots + max(slots // _SPARE, batch * kv_heads)

    def _widen(self, blocks: int) -> None:
        known = self.table.shape[2]
        if blocks > known:
            more = self.table.new_full((*self.table.shape[:2], max(blocks, 2 * known) - known), -1)
            self.table = torch.cat((self.table, more), dim=2)
