"""The whole compiler as one straight function: topology ─▶ schedules ─▶ specs ─▶ sources ─▶ binaries ─▶ package."""

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

from surgeon.compiler.build import build
from surgeon.compiler.cache import Cache
from surgeon.compiler.dump import Dump
from surgeon.compiler.package import write_package
from surgeon.compiler.render import render
from surgeon.compiler.schedule import schedule_layers
from surgeon.compiler.specialize import specialize
from surgeon.compiler.stages import Binary, Source
from surgeon.compiler.topology import Topology
from surgeon.runtime.target import Target

Progress = Callable[[str, int, int], None]
"""Told of long work as (what, done, total)."""


def compile_package(
    topology: Topology,
    out: str | os.PathLike[str],
    targets: Sequence[str | Target] = ("cpu",),
    dtypes: Sequence[str] | None = None,
    jobs: int | None = None,
    dump: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compiles a topology's attention kernels into the folder `out`, which appears whole or not at all.

    `dtypes` None means every storage type of each target; `jobs` is how many compilers run at once, by default one a
    core; `dump` is a folder that receives every stage's product.

    Raises:
        TargetError: a target or dtype that does not exist or cannot hold the kernels.
        BuildError: a compiler is missing or fails.
        PackageError: `out` exists and is not a kernel package.
    """
    cache, jobs = Cache.default(), jobs or os.cpu_count() or 1
    stages = Dump(None if dump is None else Path(dump))

    layers = schedule_layers(topology)
    stages.schedules(topology, layers)
    sources: list[Source] = []
    binaries: list[Binary] = []
    for target in dict.fromkeys(Target.parse(target) if isinstance(target, str) else target for target in targets):
        specs = specialize(topology, layers, target, dtypes)
        stages.specs(target, specs)
        rendered = render(specs, platform.machine())
        stages.sources(rendered)
        built = build(rendered, cache, jobs, progress)
        stages.binaries(built)
        sources += rendered
        binaries += built
    return write_package(Path(out), topology, sources, binaries)
