"""The rendered kernels of a GPU target, by phase."""

from collections.abc import Sequence

from surgeon.compiler.kernels.gpu.render import render_gpu
from surgeon.compiler.specs.artifacts import GpuSource
from surgeon.compiler.specs.kernel_spec import GpuSpec


def prefill_sources(specs: Sequence[GpuSpec]) -> tuple[GpuSource, ...]:
    """The kernels for many queries."""
    return tuple(source for source in render_gpu(specs) if source.phase == "prefill")


def decode_sources(specs: Sequence[GpuSpec]) -> tuple[GpuSource, ...]:
    """The kernels for one query."""
    return tuple(source for source in render_gpu(specs) if source.phase != "prefill")
