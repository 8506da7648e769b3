"""Times calls on a GPU with the GPU's own events."""

import statistics
from collections.abc import Callable, Mapping

import torch

_WARM_UP = 3
_LARGER_THAN_A_CACHE = 2**28  # bytes


def timed(calls: Mapping[str, Callable[[], object]], graphs: bool, repeats: int = 30) -> dict[str, float]:
    """Median milliseconds of each call, run in turn, with the L2 cache cleared before each.

    With `graphs`, calls are captured and replayed, so that host time does not count.
    """
    ready = {name: captured(call) if graphs else call for name, call in calls.items()}
    flush = torch.empty(_LARGER_THAN_A_CACHE, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(repeats + _WARM_UP):
        for name, call in ready.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn >= _WARM_UP:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """Captures the call as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
