"""Kernel specifications ─▶ sources for a GPU target: kernels for many queries, one, pages and routed heads."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from surgeon.compiler.kernels.gpu import decode, prefill, router
from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.schedule.segment_tables import TableShape
from surgeon.compiler.specs.artifacts import GpuSource
from surgeon.compiler.specs.kernel_spec import GpuSpec
from surgeon.runtime.package.segment_table import SegmentTable


def wanted_tables(specs: Sequence[GpuSpec]) -> dict[str, tuple[LayerSchedule, TableShape]]:
    """The tables that one target's kernels read or are rendered from, by their names in the package."""
    in_pages = _in_pages(specs)
    of_pages = prefill.wanted_tables(in_pages) if in_pages else {}
    return prefill.wanted_tables(specs) | of_pages | decode.wanted_tables(specs)


def render_gpu(specs: Sequence[GpuSpec], tables: Mapping[str, SegmentTable]) -> tuple[GpuSource, ...]:
    """Renders one target's kernels; `tables` holds those of `wanted_tables`, and may hold others.

    Raises:
        TargetError: a schedule lists more keys than a 32-bit number counts.
    """
    return (
        *router.render_router(specs, tables),
        *prefill.render_prefill(specs, tables),
        *decode.render_decode(specs, tables),
        *_render_paged(_in_pages(specs), tables),
    )


def _render_paged(specs: Sequence[GpuSpec], tables: Mapping[str, SegmentTable]) -> tuple[GpuSource, ...]:
    if not specs:
        return ()
    return (
        *prefill.render_prefill(specs, tables, paged=True),
        *decode.render_decode(specs, tables, paged=True),
    )


def _in_pages(specs: Sequence[GpuSpec]) -> tuple[GpuSpec, ...]:
    """The specifications of the kernels for pages, whose tiles are their own."""
    return tuple(
        replace(spec, prefill=spec.paged_prefill, decode=spec.paged_decode)
        for spec in specs
        if spec.paged_prefill is not None
    )
