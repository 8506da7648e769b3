"""Which blocks of a cache some later row still reads: what may leave it, and when."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Liveness:
    """One layer's last readers, int64 `[KV heads, blocks]`: the last row of blocks that reads each block.

    A block behind the last column has its reader as many rows behind that column's.
    """

    last_readers: torch.Tensor

    def live(self, rows: torch.Tensor, num_blocks: int) -> torch.Tensor:
        """Which blocks some row from `rows` `[batch]` on reads, bool `[batch, KV heads, num_blocks]`.

        Blocks behind the row itself are among them: they will be read when they are there.
        """
        known = self.last_readers.shape[1]
        readers = self.last_readers[:, :num_blocks]
        if num_blocks > known:
            behind = torch.arange(1, num_blocks - known + 1, device=self.last_readers.device)
            readers = torch.cat((readers, readers[:, -1:] + behind), dim=1)
        return readers >= rows[:, None, None]
