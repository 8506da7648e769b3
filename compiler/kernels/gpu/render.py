"""Kernel specifications ─▶ sources of a GPU target: kernels for many queries, and those for one."""

from collections.abc import Sequence

from surgeon.compiler.kernels.gpu import decode, prefill
from surgeon.compiler.schedule.segment_tables import segment_tables
from surgeon.compiler.specs.artifacts import GpuSource
from surgeon.compiler.specs.kernel_spec import GpuSpec


def render_gpu(specs: Sequence[GpuSpec]) -> tuple[GpuSource, ...]:
    """Renders one target's kernels, with the tables of their schedules that they read or are made from.

    Raises:
        TargetError: a schedule lists more keys than a 32-bit number counts.
    """
    tables = segment_tables(prefill.wanted_tables(specs) | decode.wanted_tables(specs))
    return (*prefill.render_prefill(specs, tables), *decode.render_decode(specs, tables))
