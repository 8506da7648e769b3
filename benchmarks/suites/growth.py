"""Growth of time and memory: with length at a fixed window, with density, with threads."""

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from inputs import topologies as patterns
from inputs.topologies import Shape
from measure.timing import interleaved, repeats_for, seconds_of

SHAPE = Shape(9, 3, 64, 64)


def with_length(variant: str | None) -> Iterator[dict[str, object]]:
    """A window of 1,024 tokens at growing lengths; memory is the process's peak beyond its tensors."""
    topology = patterns.windows(SHAPE, 2048, 0.75)
    package = patterns.compiled(topology, variant)
    for length in (1024, 2048, 4096, 8192, 16384, 32768):
        q, k, v = patterns.inputs(SHAPE, length, length, torch.float32)
        call = partial(package.attention, 0, q, k, v)
        output_bytes = q.numel() * 4
        peak = _peak_bytes(call) - output_bytes
        times = interleaved({"ours": call}, repeats_for(seconds_of(call)))
        yield {
            "length": length,
            "window": topology.layers[0][1].window * 64,  # type: ignore[union-attr]
            "ours_ms": times["ours"].median * 1e3,
            "us_a_token": times["ours"].median * 1e6 / length,
            "extra_mb": peak / 2**20,
        }


def with_density(variant: str | None) -> Iterator[dict[str, object]]:
    """A prefill of 8,192 tokens at growing density."""
    for density in (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0):
        topology = patterns.windows(SHAPE, 8192, density)
        package = patterns.compiled(topology, variant)
        q, k, v = patterns.inputs(SHAPE, 8192, 8192, torch.float32)
        times = interleaved({"ours": partial(package.attention, 0, q, k, v)}, 5)
        found = float(topology.density(0).mean())
        yield {
            "density": round(found, 4),
            "ours_ms": times["ours"].median * 1e3,
            "ms_over_density": times["ours"].median * 1e3 / found,
        }


def with_threads(variant: str | None) -> Iterator[dict[str, object]]:
    """A prefill of 8,192 tokens at a quarter of the blocks, on one thread and on all."""
    topology = patterns.windows(SHAPE, 8192, 0.25)
    package = patterns.compiled(topology, variant)
    q, k, v = patterns.inputs(SHAPE, 8192, 8192, torch.float32)
    all_threads = torch.get_num_threads()

    def call(threads: int) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            torch.set_num_threads(threads)
            return package.attention(0, q, k, v)

        return run

    counts = range(1, all_threads + 1)
    times = interleaved({str(count): call(count) for count in counts}, 7)
    torch.set_num_threads(all_threads)
    for count in counts:
        yield {
            "threads": count,
            "ours_ms": times[str(count)].median * 1e3,
            "speed_up": times["1"].median / times[str(count)].median,
        }


def _peak_bytes(call: Callable[[], object]) -> int:
    """Peak bytes that the process held during a call beyond those before it; 0 if Linux does not tell."""
    try:
        call()
        ctypes.CDLL(None).malloc_trim(0)  # else reuse of memory freed earlier would go unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
    except OSError:
        return 0
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
