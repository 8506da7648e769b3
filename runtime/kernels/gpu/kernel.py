"""A loaded GPU kernel, and how it is launched."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from surgeon.runtime.errors import PatchError
from surgeon.runtime.kernels.gpu.driver import Function
from surgeon.runtime.package.interface import PREFILL

MOST_PROGRAMS = 65535
"""The most programs along the second and the third axis of a grid that every driver takes."""


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel with the order of its arguments, the meaning of its grid, and the query heads it serves.

    Each program has `tile_rows` queries of `program_heads` heads, and needs `scratch_bytes` of the device's memory. Of
    persistent programs the device runs `at_once`, of others that is None; they take a tile of queries after the other.
    """

    function: Function
    arguments: tuple[str, ...]
    grid: tuple[str, ...]
    tile_rows: int
    scratch_bytes: int
    program_heads: int
    heads: range
    at_once: int | None

    def launch(
        self, lengths: Mapping[str, int], stream: int, values: Mapping[str, int | float], like: torch.Tensor
    ) -> None:
        """Queues the kernel; its own memory is allocated as `like` is, on torch's current stream, which is `stream`.

        Raises:
            PatchError: the grid is larger than drivers take.
            TargetError: the driver refuses the launch.
        """
        if self.at_once is not None:
            heads, sequences, tiles = (lengths[axis] for axis in PREFILL.grid)
            tasks = heads * sequences * tiles
            lengths = {**lengths, "programs": min(self.at_once, tasks)}
            tasks_taken = like.new_zeros((1,), dtype=torch.int32)
            values = {**values, "tasks_taken": tasks_taken.data_ptr()}
            values |= {"num_task_heads": heads, "num_sequences": sequences, "num_tasks": tasks}
        x, y, z = (lengths[axis] for axis in self.grid)
        if max(y, z) > MOST_PROGRAMS:
            found = f"{x}, {y} and {z} for {', '.join(self.grid)}"
            expected = f"a grid of at most {MOST_PROGRAMS} programs along its second and its third axis"
            raise PatchError("attention", expected, found, "pass fewer queries or sequences in a call")
        if self.scratch_bytes:
            scratch = like.new_empty((x * y * z * self.scratch_bytes,), dtype=torch.uint8)
            values = {**values, "global_scratch": scratch.data_ptr()}
        self.function.launch((x, y, z), stream, [values[name] for name in self.arguments])
