"""The rendered kernels of a GPU target, by phase."""

from collections.abc import Sequence

from surgeon.compiler.kernels.gpu.render import render_gpu, wanted_tables
from surgeon.compiler.schedule.segment_tables import segment_tables
from surgeon.compiler.specs.artifacts import GpuSource
from surgeon.compiler.specs.kernel_spec import GpuSpec


def gpu_sources(specs: Sequence[GpuSpec]) -> tuple[GpuSource, ...]:
    """All kernels of the target."""
    return render_gpu(specs, segment_tables(wanted_tables(specs)))


def prefill_sources(specs: Sequence[GpuSpec]) -> tuple[GpuSource, ...]:
    """The kernels for many queries."""
    return tuple(source for source in gpu_sources(specs) if source.phase == "prefill")


def decode_sources(specs: Sequence[GpuSpec]) -> tuple[GpuSource, ...]:
    """The kernels for one query."""
    return tuple(source for source in gpu_sources(specs) if source.phase != "prefill")
