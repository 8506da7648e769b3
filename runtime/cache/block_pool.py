"""Keys and values of one layer in blocks, of which every KV head of every sequence holds only some.

A block stands in a slot; `table` says which. Slots that are dropped are taken again. More are made, and surplus ones
given back, in steps of a fraction of what is held, so that memory stays near that and copies stay few.
"""

import torch

_SPARE = 8  # one slot in so many is made ahead
_CPU = torch.device("cpu")


class BlockPool:
    """The slots of one layer and the table that finds blocks in them; see `LayerKernels.run_paged` for both.

    Blocks count from each sequence's first valid key. A slot's rows behind the last token written hold anything. The
    tensors outlive the calls that make them, so that none is an inference tensor, whatever mode the caller is in.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, block_size: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Holds nothing yet of a layer with keys and values like these, `[batch, KV heads, tokens, head_dim]`."""
        self.table = torch.empty((*keys.shape[:2], 0), dtype=torch.int32, device=_CPU)
        self.keys = keys.new_empty((0, block_size, keys.shape[3]))
        self.values = values.new_empty((0, block_size, values.shape[3]))

    @property
    def nbytes(self) -> int:
        """Bytes of the slots, held or not, and of the table."""
        return self.keys.nbytes + self.values.nbytes + self.table.nbytes

    @torch.inference_mode(False)
    @torch.no_grad()
    def write(
        self, first: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, wanted: torch.Tensor | None = None
    ) -> None:
        """Writes new tokens `[batch, KV heads, tokens, head_dim]`, the first of them at `first` `[batch]`.

        Negative places are padding and not written. `wanted`, bool `[batch, KV heads, blocks]`, are the blocks worth
        holding; all, if None.
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
        """Drops all blocks but these, bool `[batch, KV heads, blocks]`, and those that are not held anyway."""
        blocks = wanted.shape[2]
        self.table[:, :, :blocks].masked_fill_(~wanted, -1)
        self.table[:, :, blocks:] = -1
        if len(self.keys) > 2 * self._with_spare(int((self.table >= 0).sum())):
            self.select(torch.arange(len(self.table), device=_CPU))

    @torch.inference_mode(False)
    @torch.no_grad()
    def select(self, sequences: torch.Tensor) -> None:
        """Makes the cache that of these sequences, some perhaps twice; neighbouring blocks move together."""
        table = self.table.index_select(0, sequences)
        is_held = table >= 0
        slots = table[is_held].long()
        self.keys, self.values = (
            torch.cat(
                (
                    held.index_select(0, slots),
                    held.new_empty(self._with_spare(len(slots)) - len(slots), *held.shape[1:]),
                )
            )
            for held in (self.keys, self.values)
        )
        table[is_held] = torch.arange(len(slots), dtype=torch.int32, device=_CPU)
        self.table = table

    def _hold(self, new: torch.Tensor) -> None:
        """Gives slots to blocks that have none, neighbouring blocks neighbouring ones where there are."""
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
            self.keys, self.values = (
                torch.cat((held, held.new_empty(more, *held.shape[1:]))) for held in (self.keys, self.values)
            )
        table[new] = free.to(torch.int32)

    def _with_spare(self, slots: int) -> int:
        batch, kv_heads = self.table.shape[:2]
        return slots + max(slots // _SPARE, batch * kv_heads)

    def _widen(self, blocks: int) -> None:
        known = self.table.shape[2]
        if blocks > known:
            more = self.table.new_full((*self.table.shape[:2], max(blocks, 2 * known) - known), -1)
            self.table = torch.cat((self.table, more), dim=2)
