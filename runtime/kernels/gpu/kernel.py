"""A loaded GPU kernel, and how it is launched."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from surgeon.runtime.kernels.gpu.driver import Function


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel with the order of its arguments, the meaning of its grid, and the query heads it serves.

    Each program has `tile_rows` queries of `program_heads` heads, and needs `scratch_bytes` of the device's memory.
    """

    function: Function
    arguments: tuple[str, ...]
    grid: tuple[str, ...]
    tile_rows: int
    scratch_bytes: int
    program_heads: int
    heads: range

    def launch(
        self, lengths: Mapping[str, int], stream: int, values: Mapping[str, int | float], like: torch.Tensor
    ) -> None:
        """Queues the kernel; scratch memory is allocated as `like` is, on torch's current stream, which is `stream`."""
        x, y, z = (lengths[axis] for axis in self.grid)
        if self.scratch_bytes:
            scratch = like.new_empty((x * y * z * self.scratch_bytes,), dtype=torch.uint8)
            values = {**values, "global_scratch": scratch.data_ptr()}
        self.function.launch((x, y, z), stream, [values[name] for name in self.arguments])
