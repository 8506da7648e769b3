"""The backends, each a way from schedules to binaries: the only place that asks what kind of target there is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from surgeon.compiler.kernels.cpu.build import build_cpu
from surgeon.compiler.kernels.cpu.render import render_cpu
from surgeon.compiler.kernels.cpu.variants import variants_for
from surgeon.compiler.kernels.gpu.compile import check_triton
from surgeon.compiler.kernels.gpu.pool import build_gpu
from surgeon.compiler.kernels.gpu.render import render_gpu
from surgeon.compiler.schedule.schedule import LayerSchedule
from surgeon.compiler.specs.artifacts import Binary, CpuSource, GpuSource
from surgeon.compiler.specs.kernel_spec import CpuSpec, GpuSpec
from surgeon.compiler.specs.specialize import Tiles, specialize_cpu, specialize_gpu
from surgeon.compiler.system.cache import Cache
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.target import Target

Spec = TypeVar("Spec")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Backend(Generic[Spec, Made]):
    """The stages of one kind of target, from schedules to specifications, to sources, to binaries.

    `render` takes the build machine too, as `platform.machine()` names it. `check_compiler` raises a TargetError where
    what compiles for the target is not installed.
    """

    specialize: Callable[
        [Topology, Sequence[LayerSchedule], Target, Sequence[str] | None, Tiles | None], tuple[Spec, ...]
    ]
    render: Callable[[tuple[Spec, ...], str], tuple[Made, ...]]
    check_compiler: Callable[[Target], None]
    build: Callable[[tuple[Made, ...], Cache, int, Progress | None], tuple[Binary, ...]]


def _render_cpu(specs: tuple[CpuSpec, ...], machine: str) -> tuple[CpuSource, ...]:
    return (render_cpu(specs, variants_for(machine)),)


def _build_cpu(
    sources: tuple[CpuSource, ...], cache: Cache, jobs: int, progress: Progress | None
) -> tuple[Binary, ...]:
    return tuple(build_cpu(source, cache, jobs, progress) for source in sources)


def _render_gpu(specs: tuple[GpuSpec, ...], _machine: str) -> tuple[GpuSource, ...]:
    return render_gpu(specs)


CPU = Backend(specialize_cpu, _render_cpu, lambda _target: None, _build_cpu)
GPU = Backend(specialize_gpu, _render_gpu, check_triton, build_gpu)

BACKENDS: Mapping[str, Backend[Any, Any]] = {"cpu": CPU, "cuda": GPU, "hip": GPU}
"""By the backend that a target names."""
