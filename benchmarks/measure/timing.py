"""Times several functions in turn in one process, and describes the machine."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and minimum by the clock, and of the process's CPU seconds.

    CPU seconds count all threads; they measure work only if waiting threads sleep (OMP_WAIT_POLICY=passive).
    """

    median: float
    minimum: float
    cpu: float
    cpu_minimum: float


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int, before: Callable[[], object] | None = None
) -> dict[str, Timing]:
    """Times each function `repeats` times, one call of each in turn, after one untimed call.

    `before` runs before each call, and its time does not count. The order rotates by one each round: a call pays for
    what the one before it evicted from the caches.
    """
    for call in calls.values():
        call()
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    for _ in range(repeats):
        order.append(order.pop(0))
        for name, call in order:
            if before is not None:
                before()
            cpu_started, started = time.process_time(), time.perf_counter()
            call()
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - cpu_started)
    return {
        name: Timing(statistics.median(wall[name]), min(wall[name]), statistics.median(cpu[name]), min(cpu[name]))
        for name in calls
    }


def repeats_for(seconds: float, budget: float = 3.0, least: int = 3, most: int = 30) -> int:
    """The number of calls of this many seconds that fit a budget of seconds, within bounds."""
    return max(least, min(most, int(budget / max(seconds, 1e-9))))


def seconds_of(call: Callable[[], object]) -> float:
    """The wall time of one warm call, for choosing the number of repeats."""
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def gemm_flops(size: int = 1024, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """The ceiling for arithmetic: torch's product of two square matrices, `gemm_operations(size)` per call."""
    a, b = torch.randn(2, size, size).to(dtype)
    return lambda: a @ b


def gemm_operations(size: int = 1024) -> float:
    """Multiplications and additions of such a product."""
    return 2.0 * size**3


def machine() -> dict[str, object]:
    """The processor, the vector extension that torch uses, threads, versions, load and time."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
