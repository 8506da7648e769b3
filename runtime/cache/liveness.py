"""Which blocks of a cache some later row still reads: what may leave it, and when.

Source: `_schedule_tables` of the compiler's package.py; package format version 1.
"""

from dataclasses import dataclass

import safetensors
import safetensors.torch
import torch

from surgeon.runtime.errors import PackageError
from surgeon.runtime.package.reader import PackageFiles


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
            behind = torch.arange(1, num_blocks - known + 1)
            readers = torch.cat((readers, readers[:, -1:] + behind), dim=1)
        return readers >= rows[:, None, None]


def read_liveness(files: PackageFiles) -> dict[int, Liveness]:
    """Every layer's last readers.

    Raises:
        PackageError: the tables are missing or of another form.
    """
    where = f"{files.folder}/schedule.safetensors"
    try:
        tables = safetensors.torch.load(files.files["schedule.safetensors"])
        found: dict[int, Liveness] = {}
        for kernel in files.manifest.kernels:
            if kernel.schedule and not found.keys() >= set(kernel.layers):
                table = tables[f"{kernel.schedule}.last_readers"]
                heads = files.manifest.model.num_key_value_heads
                if table.dtype != torch.int32 or table.ndim != 2 or table.shape[0] != heads or not table.shape[1]:
                    raise ValueError(f"{kernel.schedule}.last_readers: {table.dtype} {list(table.shape)}")
                found |= dict.fromkeys(kernel.layers, Liveness(table.long()))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise PackageError(
            where, "the last readers of every kernel's schedule", str(error)[:100], "compile the package again"
        ) from None
    return found
