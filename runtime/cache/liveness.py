"""Liveness of a cache's blocks: a block may be dropped once no later row reads it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Liveness:
    """One layer's last readers, int64 `[KV heads, blocks]`: the last row of blocks that reads each block.

    A block n columns beyond the last one has its last reader n rows after that of the last column.
    """

    last_readers: torch.Tensor

    def live(self, rows: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """Marks the blocks that some row from `rows` `[batch]` on reads, bool `[batch, KV heads, num_blocks]`.

        Blocks after the row itself are included: they will be read once they exist.
        """
        known = self.last_readers.shape[1]
        readers = self.last_readers[:, :num_blocks]
        if num_blocks > known:
            behind = torch.arange(1, num_blocks - known + 1, device=self.last_readers.device)
            readers = torch.cat((readers, readers[:, -1:] + behind), dim=1)
        return readers >= rows[:, None, None]
