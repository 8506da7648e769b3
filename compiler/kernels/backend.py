"""The backends, each a path from schedules to binaries: the only place that distinguishes kinds of target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from surgeon.compiler.kernels.cpu.build import build_cpu
from surgeon.compiler.kernels.cpu.direct import build_direct
from surgeon.compiler.kernels.cpu.render import render_cpu
from surgeon.compiler.kernels.cpu.variants import variants_for
from surgeon.compiler.kernels.gpu.compile import check_triton
from surgeon.compiler.kernels.gpu.pool import build_gpu
from surgeon.compiler.kernels.gpu.render import render_gpu, wanted_tables
from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.schedule.segment_tables import TableShape
from surgeon.compiler.specs.artifacts import Binary, CpuSource, GpuSource
from surgeon.compiler.specs.kernel_spec import CpuSpec, GpuSpec
from surgeon.compiler.specs.specialize import LastReaders, Tiles, specialize_cpu, specialize_gpu
from surgeon.compiler.system.cache import Cache
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.segment_table import SegmentTable
from surgeon.runtime.package.target import Target

Spec = TypeVar("Spec")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Backend(Generic[Spec, Made]):
    """The stages for one kind of target: schedules to specifications, to sources, to binaries.

    `wanted_tables` names the segment tables that `render` takes. A name identifies a schedule and one of its tables, so
    that all targets of a package share them. `render` also takes the build machine, as `platform.machine()` names it.
    `check_compiler` raises a TargetError if the compiler for the target is not installed.
    """

    specialize: Callable[
        [Topology, Sequence[LayerSchedule], Target, Sequence[str] | None, Tiles | None, LastReaders, bool],
        tuple[Spec, ...],
    ]
    wanted_tables: Callable[[tuple[Spec, ...]], dict[str, tuple[LayerSchedule, TableShape]]]
    render: Callable[[tuple[Spec, ...], Mapping[str, SegmentTable], str], tuple[Made, ...]]
    check_compiler: Callable[[Target], None]
    build: Callable[[tuple[Made, ...], Cache, int, Progress | None], tuple[Binary, ...]]


def _no_tables(_specs: tuple[CpuSpec, ...]) -> dict[str, tuple[LayerSchedule, TableShape]]:
    return {}  # C++ holds the schedule itself


def _render_cpu(specs: tuple[CpuSpec, ...], _tables: Mapping[str, SegmentTable], machine: str) -> tuple[CpuSource, ...]:
    return (render_cpu(specs, variants_for(machine)),)


def _build_cpu(
    sources: tuple[CpuSource, ...], cache: Cache, jobs: int, progress: Progress | None
) -> tuple[Binary, ...]:
    built = [build_cpu(source, cache, jobs, progress) for source in sources]
    return (*built, *(direct for source in sources if (direct := build_direct(source, cache)) is not None))


def _render_gpu(specs: tuple[GpuSpec, ...], tables: Mapping[str, SegmentTable], _machine: str) -> tuple[GpuSource, ...]:
    return render_gpu(specs, tables)


CPU = Backend(specialize_cpu, _no_tables, _render_cpu, lambda _target: None, _build_cpu)
GPU = Backend(specialize_gpu, wanted_tables, _render_gpu, check_triton, build_gpu)

BACKENDS: Mapping[str, Backend[Any, Any]] = {"cpu": CPU, "cuda": GPU, "hip": GPU}
"""Backends by the name that a target gives."""
