"""The whole compiler as one straight function: topology ─▶ schedules ─▶ specs ─▶ sources ─▶ binaries ─▶ package."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from surgeon.compiler.dump import Dump
from surgeon.compiler.kernels.backend import BACKENDS
from surgeon.compiler.package.write import check_replaceable, write_package
from surgeon.compiler.schedule.liveness import liveness_tables
from surgeon.compiler.schedule.schedule import schedule_layers
from surgeon.compiler.schedule.segment_tables import segment_tables
from surgeon.compiler.specs.artifacts import Binary, Source
from surgeon.compiler.specs.tiles import TargetTiles
from surgeon.compiler.system.cache import Cache
from surgeon.compiler.system.terminal import Progress
from surgeon.compiler.topology.topology import Topology
from surgeon.runtime.package.target import Target


def compile_package(
    topology: Topology,
    out: str | os.PathLike[str],
    targets: Sequence[str | Target] = ("cpu",),
    dtypes: Sequence[str] | None = None,
    jobs: int | None = None,
    dump: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    tiles: Mapping[Target, TargetTiles] | None = None,
    paged: bool = False,
) -> Path:
    """Compiles a topology's attention kernels into the folder `out`, which appears whole or not at all.

    `dtypes` None means every storage type of each target; `jobs` is the number of compilers that run at once, by
    default one per core; `dump` is a folder that receives every stage's output; `tiles` take precedence over the
    built-in ones (see `read_tiles`). With `paged`, GPU targets also get kernels for keys and values in pages, which
    engines such as vLLM need; those of CPUs take both.

    Raises:
        TargetError: a target or dtype does not exist or cannot hold the kernels, or has none for pages.
        BuildError: a compiler is missing or fails.
        PackageError: `out` exists and is not a kernel package.
    """
    out = Path(out)
    check_replaceable(out)
    cache, jobs = Cache.default(), jobs or os.cpu_count() or 1
    stages = Dump(None if dump is None else Path(dump))

    layers = schedule_layers(topology)
    last_readers = liveness_tables(layers)
    stages.schedules(topology, layers)
    # Refuses what cannot be compiled before the first compiler starts.
    chosen = dict.fromkeys(Target.parse(target) if isinstance(target, str) else target for target in targets)
    backends = {target: BACKENDS[target.backend] for target in chosen}
    specs = {
        target: backend.specialize(topology, layers, target, dtypes, tiles, last_readers, paged)
        for target, backend in backends.items()
    }
    for target, backend in backends.items():
        backend.check_compiler(target)
    # One table serves every target that wants it: its name identifies the schedule and its table.
    wanted = [backend.wanted_tables(specs[target]) for target, backend in backends.items()]
    tables = segment_tables({name: table for of_target in wanted for name, table in of_target.items()})
    sources: list[Source] = []
    binaries: list[Binary] = []
    for target, backend in backends.items():
        stages.specs(target, specs[target])
        rendered = backend.render(specs[target], tables, platform.machine())
        stages.sources(rendered)
        built = backend.build(rendered, cache, jobs, progress)
        stages.binaries(built)
        sources += rendered
        binaries += built
    return write_package(out, topology, last_readers, sources, binaries)
