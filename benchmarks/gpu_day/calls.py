"""Attention calls on a day's device: random tensors, their check against fp64, and their time."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from gpu_day.day import Day
from inputs.topologies import Shape
from surgeon.compiler import Topology
from surgeon.compiler.tune.clock import timed
from surgeon.compiler.tune.exact import sampled_error

TOLERANCE = 5e-3
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class WrongResultError(ArithmeticError):
    """A call whose output is not that of the definition."""


def inputs(day: Day, shape: Shape, q_length: int, k_length: int, batch: int = 1) -> Tensors:
    """Random tensors on the day's device, with q laid out as projections leave it."""
    generator = torch.Generator(day.device).manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(batch, *size, device=day.device, dtype=day.torch_dtype, generator=generator)

    q = random(q_length, shape.heads, shape.head_dim).transpose(1, 2)
    return q, random(shape.kv_heads, k_length, shape.head_dim), random(shape.kv_heads, k_length, shape.head_dim)


def block_mask(day: Day, topology: Topology) -> torch.Tensor:
    """The blocks that the first layer's heads see at the topology's full length, `[heads, rows, blocks]`."""
    return torch.from_numpy(topology.block_mask(0, topology.num_blocks)).to(day.device)


def checked(what: str, mask: torch.Tensor, block_size: int, tensors: Tensors, out: torch.Tensor) -> float:
    """Returns the relative error of the first sequence's output at a sample of its queries.

    Raises:
        WrongResultError: it is not below `TOLERANCE`.
    """
    error = sampled_error(mask, block_size, *tensors, out)
    if not error < TOLERANCE:
        raise WrongResultError(f"{what}: expected a relative error below {TOLERANCE}, got {error:.1e}")
    return error


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
