"""Calls on a day's device: the blocks that they read, and their time."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from gpu_day.day import Day
from surgeon.compiler import Topology
from surgeon.compiler.tune.clock import timed


def block_mask(day: Day, topology: Topology) -> torch.Tensor:
    """The blocks that the first layer's heads see at the topology's full length, `[heads, rows, blocks]`."""
    return torch.from_numpy(topology.block_mask(0, topology.num_blocks)).to(day.device)


def wait(day: Day) -> None:
    """Waits for the device, if it works by itself."""
    if day.device == "cuda":
        torch.cuda.synchronize()


def milliseconds(day: Day, calls: Mapping[str, Callable[[], object]], graphs: bool, repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, run in turn; on a GPU by its own events, and with `graphs` without the host."""
    if day.device == "cuda":
        return timed(calls, graphs, repeats)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in times.items()}
